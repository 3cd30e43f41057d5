"""Outputs: never overwrite an input or a foreign file, are whole or absent, and are on disk before success is reported.

The steps of whatever writes: `check_place`, `check_apart` (inputs), `check_free` (what is there already), `check_room`, then
`locked`, a part file beside the final name (`new_part`), verification by who wrote it, and `put`, which is fsync, rename, fsync.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apex_build.errors import ApexError, ConversionFailed, DiskTooSmall, OutputUnwritable, ToolFailed, ToolKilled
from apex_build.near import near_folder

MANIFEST, LOG = ".json", ".log"  # suffixes of the files beside an output
ROOM = 64 << 20  # bytes that stay free beyond what is written
_MANY = 200  # files
_ADDED = len("..json.12345678.part")  # what the longest of the names beside an output adds to its own
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_LOG_START = re.compile(rb"\$ '?/")  # a command line of native/run.py
_OTHER_NAME = "give another name with -o"


# --- before anything is done --------------------------------------------------------------------------------------------
def beside(out: Path, suffix: str) -> Path:
    """The file that goes with an output: `out` + .json, its manifest, or + .log."""
    return out.with_name(out.name + suffix)


def work_folder(out: Path) -> Path:
    """Where a long run keeps what it has so far."""
    return out.with_name(f".{out.name}.work")


def with_manifest_and_log(out: Path) -> tuple[Path, ...]:
    """An output, and what is written beside it."""
    return out, beside(out, MANIFEST), beside(out, LOG)


def check_place(out: Path, hint: str = _OTHER_NAME) -> None:
    """Raises OutputUnwritable where `out` could not be put in place in the end."""
    folder = out.parent
    if out.is_dir():
        raise OutputUnwritable(f"{out} is a folder, expected the name of a file", hint=hint)
    if not folder.is_dir():
        raise OutputUnwritable(f"{folder}: no such folder{near_folder(folder)}", hint=f"mkdir -p {shlex.quote(str(folder))}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputUnwritable(f"{folder}: the folder cannot be written", hint=hint)
    if len(os.fsencode(out.name)) + _ADDED > (longest := os.pathconf(folder, "PC_NAME_MAX")):
        raise OutputUnwritable(f"{out.name}: the name is too long, there is room for {longest - _ADDED} bytes", hint=hint)
    if out.exists() and not out.is_file():
        raise OutputUnwritable(f"{out} is not a regular file", hint=hint)


def check_apart(written: Iterable[Path], inputs: Iterable[Path], hint: str = _OTHER_NAME) -> None:
    """Raises OutputUnwritable where something that is to be written is an input, under whatever name or link.

    No `--force` lifts this. An input that is not there, or a folder, is passed over: name the files in it.
    """
    there = {_inode(path): path for path in written if path.exists()}
    if there:
        for given in inputs:
            if given.is_file() and (same := there.get(_inode(given))):
                what = "the input itself" if same.absolute() == given.absolute() else f"the input {given}"
                raise OutputUnwritable(f"{same} is {what}, and would be overwritten", hint=hint)


def check_free(out: Path, made_by: str, *, force: bool = False, replace: bool = False) -> None:
    """Raises OutputUnwritable where what is at `out`, or beside it, may not be replaced.

    `made_by` is a key that the manifests of this verb have. With `replace` its earlier outputs may be overwritten, with `force`
    anything but inputs.
    """
    if force:
        return
    manifest = beside(out, MANIFEST)
    found = manifest_of(out, made_by)
    if out.exists():
        if found is None or found.get("bytes", found.get("size")) != out.stat().st_size:
            _refuse(out, "exists, and is not an output of this command")
        if not replace:
            _refuse(out, "exists and was made from something else")
    if manifest.exists() and found is None:
        _refuse(manifest, f"exists, and is not the manifest of an earlier {out.name}")
    log = beside(out, LOG)
    if log.exists() and not _is_log(log):
        _refuse(log, f"exists, and is not the log of an earlier {out.name}")


def check_text_free(out: Path, text: bytes, *, force: bool = False) -> None:
    """For an output without a manifest: raises OutputUnwritable where there is another file than the one to be written."""
    if not force and out.exists() and not (out.stat().st_size == len(text) and out.read_bytes() == text):
        _refuse(out, "exists, and holds something else")


def manifest_of(out: Path, made_by: str) -> dict[str, Any] | None:
    """The manifest beside `out`, if it is one of the verb whose manifests have the key `made_by`."""
    try:
        found = json.loads(beside(out, MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and made_by in found and isinstance(found.get("sha256"), str) else None


def check_room(folder: Path, n_bytes: int, what: str, *, before: int = 0, hint: str | None = None, spare: int = ROOM) -> None:
    """Raises DiskTooSmall where `folder` has no room for `n_bytes` of `what`, after `before` bytes of other files."""
    free, needed = shutil.disk_usage(existing(folder)).free, before + n_bytes + spare
    if free < needed:
        after = f" after {amount(before)} of other files" if before else ""
        raise DiskTooSmall(
            f"{folder}: {amount(free)} free, expected {amount(needed)}: {what} takes {amount(n_bytes)}{after}, "
            f"and {amount(spare)} are to stay free",
            hint=hint or "free some space, or write to another disk with -o",
        )


def amount(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def existing(folder: Path) -> Path:
    """The folder, or where it is still to be made the nearest one above it."""
    return next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), Path("/"))


# --- while it is written ------------------------------------------------------------------------------------------------
@contextmanager
def locked(out: Path, *, wait: bool = False) -> Iterator[None]:
    """One writer of `out` at a time, whichever cache it uses: the lock lies beside the output and goes with the run.

    Part files that a killed run left are removed. Raises OutputUnwritable where another run has it, unless `wait`.
    """
    path = out.with_name(f".{out.name}.lock")
    with writing(path):
        handle = _acquire(path, wait)
    if handle is None:
        raise OutputUnwritable(
            f"{out} is being written by another run of apex", hint="wait until it has ended, or give another name with -o"
        )
    try:
        _remove_parts(out)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever waits for it looks whether it is still the one there
        os.close(handle)


@contextmanager
def new_part(out: Path) -> Iterator[Path]:
    """An empty file beside `out`, of a name that nothing else has, to write to; removed when the block ends, unless `put`."""
    with writing(out):
        handle, name = tempfile.mkstemp(prefix=f".{_plain(out)}.", suffix=".part", dir=out.parent)
        os.close(handle)
    part = Path(name)
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)
        _of_tool(part).unlink(missing_ok=True)


def _of_tool(part: Path) -> Path:
    """Where llama-quantize itself writes to before it renames: it stays where the tool was killed."""
    return part.with_name(f"{part.name}.part")


@contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """A path beside `out` to write to; put in place when the block ends well, removed when it does not."""
    with new_part(out) as part:
        try:
            yield part
        except OSError as error:
            raise _refusal(error, out, own=(None, str(part), str(out))) from None
        put(part, out)


def put(part: Path, out: Path) -> None:
    """Rename a finished file to its final name, with the permissions that a new file gets: on the disk before and after."""
    with writing(out):
        part.chmod(0o666 & ~_umask())
        sync(part)
        part.replace(out)
        sync(out.parent)


@contextmanager
def tool_writing(part: Path, out: Path, n_bytes: int) -> Iterator[None]:
    """While a tool writes `part`, of `n_bytes` in the end: where it fails and the disk has no room for the rest, that is why.

    Most of the tools do not say so themselves. Raises DiskTooSmall then, instead of the tool's error.
    """
    try:
        yield
    except (ConversionFailed, ToolFailed, ToolKilled) as error:
        written = sum(path.stat().st_size for path in (part, _of_tool(part)) if path.exists())
        if written + (free := shutil.disk_usage(out.parent).free) >= n_bytes:
            raise
        raise DiskTooSmall(
            f"{out}: the disk is full: {amount(free)} free in {out.parent}, after {amount(written)} of {amount(n_bytes)}; "
            f"{error.message}",
            hint=f"df -h {shlex.quote(str(out.parent))}",
        ) from None


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EROFS):  # a file system that cannot
            raise
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Bring all of a folder to the disk: a few files one by one, of many the whole file system is told once."""
    paths = [path for path in (folder, *folder.rglob("*")) if not path.is_symlink()]
    if len(paths) > _MANY:
        os.sync()
        return
    for path in paths:
        sync(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says about a full disk or a read-only folder into errors for a person, which name the file."""
    try:
        yield
    except OSError as error:
        raise _refusal(error, path) from None


def _refusal(error: OSError, path: Path, own: tuple[str | None, ...] | None = None) -> ApexError | OSError:
    """`own`: names that stand for `path`; an error about another file is not about the writing, and stays as it is."""
    if own is not None and error.filename not in own and error.errno not in _FULL:
        return error
    name = path if own is not None or not error.filename else error.filename
    if error.errno in _FULL:
        why = "the disk is full" if error.errno != errno.EFBIG else "a file may not be so large"
        folder = existing(Path(name).parent)
        return DiskTooSmall(f"{name}: {why}: {error.strerror}", hint=f"df -h {shlex.quote(str(folder))}")
    if error.errno in _REFUSED:
        return OutputUnwritable(f"{name} cannot be written: {error.strerror}")
    return error


def _refuse(path: Path, why: str) -> None:
    raise OutputUnwritable(f"{path} {why}", hint="give another name with -o, or --force to replace it")


def _is_log(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _LOG_START.match(file.read(8)) is not None or path.stat().st_size == 0
    except OSError:
        return False


def _inode(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _acquire(path: Path, wait: bool) -> int | None:
    """An open handle with the lock on `path`; None where another run has it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                raise
            return handle  # a file system without locks: better than no run at all
        except BaseException:
            os.close(handle)
            raise
        try:
            same = os.path.samestat(os.fstat(handle), path.stat())
        except FileNotFoundError:
            same = False
        if same:
            return handle
        os.close(handle)  # of a run that has just ended


def _remove_parts(out: Path) -> None:
    name = re.compile(rf"\.{re.escape(_plain(out))}\.[a-z0-9_]{{8}}\.part")
    for path in out.parent.iterdir():
        if name.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _plain(out: Path) -> str:
    """Its name without braces: llama.cpp's converter takes those for a template."""
    return out.name.replace("{", "%7B").replace("}", "%7D")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
