"""Fetch a pinned tree from any of its three origins, and make it ready for a build."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from apex_build.errors import TreeEdited
from apex_build.progress import Report, silent
from apex_build.source.applied import unsaved_work
from apex_build.source.pins import Pin
from apex_build.source.sdist import check_sdist, download_sdist, read_archive
from apex_build.source.series import apply_to, read_series, series_status, verb
from apex_build.source.tree import (
    fetch_command,
    lay_out,
    require_tree,
    some,
    status,
    tree_path,
    under_way,
    verify_base,
    verify_clean,
)
from apex_build.source.upstream import upstream_files
from apex_build.storage.disk import writing
from apex_build.storage.folders import new_folder, put_in_place, remove_left_over
from apex_build.storage.locks import locked

Origin = Literal["pypi", "git", "archive"]


@dataclass(frozen=True)
class Fetched:
    """`laid_out` is False if the tree existed; `applied` names the patches that were applied now."""

    path: Path
    laid_out: bool
    applied: tuple[str, ...]


@dataclass(frozen=True)
class Verified:
    path: Path
    tree_digest: str
    files_clean: bool
    patches: tuple[str, ...]


def fetch(
    pin: Pin,
    *,
    origin: Origin = "pypi",
    archive: Path | None = None,
    repository: str | None = None,
    force: bool = False,
    patches: bool = True,
    report: Report = silent,
) -> Fetched:
    """Lay out the pin's tree at `tree_path(pin)`, verify it, and apply its series unless `patches` is False.

    An existing tree is kept, unless `force` is given or it was laid out for another digest. It is only replaced if no
    work would be lost (TreeEdited names the work). Also raises DownloadFailed, HashMismatch, ArchiveUnsafe,
    PatchConflict.
    """
    path = tree_path(pin)
    with locked(path, wait=True, report=report):
        remove_left_over(path)
        found = status(pin)
        if found.present and not force and not found.outdated:
            return Fetched(path, False, apply_to(pin, path) if patches else ())
        _refuse_loss(pin, path)
        with new_folder(path) as part:
            lay_out(pin, _files(pin, origin, archive, repository, report), part, report)
            applied = apply_to(pin, part) if patches else ()
            _refuse_loss(pin, path)  # fetching takes a while: check again
            put_in_place(part, path)
        return Fetched(path, True, applied)


def ensure_source(pin: Pin, report: Report = silent) -> Path:
    """The tree, ready for a build: fetched if it is missing, with its series applied if no work is lost by that.

    A tree with work in it (edits, commits not in the series, a rebase) is returned as it is: `tree_identity` tells
    builds apart.
    """
    path = tree_path(pin)
    with locked(path, wait=True, report=report):
        remove_left_over(path)
    found = status(pin)
    if not found.present:
        return fetch(pin, report=report).path
    if found.outdated:
        return path if unsaved_work(path, read_series(pin)) else fetch(pin, report=report).path
    series = series_status(pin)
    if series.complete or series.unsaved or series.edited or under_way(path):
        return path
    return fetch(pin, report=report).path


def verify(pin: Pin) -> Verified:
    """Check that the content of the base commit has the pin's digest, no file differs from HEAD, and the commits equal
    the series.

    Raises SourceMissing, HashMismatch, TreeEdited, PatchConflict.
    """
    path = require_tree(pin)
    digest = verify_base(pin, path)
    verify_clean(path)
    found = series_status(pin)
    if found.unsaved:
        names = ", ".join(f"{commit[:9]} {subject!r}" for commit, subject in found.unsaved)
        raise TreeEdited(f"{path} has commits that are not in the series: {names}", hint=verb(pin, "save"))
    if not found.complete:
        lacking = (
            ", ".join(patch.name for patch in found.patches if patch.state != "applied") or "the order of the series"
        )
        raise TreeEdited(f"the series is not fully applied in {path}: missing {lacking}", hint=fetch_command(pin))
    return Verified(path, digest, True, tuple(patch.name for patch in found.patches))


def _files(
    pin: Pin, origin: Origin, archive: Path | None, repository: str | None, report: Report
) -> Iterator[tuple[str, bytes]]:
    if origin == "git" or (archive is None and not pin.file):
        return upstream_files(pin, repository, report)
    if origin == "pypi" or archive is None:
        archive = download_sdist(pin, report)
    elif archive.name == pin.file:
        check_sdist(archive, pin)  # check a known file before opening it; any other is checked by its content
    return read_archive(archive, pin.folder, pin.commit)


def _refuse_loss(pin: Pin, path: Path) -> None:
    if not path.exists():
        return
    with writing(path):
        work = unsaved_work(path, read_series(pin))
    if work:
        raise TreeEdited(
            f"{path} has work that fetching again would lose: {some(work, '; ')}",
            hint=f"git -C {path} commit -a, then {verb(pin, 'save')}; or move the folder away",
        )


def further_files(pin: Pin, want: Callable[[str], bool], report: Report = silent) -> Iterator[tuple[str, bytes]]:
    """Files of the pinned commit that builds do not use, such as its tests: from the same verified archive, or from
    git.
    """
    if not pin.file:
        return upstream_files(pin, None, report, want)
    return read_archive(download_sdist(pin, report), pin.folder, pin.commit, want)
