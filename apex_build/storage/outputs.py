"""Outputs never overwrite an input or a foreign file, are whole or absent, and are on disk before success is reported.

Files with a manifest are made by artifacts.py, which uses this; `write_text` is for those without. All are written to a
part file beside the final name (`new_part`), then `put` there: fsync, rename, fsync.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from apex_build.errors import OutputUnwritable
from apex_build.near import near_folder
from apex_build.storage.disk import of_tool, refusal, sync, writing
from apex_build.storage.locks import locked

MANIFEST, LOG = ".json", ".log"  # suffixes of the files beside an output
_ADDED = len("..json.12345678.part")  # how much longer the longest name beside an output is
_LOG_START = re.compile(rb"\$ '?/")  # a command line of native/run.py
_OTHER_NAME = "give another name with -o"


# --- before anything is done ------------------------------------------------------------------------------------------
def beside(out: Path, suffix: str) -> Path:
    """The file that goes with an output: `out` + .json, its manifest, or + .log."""
    return out.with_name(out.name + suffix)


def work_folder(out: Path) -> Path:
    """Where a long run keeps unfinished work."""
    return out.with_name(f".{out.name}.work")


def with_manifest_and_log(out: Path) -> tuple[Path, ...]:
    """An output, and the files written beside it."""
    return out, beside(out, MANIFEST), beside(out, LOG)


def check_place(out: Path, hint: str = _OTHER_NAME) -> None:
    """Raises OutputUnwritable if `out` could not be put in place at the end."""
    folder = out.parent
    if out.is_dir():
        raise OutputUnwritable(f"{out} is a folder, expected the name of a file", hint=hint)
    if not folder.is_dir():
        raise OutputUnwritable(
            f"{folder}: no such folder{near_folder(folder)}", hint=f"mkdir -p {shlex.quote(str(folder))}"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputUnwritable(f"{folder}: the folder cannot be written", hint=hint)
    if len(os.fsencode(out.name)) + _ADDED > (longest := os.pathconf(folder, "PC_NAME_MAX")):
        raise OutputUnwritable(
            f"{out.name}: the name is too long, at most {longest - _ADDED} bytes are possible", hint=hint
        )
    if out.exists() and not out.is_file():
        raise OutputUnwritable(f"{out} is not a regular file", hint=hint)


def check_apart(written: Iterable[Path], inputs: Iterable[Path], hint: str = _OTHER_NAME) -> None:
    """Raises OutputUnwritable if a file to be written is an input, under any name or link.

    `--force` does not change this. Missing inputs and folders are skipped: name the files in them.
    """
    there = {_inode(path): path for path in written if path.exists()}
    if there:
        for given in inputs:
            if given.is_file() and (same := there.get(_inode(given))):
                what = "the input itself" if same.absolute() == given.absolute() else f"the input {given}"
                raise OutputUnwritable(f"{same} is {what}, and would be overwritten", hint=hint)


def check_text_free(out: Path, text: bytes, *, force: bool = False) -> None:
    """For an output without a manifest: raises OutputUnwritable if a different file is already there."""
    if not force and out.exists() and not (out.stat().st_size == len(text) and out.read_bytes() == text):
        refuse(out, "exists, and holds something else")


# --- while it is written ----------------------------------------------------------------------------------------------
@contextmanager
def locked_output(out: Path, *, wait: bool = False) -> Iterator[None]:
    """The lock of `out`, for `whole_file`. Part files of killed runs are removed. See `locked`."""
    with locked(out, wait=wait):
        remove_parts(out)
        yield


def write_text(
    out: Path, text: bytes, inputs: Iterable[Path] = (), *, force: bool = False, hint: str = _OTHER_NAME
) -> None:
    """Write an output without a manifest, with all of the checks. Raises OutputUnwritable, DiskTooSmall."""
    check_place(out, hint)
    check_apart([out], inputs, hint)
    with locked_output(out):
        check_text_free(out, text, force=force)
        with whole_file(out) as part:
            part.write_bytes(text)


@contextmanager
def new_part(out: Path) -> Iterator[Path]:
    """An empty file beside `out` with a unique name, to write to; removed when the block ends, unless `put`."""
    with writing(out):
        handle, name = tempfile.mkstemp(prefix=f".{_plain(out)}.", suffix=".part", dir=out.parent)
        os.close(handle)
    part = Path(name)
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)
        of_tool(part).unlink(missing_ok=True)


@contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """A path beside `out` to write to; put in place when the block succeeds, else removed."""
    with new_part(out) as part:
        try:
            yield part
        except OSError as error:
            raise refusal(error, out, own=(None, str(part), str(out))) from None
        put(part, out)


def put(part: Path, out: Path) -> None:
    """Rename a finished file to its final name, with a new file's permissions; synced before and after."""
    with writing(out):
        part.chmod(0o666 & ~_umask())
        sync(part)
        part.replace(out)
        sync(out.parent)


def refuse(path: Path, why: str) -> NoReturn:
    raise OutputUnwritable(f"{path} {why}", hint="give another name with -o, or --force to replace it")


def is_log(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _LOG_START.match(file.read(8)) is not None or path.stat().st_size == 0
    except OSError:
        return False


def _inode(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def remove_parts(out: Path) -> None:
    """Remove part files of killed runs: they may be many GB. Call with the lock held."""
    name = re.compile(rf"\.{re.escape(_plain(out))}\.[a-z0-9_]{{8}}\.part(\.part)?")
    for path in out.parent.iterdir():
        if name.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _plain(out: Path) -> str:
    """Its name without braces: llama.cpp's converter takes braces for a template."""
    return out.name.replace("{", "%7B").replace("}", "%7D")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
