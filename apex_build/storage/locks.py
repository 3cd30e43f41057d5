"""One writer at a time: a lock beside the output, held by the kernel as long as the process lives.

The file `.NAME.lock` lies beside NAME while it is held. The lock of a killed run is free: the kernel releases it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apex_build.errors import OutputUnwritable
from apex_build.progress import Report, Step, silent
from apex_build.storage.disk import writing
from apex_build.storage.mounts import lock_doubt, mount_of

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_log = logging.getLogger(__name__)
_doubted: set[str] = set()  # mount points that a warning was given for
_held = threading.local()  # the locks of `locked_in_thread`


class Busy(OutputUnwritable):
    """Another run has the lock."""


@contextmanager
def locked(path: Path, *, wait: bool = False, what: str = "", report: Report = silent) -> Iterator[None]:
    """Hold the lock of `path`, a file or a folder. Its folder is made if it is missing.

    If another run has the lock: with `wait`, report that (`what` is being waited for) and wait; otherwise raise
    Busy. If locks are not visible to other machines (some network file systems), warn once.
    """
    lock = lock_file(path)
    with writing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquire(lock, wait=False)
        if handle is None and wait:
            report(Step(f"waiting for {what or f'another apex run that uses {path.name}'}", 0))
            handle = _acquire(lock, wait=True)
    if handle is None:
        raise Busy(
            f"{path} is being written by another run of apex",
            hint="wait until it has finished, or give another name with -o",
        )
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # removed while held: a waiting run checks whether the file is still the same
        os.close(handle)


@contextmanager
def locked_in_thread(path: Path, *, what: str, report: Report = silent) -> Iterator[None]:
    """As `locked` with `wait`, but this thread may take the lock again while it has it."""
    held: set[Path] = _held.__dict__.setdefault("paths", set())
    if path in held:
        yield
        return
    with locked(path, wait=True, what=what, report=report):
        held.add(path)
        try:
            yield
        finally:
            held.discard(path)


def lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _acquire(path: Path, *, wait: bool) -> int | None:
    """An open handle with the lock on `path`; None if another run has it."""
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
            _warn(path, f"the file system has no locks ({error.strerror})")
            return handle  # better than not running at all
        except BaseException:
            os.close(handle)
            raise
        try:
            same = os.path.samestat(os.fstat(handle), path.stat())
        except FileNotFoundError:
            same = False
        if same:
            _warn(path, lock_doubt(mount_of(path)))
            return handle
        os.close(handle)  # of a run that has just ended


def _warn(path: Path, doubt: str) -> None:
    """Once for each file system."""
    if doubt:
        mount = mount_of(path)
        where = mount.point if mount else str(path.parent)
        if where not in _doubted:
            _doubted.add(where)
            _log.warning("%s: %s: let no other apex write the same files at the same time", where, doubt)
