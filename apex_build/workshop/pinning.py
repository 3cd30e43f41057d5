"""Add a pin: a release of the package, or a commit of upstream's git. Move a pin to another one that is green."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

from apex_build import places
from apex_build.errors import DownloadFailed, HashMismatch, OutputUnwritable, PinUnknown, SeriesUnfit, TreeEdited
from apex_build.fetching.download import offered_sha256
from apex_build.progress import Report, Step, silent
from apex_build.source.applied import unsaved_work
from apex_build.source.pins import Pin, load_pin
from apex_build.source.sdist import commit_of, download_sdist, read_archive
from apex_build.source.series import read_series, verb
from apex_build.source.tree import some, tree_path
from apex_build.source.tree_digest import digest_of
from apex_build.source.upstream import upstream_files
from apex_build.storage.disk import writing
from apex_build.storage.folders import new_folder, put_in_place
from apex_build.storage.locks import locked
from apex_build.storage.outputs import whole_file
from apex_build.workshop.overview import overview

PACKAGE = "llama-cpp-python"
FOLDER = "vendor/llama.cpp"
_COMMIT = re.compile(r"[0-9a-f]{40}")


def pin_file(name: str, given: Path | None = None) -> Path:
    """The file for a new pin: beside the others in a checkout, else in the current folder. Raises OutputUnwritable."""
    path = given or (places.data_root() / "vendor" / f"{name}.toml" if places.in_checkout() else Path(f"{name}.toml"))
    if path.exists():
        raise OutputUnwritable(f"{path} exists", hint="give the new pin another name, or another file with -o")
    return path


def add_release(name: str, version: str, path: Path, *, commit: str | None = None, report: Report = silent) -> Pin:
    """Pin a release of the package: fetch it once, and record its sha256.

    The commit is the one that the archive names, or `commit`. Raises DownloadFailed, ArchiveUnsafe, HashMismatch.
    """
    file = f"{PACKAGE.replace('-', '_')}-{version}.tar.gz"
    requirement = f"{PACKAGE}=={version}"
    report(Step(f"looking for {file}", 0))
    pin = Pin(name, commit or "0" * 40, _repository(), requirement, file, offered_sha256(requirement, file), FOLDER, "")
    archive = download_sdist(pin, report)
    said = commit_of(archive, FOLDER)
    if commit is None and said is None:
        raise DownloadFailed(f"{file} does not name the commit of its llama.cpp", hint="give it: apex pin add --commit")
    if commit and said and commit != said:
        raise HashMismatch(f"{file}: expected commit {commit}, found {said}", hint="leave out --commit")
    pin = replace(pin, commit=str(commit or said), size=archive.stat().st_size)
    report(Step(f"reading {file}", 0))
    return _write(replace(pin, tree_digest=digest_of(read_archive(archive, FOLDER, pin.commit))), path)


def add_commit(name: str, commit: str, path: Path, *, repository: str | None = None, report: Report = silent) -> Pin:
    """Pin a commit of a git repository. Raises DownloadFailed if it cannot be fetched."""
    if not _COMMIT.fullmatch(commit):
        raise PinUnknown(
            f"not a commit: expected 40 hexadecimal digits, found {commit!r}", hint="git ls-remote prints them"
        )
    pin = Pin(name, commit, repository or _repository(), "", "", "", "", "")
    return _write(replace(pin, tree_digest=digest_of(upstream_files(pin, None, report))), path)


def _repository() -> str:
    return load_pin().repository


def _write(pin: Pin, path: Path) -> Pin:
    shipped = path.resolve().parent == (places.data_root() / "vendor").resolve()
    with whole_file(path) as part:
        part.write_text(_text(pin, None if shipped else f"{path.stem}-patches"), encoding="utf-8")
    return load_pin(pin.name if shipped else str(path))


def _text(pin: Pin, patches: str | None) -> str:
    values = {"name": pin.name, "commit": pin.commit, "repository": pin.repository, "tree_digest": pin.tree_digest}
    values |= {} if patches is None else {"patches": patches}
    values |= {} if pin.file else {"origin": "git"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    if pin.file:
        keys = ("requirement", "file", "size", "sha256", "folder")
        lines += ["", "[sdist]", *(f"{key} = {json.dumps(getattr(pin, key))}" for key in keys)]
    if pin.serves:
        names = {field.name: sorted(getattr(pin.serves, field.name)) for field in fields(pin.serves)}
        lines += ["", "[serves]", *(f"{key} = {json.dumps(value)}" for key, value in names.items())]
    return "\n".join(lines) + "\n"


def bump(name: str, to: str, report: Report = silent) -> tuple[Pin, Pin]:
    """Make the pin `name` equal to the pin `to`, with its series; returns `name` before and after. Neither tree is
    touched.

    Raises SeriesUnfit unless `to` is green, TreeEdited if the tree of `name` has unsaved work.
    """
    old, new = load_pin(name), load_pin(to)
    if old == new:
        raise PinUnknown(f"{name} and {to} are the same pin", hint="apex pin list")
    report(Step(f"checking {new.name}", 0))
    if lacking := overview(new).lacking:
        raise SeriesUnfit(f"{new.name} is not green: {'; '.join(lacking)}", hint=verb(new, "status"))
    tree = tree_path(old)
    if tree.exists() and (work := unsaved_work(tree, read_series(old))):
        raise TreeEdited(f"{tree} has unsaved work: {some(work, '; ')}", hint=verb(old, "save"))
    target = old.own_file or places.data_root() / "vendor" / f"{old.name}.toml"
    final = old.patches_folder
    with writing(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
    with locked(final), new_folder(final) as part:
        if new.patches_folder.is_dir():
            shutil.copytree(new.patches_folder, part, symlinks=True)
        else:
            part.mkdir()
        put_in_place(part, final)
    patches = os.path.relpath(final, target.parent) if old.patches else None  # the series stays in its folder
    with whole_file(target) as part:
        part.write_text(_text(replace(new, name=old.name, serves=new.serves or old.serves), patches), encoding="utf-8")
    return old, load_pin(str(old.own_file) if old.own_file else old.name)
