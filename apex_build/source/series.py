"""The patch series: patches/llama.cpp/<pin>/series and the patch files it lists.

Apply them to the tree as commits, and save commits as patch files.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from apex_build.errors import PatchConflict, TreeEdited
from apex_build.progress import Report, silent
from apex_build.source.applied import find_applied, record, remember
from apex_build.source.git import git
from apex_build.source.patch import ApplyFailed, Patch, commit_patches, format_patches, merges_between, read_patch
from apex_build.source.pins import Pin
from apex_build.source.tree import edits, fetch_command, refuse_under_way, require_tree, some
from apex_build.storage.folders import new_folder, put_in_place
from apex_build.storage.locks import locked

State = Literal["applied", "changed", "missing", "conflict"]
_PATCH_NAME = re.compile(r"[0-9]{4}-[^/\\\s]+\.patch")


@dataclass(frozen=True)
class PatchState:
    """A patch of the series. `changed`: the tree has a commit with this subject but other content; `missing`: not
    applied, but it would apply; `conflict`: does not apply, `detail` names file and hunk. `commit`: its commit in the
    tree.
    """

    name: str
    subject: str
    state: State
    commit: str | None = None
    detail: str | None = None


@dataclass(frozen=True)
class SeriesStatus:
    """`unsaved`: (commit, subject) in the tree that are not in the series; `edited`, `untracked`: uncommitted edits,
    new files; `unlisted`: patch files beside the series that it does not list; `complete`: the tree is the base with
    the series, in order.
    """

    patches: tuple[PatchState, ...]
    unsaved: tuple[tuple[str, str], ...]
    edited: tuple[str, ...]
    untracked: tuple[str, ...]
    unlisted: tuple[str, ...]
    complete: bool


@dataclass(frozen=True)
class Saved:
    """What `save_series` did: names of the patches now in the series, and of the files changed or removed."""

    folder: Path
    names: tuple[str, ...]
    written: tuple[str, ...]
    removed: tuple[str, ...]


def read_series(pin: Pin) -> tuple[Patch, ...]:
    """The patches that the file `series` lists, in order; none if it is missing. Raises PatchConflict if one is not a
    patch.
    """
    series = pin.patches_folder / "series"
    patches: list[Patch] = []
    for name in _names(series):
        try:
            content = (pin.patches_folder / name).read_bytes() if _PATCH_NAME.fullmatch(name) else None
        except OSError as error:
            raise PatchConflict(f"cannot read {name}, listed in {series}: {error.strerror}") from None
        if content is None:
            raise PatchConflict(
                f"{series} lists {name!r}: expected a file beside it with a name like NNNN-what-it-does.patch"
            )
        if any(patch.name == name for patch in patches):
            raise PatchConflict(f"{series} lists {name} twice")
        patches.append(read_patch(name, content))
    return tuple(patches)


def series_digest(pin: Pin) -> str:
    """sha256 over the sha256 of each patch of the series, in order, a line each: identifies what is applied to the
    pin's tree.
    """
    digest = hashlib.sha256()
    for patch in read_series(pin):
        digest.update(f"{patch.sha256}\n".encode())
    return digest.hexdigest()


def series_status(pin: Pin) -> SeriesStatus:
    """Compare tree and series. Raises SourceMissing, or TreeEdited if apex did not make the tree."""
    path = require_tree(pin)
    series = read_series(pin)
    found = find_applied(path, series)
    changed = {
        patch.subject: commit for commit, patch in found.commits.items() if commit not in found.commit_of.values()
    }
    states: list[PatchState] = []
    head = found.head
    for patch in series:
        if commit := found.commit_of.get(patch.name):
            states.append(PatchState(patch.name, patch.subject, "applied", commit))
        elif patch.subject in changed:
            states.append(PatchState(patch.name, patch.subject, "changed", changed[patch.subject]))
        else:
            try:
                head = commit_patches(path, head, [patch])[-1]
                states.append(PatchState(patch.name, patch.subject, "missing"))
            except ApplyFailed as error:
                states.append(PatchState(patch.name, patch.subject, "conflict", detail=error.reason))
    edited, untracked = edits(path)
    unlisted = sorted({file.name for file in pin.patches_folder.glob("*.patch")} - {patch.name for patch in series})
    return SeriesStatus(tuple(states), found.unsaved, edited, untracked, tuple(unlisted), found.complete)


def apply_series(pin: Pin, report: Report = silent) -> tuple[str, ...]:
    """Apply the series to the base; returns the names of the patches that were applied now (none if all were).

    Unsaved commits stay, and missing patches are applied on top. Raises PatchConflict naming the patch, the file and
    the hunk, and TreeEdited if it had to touch a file with uncommitted edits or drop a commit that is not in the
    series; in both cases the tree is left unchanged.
    """
    with locked(require_tree(pin), wait=True, report=report):
        return apply_to(pin, require_tree(pin))


def apply_to(pin: Pin, path: Path) -> tuple[str, ...]:
    """`apply_series` for a tree at `path`; call with the lock held."""
    refuse_under_way(path)
    series = read_series(pin)
    found = find_applied(path, series)
    if found.complete:
        return ()
    edited, _untracked = edits(path)
    if edited:
        raise TreeEdited(
            f"{path} has uncommitted edits in {some(edited)}; applying patches could lose them",
            hint=f"git -C {path} commit -a, then {verb(pin, 'apply')}",
        )
    done = [patch.name in found.commit_of for patch in series]
    if not found.unsaved:
        start, todo = found.base, list(series)
    elif len(found.unsaved) == len(found.commits) - sum(done) and done == sorted(done, reverse=True):
        start, todo = found.head, [patch for patch in series if patch.name not in found.commit_of]
    else:
        named = some([f"{commit[:9]} {subject!r}" for commit, subject in found.unsaved])
        raise TreeEdited(
            f"{path} has commits that are not in the series and block applying it: {named}",
            hint=f"{verb(pin, 'save')} adds them to the series; {verb(pin, 'status')} shows both",
        )
    try:
        made = commit_patches(path, start, todo)
    except ApplyFailed as error:
        raise PatchConflict(
            f"{pin.patches_folder / error.patch.name} does not apply to {path}: {error.reason}",
            hint=f"{fetch_command(pin)} --no-patches, apply it there with git am --reject, commit, then "
            f"{verb(pin, 'save')}",
        ) from None
    remember(path, made={commit: patch.sha256 for commit, patch in zip(made, todo, strict=True)})
    move_to(path, found.head, made[-1] if made else start)
    return tuple(patch.name for patch in todo if patch.name not in found.commit_of)


def move_to(path: Path, old: str, new: str) -> None:
    """Move the branch and the (clean) working tree to `new`, touching only files that differ."""
    try:
        git(path, "reset", "--quiet", "--keep", new)
    except BaseException:
        git(path, "reset", "--quiet", "--keep", old)
        raise


def save_series(pin: Pin, report: Report = silent, *, force: bool = False) -> Saved:
    """Save the tree's commits as the series; the same commits always give the same bytes.

    Raises TreeEdited for commits that a patch cannot represent (a merge, an empty commit, a message that mail would
    change), while a git operation is in progress, and if saving would drop a patch that this tree never had or (unless
    `force`) overwrite another version.
    """
    path = require_tree(pin)
    with locked(path, wait=True, report=report):
        return save_from(pin, path, force=force)


def save_from(pin: Pin, path: Path, *, force: bool = False) -> Saved:
    """`save_series` for a tree at `path`; call with the lock held."""
    refuse_under_way(path)
    series = read_series(pin)
    found = find_applied(path, series)
    for commit in merges_between(path, found.base, found.head):
        raise TreeEdited(
            f"{path}: commit {commit[:9]} is a merge; a series must be linear",
            hint=f"git -C {path} rebase {found.base[:9]}",
        )
    had, subjects = record(path).had, {patch.subject for patch in found.commits.values()}
    for patch in series:
        if not (patch.name in found.commit_of or patch.sha256 in had or patch.subject in subjects):
            raise TreeEdited(
                f"saving would drop {patch.name}, which this tree never had",
                hint=f"{verb(pin, 'apply')}, then {verb(pin, 'save')}",
            )
    for patch in series:
        if not (patch.name in found.commit_of or patch.sha256 in had or force):
            raise TreeEdited(
                f"{pin.patches_folder / patch.name} has changed since it was applied to this tree; saving would "
                "overwrite it",
                hint=f"keep a copy of it, then apex patch save --force{pin.option}",
            )
    patches = list(found.commits.values())
    _read_back(path, found.base, found.head, patches)
    saved = _write(pin, patches)
    remember(path, had=[patch.sha256 for patch in (*series, *patches)])
    return saved


def verb(pin: Pin, name: str) -> str:
    """The command line of a patch verb, for a hint."""
    return f"apex patch {name}{pin.option}"


def _names(series: Path) -> list[str]:
    try:
        text = series.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise PatchConflict(f"cannot read {series}: {error}") from None
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _read_back(path: Path, base: str, head: str, patches: Sequence[Patch]) -> None:
    """Check that saving loses nothing: applied to the base, the patches must give the same files and patches again."""
    for patch in patches:
        if not patch.diff:
            raise TreeEdited(
                f"{path}: the commit {patch.subject!r} changes nothing, so it cannot be saved as a patch",
                hint=f"git -C {path} rebase apex-base",
            )
    try:
        made = commit_patches(path, base, patches)
    except ApplyFailed as error:
        raise TreeEdited(
            f"{path}: the commit {error.patch.subject!r} cannot be written as a patch: {error.reason}"
        ) from None
    end = made[-1] if made else base
    again = [patch.content for patch in format_patches(path, base, end).values()]
    for patch, content in zip(patches, again, strict=True):
        if patch.content != content:
            raise TreeEdited(
                f"{path}: the message of the commit {patch.subject!r} cannot be mailed: it contains a line `---` or a "
                "diff",
                hint=f"git -C {path} rebase -i {base[:9]}, and reword it",
            )
    if git(path, "rev-parse", f"{end}^{{tree}}") != git(path, "rev-parse", f"{head}^{{tree}}"):
        raise TreeEdited(
            f"{path}: the patches do not give the same files as the commits; did you change a file mode or a binary "
            "file?"
        )


def _write(pin: Pin, patches: Sequence[Patch]) -> Saved:
    """Replace the folder as a whole. Keep comments at the top of `series`, and files that are not patches."""
    final = pin.patches_folder
    old = {file.name: file.read_bytes() for file in sorted(final.glob("*.patch"))} if final.is_dir() else {}
    series = final / "series"
    text = series.read_text(encoding="utf-8") if series.is_file() else ""
    head = re.match(r"(?:[ \t]*(?:#[^\n]*)?\n)*", text)
    new = {patch.name: patch.content for patch in patches}
    listed = _names(series)
    if foreign := [name for name in new if name in old and name not in listed and old[name] != new[name]]:
        raise TreeEdited(
            f"refusing to overwrite {final / foreign[0]}: `series` does not list it, and its content differs",
            hint=f"give it another name: mv {final / foreign[0]} {final / foreign[0]}.mine",
        )
    written = tuple(name for name, content in new.items() if old.get(name) != content)
    removed = tuple(name for name in old if name not in new and name in listed)
    listing = (head[0] if head else "") + "".join(f"{name}\n" for name in new)
    if written or removed or listing != text:
        with locked(final), new_folder(final) as part:
            part.mkdir(parents=True)
            for file in final.iterdir() if final.is_dir() else ():
                if file.is_dir() and not file.is_symlink():
                    shutil.copytree(file, part / file.name, symlinks=True)
                elif file.name not in removed:
                    shutil.copy2(file, part / file.name, follow_symlinks=False)
            for name in written:
                (part / name).unlink(missing_ok=True)  # it may be a link
                (part / name).write_bytes(new[name])
            (part / "series").unlink(missing_ok=True)
            (part / "series").write_text(listing, encoding="utf-8")
            put_in_place(part, final)
    return Saved(final, tuple(new), written, removed)
