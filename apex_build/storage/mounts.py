"""The file system under a path, as the kernel lists it: do locks on it hold between machines?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_TABLE = Path("/proc/self/mountinfo")
_ESCAPED = re.compile(r"\\([0-7]{3})")
# File systems whose locks may be local to this machine, and the mount options that decide it.
_NEVER = (
    "9p",
    "afs",
    "beegfs",
    "cifs",
    "fuse.gcsfuse",
    "fuse.rclone",
    "fuse.s3fs",
    "fuse.sshfs",
    "smb3",
    "vboxsf",
    "virtiofs",
)
_NOT_WITH = {"nfs": {"nolock", "local_lock=all", "local_lock=flock"}}
_NOT_WITH["nfs4"] = _NOT_WITH["nfs"]
_ONLY_WITH = {"lustre": {"flock"}}


@dataclass(frozen=True)
class Mount:
    point: str
    type: str
    options: frozenset[str]


def mount_of(path: Path, table: str | None = None) -> Mount | None:
    """The mount that holds `path`; None if the kernel does not say. `table`: the text of /proc/self/mountinfo."""
    if table is None:
        try:
            table = _TABLE.read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return None
    wanted = str(path.parent.resolve() / path.name)
    best: Mount | None = None
    for line in table.splitlines():
        before, dash, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        if not dash or len(fields) < 6 or len(rest) < 3:
            continue
        point = _ESCAPED.sub(lambda found: chr(int(found[1], 8)), fields[4])
        inside = wanted == point or wanted.startswith(point.rstrip("/") + "/")
        # of two mounts at one point, the later one is on top
        if inside and (best is None or len(point) >= len(best.point)):
            best = Mount(point, rest[0], frozenset([*fields[5].split(","), *rest[2].split(",")]))
    return best


def lock_doubt(mount: Mount | None) -> str:
    """Why another machine may not see a lock on this file system; empty if it does, or if the disk is local."""
    if mount is None:
        return ""
    reason = ""
    if mount.type in _NEVER:
        reason = f"locks on {mount.type} may not be seen by other machines"
    elif without := mount.options & _NOT_WITH.get(mount.type, set()):
        reason = f"mounted as {mount.type} with {', '.join(sorted(without))}: other machines do not see locks"
    elif mount.type in _ONLY_WITH and not mount.options & _ONLY_WITH[mount.type]:
        reason = f"mounted as {mount.type} without {', '.join(_ONLY_WITH[mount.type])}: other machines do not see locks"
    return reason
