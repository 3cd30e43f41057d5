"""Temporary folders for a `with` block, and removal of those that killed runs left behind."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from apex_build.errors import DiskTooSmall, OutputUnwritable

_PREFIX = "apex-build-"
_OURS = re.compile(rf"{_PREFIX}[a-z]+-\w{{8}}")


@contextmanager
def scratch_folder(what: str) -> Iterator[Path]:
    """A new and empty folder that only this user can use, removed with the block. `what`, in lower-case letters, is in
    its name.

    It is locked while this process lives: the kernel releases the lock however we end, so a later run can tell
    left-over folders from folders in use. Raises OutputUnwritable and DiskTooSmall, naming the folder for
    temporary files.
    """
    remove_left_over(tempfile.gettempdir())
    folder, handle = _locked_folder(what)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


@functools.lru_cache(maxsize=4)
def remove_left_over(root: str) -> int:
    """Remove what killed runs left in the folder for temporary files; returns how many. Once per process."""
    removed = 0
    try:
        entries = [entry for entry in os.scandir(root) if _OURS.fullmatch(entry.name)]
    except OSError:
        return 0
    for entry in entries:
        with suppress(OSError):  # another user's, in use, or already gone
            about = entry.stat(follow_symlinks=False)
            if (
                stat.S_ISDIR(about.st_mode)
                and about.st_uid == os.geteuid()
                and (handle := _lock(Path(entry.path))) is not None
            ):
                shutil.rmtree(entry.path, ignore_errors=True)
                os.close(handle)
                removed += 1
    return removed


def _locked_folder(what: str) -> tuple[Path, int]:
    while True:
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{what}-"))
        except OSError as error:
            hint = "TMPDIR=FOLDER names another folder for temporary files"
            message = f"{tempfile.gettempdir()}: no folder can be made there: {error.strerror}"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskTooSmall(message, hint=hint) from None
            raise OutputUnwritable(message, hint=hint) from None
        try:
            if (handle := _lock(folder)) is not None:
                return folder, handle
        except FileNotFoundError:
            continue  # another run took it for a left-over between the two steps
        except OSError:  # a file system without locks: no run will recognize it as left over
            return folder, os.open(folder, os.O_RDONLY | os.O_DIRECTORY)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None if another process has it. Raises FileNotFoundError if it is
    gone.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino == folder.stat().st_ino:
            return handle
    except BlockingIOError:
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None
