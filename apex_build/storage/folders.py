"""Folders that appear whole or not at all, one writer at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from apex_build.progress import Report, Step, silent
from apex_build.storage.outputs import sync, sync_folder, writing


@contextmanager
def locked(folder: Path, report: Report = silent) -> Iterator[None]:
    """Hold the lock of `folder`: a file in `.locks/` beside it, since the folder may be replaced. Waits for another holder."""
    with writing(folder.parent):
        locks = folder.parent / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{folder.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report(Step(f"waiting for another apex that works on {folder.name}", 0))
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A path beside `final` to build a folder at; whatever is there when the block ends is removed. Call with the lock held."""
    mend(final)
    part = _part(final)
    try:
        with writing(final.parent):
            yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def put_in_place(part: Path, final: Path) -> None:
    """Rename `part` to `final`, on the disk before and after; what was there is kept until that has worked, then removed."""
    sync_folder(part)
    old = _old(final)
    if final.exists():
        final.rename(old)
    try:
        part.rename(final)
    except BaseException:
        if old.exists():
            old.rename(final)
        raise
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def mend(final: Path) -> None:
    """Undo what a killed run left: its half-made folder, and a replacement that stopped between its two renames."""
    shutil.rmtree(_part(final), ignore_errors=True)
    if _old(final).exists():
        if final.exists():
            shutil.rmtree(_old(final), ignore_errors=True)
        else:
            _old(final).rename(final)


def _part(final: Path) -> Path:
    return final.with_name(f".{final.name}.part")


def _old(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")
