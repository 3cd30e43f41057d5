"""Folders that appear whole or not at all. Call these with the folder's lock held (see locks.py)."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apex_build.storage.disk import sync, sync_folder, writing

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A path beside `final` to build a folder at; whatever is there when the block ends is removed."""
    remove_left_over(final)
    part = _part(final)
    try:
        with writing(final.parent):
            yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def put_in_place(part: Path, final: Path) -> None:
    """Rename `part` to `final`, synced before and after. An existing folder changes places with it in one step.

    If the file system cannot do that (some network file systems), the old one is kept beside until the new one is in
    place: see `remove_left_over`.
    """
    sync_folder(part)
    if not final.exists():
        part.rename(final)
    elif not _exchange(part, final):
        old = _old(final)
        final.rename(old)
        try:
            part.rename(final)
        except BaseException:
            old.rename(final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    sync(final.parent)
    shutil.rmtree(part, ignore_errors=True)  # the previous one


def remove_left_over(final: Path) -> None:
    """Clean up after a killed run: its half-made folder, and a replacement that stopped between two renames."""
    shutil.rmtree(_part(final), ignore_errors=True)
    if _old(final).exists():
        if final.exists():
            shutil.rmtree(_old(final), ignore_errors=True)
        else:
            _old(final).rename(final)


def _exchange(one: Path, two: Path) -> bool:
    """Exchange two paths in one step. False if the system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):  # a C library without it
        return False
    return bool(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(two), _EXCHANGE) == 0)


def _part(final: Path) -> Path:
    return final.with_name(f".{final.name}.part")


def _old(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")
