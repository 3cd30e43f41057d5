"""Unfinished work of an interrupted run: a folder beside the output, from which the same command resumes."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from apex_build.errors import ApexError, OutputUnwritable
from apex_build.places import unfinished
from apex_build.storage.artifacts import Artifact
from apex_build.storage.digests import sha256_json
from apex_build.storage.disk import writing
from apex_build.storage.json_files import read_json, write_json
from apex_build.storage.outputs import work_folder

IDENTITY = "identity.json"


@contextmanager
def unfinished_work(
    artifact: Artifact,
    files: Mapping[str, bytes],
    worth_keeping: Callable[[Path], bool],
    *,
    fresh: bool = False,
    noted: bool = True,
) -> Iterator[Path]:
    """The artifact's work folder, with `files` in it: as an earlier run of the same work left it, or a new one
    (always if `fresh`).

    It is removed when the block succeeds; otherwise it is kept if `worth_keeping`. A note in the cache tells `apex
    cache` about it, unless it is inside of another work folder (not `noted`). Call with the lock held.
    """
    work, note = work_folder(artifact.out), note_of(artifact.out)
    with contextlib.suppress(OSError, ApexError):  # only for `apex cache`: not essential
        if noted:
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, str(artifact.out.absolute()))
    with writing(work):
        _prepare(work, artifact.identity, files, fresh=fresh)
    try:
        yield work
    except BaseException:
        if not worth_keeping(work):
            remove_work(artifact.out)
        raise
    remove_work(artifact.out)


def note_of(out: Path) -> Path:
    return unfinished() / f"{sha256_json(str(out.absolute()))[:32]}.json"


def remove_work(out: Path) -> None:
    shutil.rmtree(work_folder(out), ignore_errors=True)
    note_of(out).unlink(missing_ok=True)


def files_in(work: Path) -> Iterator[Path]:
    return (path for path in work.rglob("*") if path.is_file())


def check_work(out: Path, *, force: bool = False) -> None:
    """Raises OutputUnwritable if something else has the work folder's name."""
    work = work_folder(out)
    if force or not (work.exists() or work.is_symlink()) or ((work / IDENTITY).is_file() and not work.is_symlink()):
        return
    if work.is_symlink() or not work.is_dir() or any(work.iterdir()):
        raise OutputUnwritable(
            f"{work} exists and was not left by an unfinished run",
            hint="give another name with -o, or --force to replace it",
        )


def _prepare(work: Path, identity: str, files: Mapping[str, bytes], *, fresh: bool) -> None:
    try:
        same = not fresh and read_json(work / IDENTITY) == identity and all((work / name).is_file() for name in files)
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_bytes(content)
        write_json(work / IDENTITY, identity)
