"""The disk: check for free space, make errors readable, and sync written files."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apex_build.errors import ApexError, ConversionFailed, DiskTooSmall, OutputUnwritable, ToolFailed, ToolKilled

ROOM = 64 << 20  # bytes to keep free in addition to the output
_MANY = 200  # files
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)


def check_room(
    folder: Path, n_bytes: int, what: str, *, before: int = 0, hint: str | None = None, spare: int = ROOM
) -> None:
    """Raises DiskTooSmall if `folder` has no room for `n_bytes` of `what`, after `before` bytes of other files."""
    free, needed = free_bytes(folder), before + n_bytes + spare
    if free < needed:
        after = f" after {amount(before)} of other files" if before else ""
        raise DiskTooSmall(
            f"{folder}: {amount(free)} free, expected {amount(needed)}: {what} takes {amount(n_bytes)}{after}"
            + (f", and {amount(spare)} must stay free" if spare else ""),
            hint=hint or "free some space, or write to another disk with -o",
        )


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that the folder is or would be on."""
    return shutil.disk_usage(existing(folder)).free


def disk_size(folder: Path) -> int:
    return shutil.disk_usage(existing(folder)).total


def amount(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def existing(folder: Path) -> Path:
    """The folder, or if it does not exist yet the nearest existing one above it."""
    return next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), Path("/"))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's errors about a full disk or a read-only folder into readable ones that name the file."""
    try:
        yield
    except OSError as error:
        raise refusal(error, path) from None


def refusal(error: OSError, path: Path, own: tuple[str | None, ...] | None = None) -> ApexError | OSError:
    """`own`: names that stand for `path`; errors about other files are returned unchanged."""
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


@contextmanager
def tool_writing(part: Path, out: Path, n_bytes: int) -> Iterator[None]:
    """While a tool writes `part`, of `n_bytes` in the end: if it fails and the disk has no room for the rest, blame
    the disk.

    Most tools do not report this themselves. Raises DiskTooSmall then, instead of the tool's error.
    """
    try:
        yield
    except (ConversionFailed, ToolFailed, ToolKilled) as error:
        written = sum(path.stat().st_size for path in (part, of_tool(part)) if path.exists())
        if written + (free := free_bytes(out.parent)) >= n_bytes:
            raise
        raise DiskTooSmall(
            f"{out}: the disk is full: {amount(free)} free in {out.parent}, after {amount(written)} of "
            f"{amount(n_bytes)}; "
            f"{error.message}",
            hint=f"df -h {shlex.quote(str(out.parent))}",
        ) from None


def of_tool(part: Path) -> Path:
    """Where llama-quantize writes before it renames: left behind if the tool is killed."""
    return part.with_name(f"{part.name}.part")


def sync(path: Path) -> None:
    """Sync a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EROFS):  # not supported by the file system
            raise
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Sync a whole folder to the disk: a few files one by one; for many, the whole file system at once."""
    paths = [path for path in (folder, *folder.rglob("*")) if not path.is_symlink()]
    if len(paths) > _MANY:
        os.sync()
        return
    for path in paths:
        sync(path)
