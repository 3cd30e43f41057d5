"""Import a build that was packed elsewhere: check its headers and lists, verify every byte, try the tools, install."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from apex_build.errors import ArchiveUnsafe, BuildForeign, HashMismatch, ToolFailed, ToolTimeout
from apex_build.fetching.archive import MAX_MEMBERS, MAX_TOTAL, member_path, members_of, open_tar
from apex_build.native.run import run_tool, tail
from apex_build.native.toolset import Toolset, misshapen, open_build
from apex_build.progress import Report, Step, silent
from apex_build.storage.artifacts import Artifact, making_folder
from apex_build.storage.digests import sha256_json
from apex_build.storage.disk import check_room, writing
from apex_build.storage.manifest import BUILD, parse
from apex_build.toolchain.build import cache
from apex_build.toolchain.machine.cpu import cpu_flags
from apex_build.toolchain.packed.packing import MANIFEST, SUMS, key_of, parts_of

_MAX_TEXT = 16 << 20  # bytes of the manifest, and of the list of sums
_NAME = re.compile(r"bin/[\w.+-]+|licenses(/[\w.+ -]+)+", re.ASCII)
_WORD = re.compile(r"[a-z][a-z0-9-]*")  # a backend's name becomes part of a file's
# What the rest of this module relies on in a manifest.
_SHAPE: Mapping[str, type | tuple[type, ...]] = {
    **{"backend": str, "built": str, "host": str, "key": str, "source": str, "compiler_cache": str},
    **{"compiler": dict, "files": dict, "options": dict, "patches": list, "targets": list},
    **{"recipe": int, "seconds": (int, float), "pin": (dict, type(None)), "cpu": (str, type(None))},
}
_SHAPE_IF_THERE: Mapping[str, type] = {"cuda": dict, "cpu_flags": list, "left_out": list}


@dataclass(frozen=True)
class TakenIn:
    """An imported build, now in the cache; `reused` if it was already there. `left_out`: see packing.py."""

    toolset: Toolset
    reused: bool
    left_out: tuple[str, ...]


def take_in(archive: Path, *, make_current: bool = False, report: Report = silent) -> TakenIn:
    """Install a packed build into the cache, whole and verified or not at all; `make_current` lets the other verbs use
    it.

    The sums prove that nothing was damaged on the way, not who made it. Raises ArchiveUnsafe (a link, a device, a path
    that escapes, absurd sizes), HashMismatch (a file that does not match the lists, or not a packed build),
    BuildForeign (not for this machine), DownloadFailed (missing, or cut short), DiskTooSmall.
    """
    report(Step("unpacking", 0))
    with open_tar(archive) as tar:
        members = _members(archive, tar)
        manifest = _manifest(archive, tar, members)
        _check_machine(archive, manifest)
        root = cache.builds_root() / manifest["key"]
        artifact = Artifact(root, BUILD, parts_of(manifest), root / MANIFEST)
        with making_folder(artifact, intact=lambda _: cache.look_up(root.name) is not None, report=report) as draft:
            if not (reused := draft.found is not None):
                _check_disk(root.parent, manifest)
                draft.part.mkdir(parents=True)
                _extract(archive, tar, members, manifest["files"], draft.part, report)
                _share_copies(draft.part, manifest["files"])
                _try(archive, draft.part, manifest["targets"])
                of_maker = parse(manifest)
                assert of_maker is not None  # its shape was checked
                draft.adopted(of_maker)
    toolset = open_build(root)
    if make_current:
        cache.make_current(toolset)
    return TakenIn(toolset, reused, tuple(manifest.get("left_out", ())))


def _members(archive: Path, tar: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """The archive's files by their paths in its one folder, checked by their headers alone."""
    members: dict[str, tarfile.TarInfo] = {}
    tops = set()
    total = 0
    for member in members_of(archive, tar):
        top, _, name = member_path(archive, member).partition("/")
        if member.isdir():
            continue
        if not member.isreg():
            raise ArchiveUnsafe(
                f"{archive.name}: {member.name!r} is a link to {member.linkname!r}; a packed build has none"
            )
        total += max(member.size, 0)
        if len(members) >= MAX_MEMBERS or total > MAX_TOTAL or member.size < 0:
            raise ArchiveUnsafe(f"{archive.name}: refused at {member.name!r}: too many members, or too large")
        if name in members:
            raise ArchiveUnsafe(f"{archive.name}: the member {member.name!r} occurs twice")
        tops.add(top)
        members[name] = member
    if len(tops) != 1 or not {SUMS, MANIFEST} <= set(members):
        raise HashMismatch(
            f"{archive} is not a packed build: expected {SUMS} and {MANIFEST} in one folder", hint="apex build --export"
        )
    return members


def _manifest(archive: Path, tar: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo]) -> dict[str, Any]:
    """The manifest, if its key matches its contents, and it and the list of sums name exactly the files present."""
    sums = _text(archive, tar, members, SUMS).decode(errors="replace")
    listed = {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (.+)$", sums, re.MULTILINE)}
    text = _text(archive, tar, members, MANIFEST)
    if listed.pop(MANIFEST, None) != hashlib.sha256(text).hexdigest():
        raise HashMismatch(f"{archive}: {MANIFEST} is not the one that its {SUMS} lists")
    try:
        manifest = json.loads(text)
        if wrong := _misshapen(manifest):
            raise ValueError(wrong)
        key = key_of(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HashMismatch(f"{archive}: its {MANIFEST} is not one of a build: {error}") from None
    if manifest["recipe"] != cache.RECIPE:
        raise BuildForeign(
            f"{archive} is from another version of apex-build: its recipe is {manifest['recipe']}, not {cache.RECIPE}"
        )
    if manifest["key"] != key or ("from" in manifest and sha256_json(manifest["from"])[:32] != key):
        raise HashMismatch(
            f"{archive}: its {MANIFEST} was changed: it gives the key {manifest['key']!r:.80}, its contents make {key}"
        )
    files = manifest["files"]
    for name in files:
        if not _NAME.fullmatch(name) or {".", ".."} & set(name.split("/")):
            raise ArchiveUnsafe(f"{archive.name}: its {MANIFEST} names {name!r}, where no build has a file")
    if differing := sorted((set(members) - {SUMS, MANIFEST}) ^ set(files)) or _differing(members, listed, files):
        raise HashMismatch(f"{archive}: its lists and its contents differ: {', '.join(differing[:5])}")
    if missing := [name for name in manifest["targets"] if f"bin/{name}" not in files]:
        raise HashMismatch(f"{archive} lacks tools that it names: {', '.join(missing)}")
    return dict(manifest)


def _differing(
    members: Mapping[str, tarfile.TarInfo], sums: Mapping[str, str], files: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    names = sorted(set(sums) ^ set(files))
    return names or [
        name for name, about in files.items() if (about["sha256"], about["size"]) != (sums[name], members[name].size)
    ]


def _misshapen(manifest: Any) -> str:
    """What is wrong with the types of its values, so that a strange manifest fails here and not in later code."""
    if not isinstance(manifest, dict):
        return "it is not an object"
    for name, kind in (*_SHAPE.items(), *((name, kind) for name, kind in _SHAPE_IF_THERE.items() if name in manifest)):
        if not isinstance(manifest.get(name), kind) or (name not in manifest):
            return f"'{name}' is missing, or of another kind"
    words = (*manifest["targets"], *manifest.get("cpu_flags", ()), *manifest.get("left_out", ()))
    if not manifest["targets"] or not all(isinstance(word, str) for word in words):
        return "a name in its lists is not a string"
    if not _WORD.fullmatch(manifest["backend"]):
        return f"the backend {manifest['backend']!r:.80}"
    if not all(isinstance(manifest["compiler"].get(name), str) for name in ("kind", "target", "version")):
        return "the compiler"
    cuda = manifest.get("cuda", {})
    for name in ("architectures", "gpus"):
        if not isinstance(cuda.get(name, []), list) or not all(isinstance(word, str) for word in cuda.get(name, [])):
            return f"what it says of CUDA: {name}"
    if manifest["pin"] is not None and not isinstance(manifest["pin"].get("name"), str):
        return "the pin"
    for name, about in manifest["files"].items():
        if (
            not isinstance(about, dict)
            or type(about.get("size")) is not int
            or not isinstance(about.get("sha256"), str)
        ):
            return f"what it says of {name!r:.80}"
    if wrong := misshapen(manifest):
        return wrong
    if any(not leaf.isprintable() for leaf in _texts(manifest)):
        return "control characters"
    return ""


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _check_machine(archive: Path, manifest: Mapping[str, Any]) -> None:
    if manifest["host"] != platform.machine():
        raise BuildForeign(
            f"{archive} was built for {manifest['host']}, this machine is {platform.machine()}",
            hint="apex build, here or on a machine of this type",
        )
    if lacking := sorted(set(manifest.get("cpu_flags", ())) - cpu_flags()):
        shown = f"{', '.join(lacking[:6])}{', ...' if len(lacking) > 6 else ''}"
        raise BuildForeign(
            f"{archive} was built for a CPU with {shown}, which this machine's CPU lacks",
            hint="apex build --no-native --export FILE, on the machine where it was built",
        )


def _check_disk(root: Path, manifest: Mapping[str, Any]) -> None:
    n_bytes = sum(about["size"] for about in manifest["files"].values())
    check_room(root, n_bytes, "the unpacked build", hint="APEX_CACHE_DIR=FOLDER names a cache on another disk")


def _extract(
    archive: Path,
    tar: tarfile.TarFile,
    members: Mapping[str, tarfile.TarInfo],
    files: Mapping[str, Mapping[str, Any]],
    folder: Path,
    report: Report,
) -> None:
    for number, (name, about) in enumerate(files.items(), 1):
        path = folder / name
        digest = hashlib.sha256()
        with writing(folder), _content(tar, members[name]) as source:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                while block := source.read(1 << 20):
                    digest.update(block)
                    file.write(block)
        if digest.hexdigest() != about["sha256"]:
            raise HashMismatch(
                f"{archive}: {name} has the sha256 {digest.hexdigest()}, its lists say {about['sha256']}"
            )
        path.chmod(0o755 if name.startswith("bin/") else 0o644)
        report(Step("unpacking", number, len(files), "files"))


def _text(archive: Path, tar: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo], name: str) -> bytes:
    if members[name].size > _MAX_TEXT:
        raise ArchiveUnsafe(f"{archive.name}: {name} claims {members[name].size} bytes, more than {_MAX_TEXT}")
    with _content(tar, members[name]) as file:
        return file.read()


@contextmanager
def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[IO[bytes]]:
    file = tar.extractfile(member)
    assert file is not None  # it is a regular file
    with file:
        yield file


def _share_copies(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Make each library's other names (libllama.so, libllama.so.0) links to the longest again, as in the build."""
    names: dict[str, list[str]] = {}
    for name, about in files.items():
        if name.startswith("bin/") and ".so" in name:
            names.setdefault(about["sha256"], []).append(name)
    for same in names.values():
        first, *others = sorted(same, key=len, reverse=True)
        for name in others:
            (folder / name).unlink()
            (folder / name).symlink_to(Path(first).name)


def _try(archive: Path, folder: Path, targets: list[str]) -> None:
    """Start each tool: missing libraries or unsupported instructions show at once."""
    for name in targets:
        try:
            done = run_tool([folder / "bin" / name, "--help"], timeout=120, check=False)
            wrong = f"it ended with {done.returncode}{tail(done.lines[-3:])}" if not 0 <= done.returncode < 126 else ""
        except (ToolFailed, ToolTimeout) as error:
            wrong = error.message
        if wrong:
            raise BuildForeign(
                f"{archive}: {name} does not run on this machine: {wrong}", hint="apex build, on this machine"
            )
