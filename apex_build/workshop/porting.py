"""Port a series to another pin with three-way merges, which stop at a conflict and continue once it is resolved in git.

The patches are cherry-picked one by one onto the tree of the other pin, on top of its own series. The merge needs the
source that the patches were made for, so it is fetched into the tree's repository. The state of the port is kept inside
its `.git`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from apex_build.errors import GitFailed, PatchConflict, TreeEdited
from apex_build.progress import Report, Step, silent
from apex_build.source.applied import find_applied
from apex_build.source.git import failed, git, run
from apex_build.source.patch import COMMITTER, ApplyFailed, Patch, commit_patches
from apex_build.source.pins import Pin
from apex_build.source.series import Saved, apply_to, read_series, save_from, verb
from apex_build.source.tree import BASE, edits, refuse_under_way, require_tree, some, under_way
from apex_build.storage.json_files import read_json, write_json
from apex_build.storage.locks import locked
from apex_build.storage.scratch import scratch_folder
from apex_build.workshop.standing import Standing, find_patch, stand

ABORTED = "refs/apex/port-aborted"  # the state of the tree when a port was aborted
_THEIR_BASE, _THEIR_SERIES = "refs/apex/port-base", "refs/apex/port-series"


@dataclass(frozen=True)
class Port:
    """`start`: HEAD of the tree before the port; `head`: HEAD before the next patch; `todo`: (commit, patch).

    `done`, `upstream`, `skipped`: names of patches ported, already in the source, and skipped.
    """

    origin: str
    start: str
    head: str
    todo: tuple[tuple[str, str], ...]
    done: tuple[str, ...] = ()
    upstream: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ported:
    """`saved` is None if there was nothing to port."""

    port: Port
    saved: Saved | None


def preview(onto: Pin, origin: Pin, given: Sequence[str] = ()) -> list[Standing]:
    """How the patches to port apply to the other pin's tree as it is, without merging."""
    path = require_tree(onto)
    return list(stand(path, [patch for _, patch in _wanted(onto, origin, given)], "HEAD"))


def port(onto: Pin, origin: Pin, given: Sequence[str] = (), report: Report = silent) -> Ported:
    """Port the patches of `origin` whose subjects the series of `onto` lacks, or those `given`, and save them.

    Raises PatchConflict if git stops at a conflict, with what to do next; TreeEdited if the tree has unsaved work.
    """
    path = require_tree(onto)
    with locked(path, wait=True, report=report):
        refuse_under_way(path)
        if _file(path).exists():
            raise TreeEdited(f"a port is in progress in {path}", hint=_onward(onto))
        if names := (*edits(path)[0], *edits(path)[1]):
            raise TreeEdited(
                f"{path} has uncommitted edits: {some(names)}", hint=f"{verb(onto, 'new')}, or git stash -u"
            )
        if unsaved := find_applied(path, read_series(onto)).unsaved:
            named = some([repr(subject) for _, subject in unsaved])
            raise TreeEdited(f"{path} has commits that are not in the series: {named}", hint=verb(onto, "save"))
        apply_to(onto, path)
        head = git(path, "rev-parse", "HEAD")
        wanted = _wanted(onto, origin, given)
        if not wanted:
            return Ported(Port(origin.name, head, head, ()), None)
        commits = _their_commits(path, origin)
        state = Port(origin.name, head, head, tuple((commits[number], patch.name) for number, patch in wanted))
        return _go_on(onto, path, state, report)


def continue_port(onto: Pin, report: Report = silent, *, skip: bool = False) -> Ported:
    """Continue after a conflict was resolved; `skip`: leave out the patch that git stopped at. Raises as `port`."""
    path = require_tree(onto)
    with locked(path, wait=True, report=report):
        state = _read(onto, path)
        name = state.todo[0][1]
        if under_way(path) == "cherry-pick":
            if skip or not _conclude(onto, path, name):
                _quietly(path, "cherry-pick", "--skip")
                state = _next(state, "skipped" if skip else "upstream", state.head)
            else:
                state = _next(state, "done", git(path, "rev-parse", "HEAD"))
        else:
            refuse_under_way(path)
            head = git(path, "rev-parse", "HEAD")  # the user ended the cherry-pick, with or without a commit
            state = _next(state, "done" if head != state.head else "skipped", head)
        return _go_on(onto, path, state, report)


def abort_port(onto: Pin, report: Report = silent) -> str:
    """Restore the tree; returns a commit of its previous content, including half-resolved files."""
    path = require_tree(onto)
    with locked(path, wait=True, report=report):
        state = _read(onto, path)
        with scratch_folder("index") as temp:
            index = {"GIT_INDEX_FILE": str(temp / "index")}
            git(path, "read-tree", "HEAD", env=index)
            git(path, "add", "--all", "--", ".", env=index)
            tree = git(path, "write-tree", env=index)
        who = {
            **COMMITTER,
            "GIT_AUTHOR_NAME": COMMITTER["GIT_COMMITTER_NAME"],
            "GIT_AUTHOR_EMAIL": COMMITTER["GIT_COMMITTER_EMAIL"],
        }
        kept = git(path, "commit-tree", tree, "-p", "HEAD", feed=b"a port that was given up\n", env=who)
        git(path, "update-ref", ABORTED, kept)
        if under_way(path) == "cherry-pick":
            _quietly(path, "cherry-pick", "--abort")
        git(path, "reset", "--quiet", "--merge", state.start)
        _end(path)
        return kept


def _wanted(onto: Pin, origin: Pin, given: Sequence[str]) -> list[tuple[int, Patch]]:
    """(index in the series of `origin`, patch)."""
    series = read_series(origin)
    if given:
        named = [find_patch(series, one) for one in given]
        return [(number, patch) for number, patch in enumerate(series) if patch in named]
    there = {patch.subject for patch in read_series(onto)}
    return [(number, patch) for number, patch in enumerate(series) if patch.subject not in there]


def _their_commits(path: Path, origin: Pin) -> list[str]:
    """Fetch the source of `origin` into this repository and commit its patches on it: a merge needs all three sides."""
    other = require_tree(origin)
    git(path, "fetch", "--quiet", "--no-tags", "--no-write-fetch-head", str(other), f"+refs/tags/{BASE}:{_THEIR_BASE}")
    try:
        commits = commit_patches(path, git(path, "rev-parse", f"{_THEIR_BASE}^{{commit}}"), read_series(origin))
    except ApplyFailed as error:
        raise PatchConflict(
            f"{origin.patches_folder / error.patch.name} does not apply to its own pin {origin.name}: {error.reason}",
            hint=verb(origin, "status"),
        ) from None
    git(path, "update-ref", _THEIR_SERIES, commits[-1])
    return commits


def _go_on(onto: Pin, path: Path, state: Port, report: Report) -> Ported:
    total = len(state.todo) + len(state.done) + len(state.upstream) + len(state.skipped)
    while state.todo:
        commit, name = state.todo[0]
        write_json(_file(path), asdict(state))
        report(Step(f"porting to {onto.name}", total - len(state.todo), total, "patches", detail=name))
        done = run(path, "-c", "merge.conflictStyle=diff3", "cherry-pick", commit, env=COMMITTER)
        if done.returncode == 0:
            state = _next(state, "done", git(path, "rev-parse", "HEAD"))
        elif conflicts := _conflicts(path):
            raise _stopped(onto, path, state, conflicts)
        elif under_way(path) == "cherry-pick" and _same(path, "--cached"):
            _quietly(path, "cherry-pick", "--skip")  # the source already has all of it
            state = _next(state, "upstream", state.head)
        else:
            raise failed(f"git cherry-pick of {name} failed in {path}", done.stderr)
    saved = save_from(onto, path)
    _end(path)
    return Ported(state, saved)


def _conclude(onto: Pin, path: Path, name: str) -> bool:
    """Commit the resolved patch; False if no change is left of it. Raises PatchConflict if a conflict is unresolved."""
    if conflicts := _conflicts(path):
        raise _stopped(onto, path, _read(onto, path), conflicts)
    if not _same(path):
        names = git(path, "diff", "--name-only", "-z").split("\0")
        raise TreeEdited(
            f"{path} has unstaged changes: {some([one for one in names if one])}",
            hint=f"git -C {path} add -u",
        )
    marks = run(
        path, "-c", "core.whitespace=-trailing-space,-space-before-tab,cr-at-eol", "diff", "--check", "--cached"
    )
    left = [line for line in marks.stdout.decode("utf-8", "replace").splitlines() if "leftover conflict marker" in line]
    if left:
        raise PatchConflict(
            f"{path}: {some(left, '; ')}", hint=f"edit the file, stage it (git -C {path} add -u), then {_onward(onto)}"
        )
    if _same(path, "--cached"):
        return False
    done = run(path, "-c", "core.editor=:", "cherry-pick", "--continue", env=COMMITTER)
    if done.returncode != 0:
        raise failed(f"git cherry-pick --continue of {name} failed in {path}", done.stderr)
    return True


def _stopped(onto: Pin, path: Path, state: Port, conflicts: Mapping[str, int]) -> PatchConflict:
    files = some([f"{name} ({count} places)" if count > 1 else name for name, count in conflicts.items()])
    return PatchConflict(
        f"{state.todo[0][1]} conflicts with {onto.name} in {files}; patches left after it: {len(state.todo) - 1}",
        hint=f"resolve them in {path}, stage them (git -C {path} add -u), then {_onward(onto)}",
    )


def _onward(onto: Pin) -> str:
    return f"apex patch port --onto {onto.own_file or onto.name} --continue (or --skip, or --abort)"


def _conflicts(path: Path) -> dict[str, int]:
    """File -> number of conflicts in it."""
    names = dict.fromkeys(entry.split("\t", 1)[1] for entry in git(path, "ls-files", "-u", "-z").split("\0") if entry)
    found = {}
    for name in names:
        text = (path / name).read_bytes() if (path / name).is_file() else b""
        found[name] = sum(line.startswith(b"<<<<<<< ") for line in text.splitlines())
    return found


def _same(path: Path, *how: str) -> bool:
    return run(path, "diff", "--quiet", *how).returncode == 0


def _quietly(path: Path, *arguments: str) -> None:
    git(path, *arguments, env=COMMITTER)


def _next(state: Port, which: Literal["done", "upstream", "skipped"], head: str) -> Port:
    name, rest = state.todo[0][1], replace(state, head=head, todo=state.todo[1:])
    if which == "done":
        return replace(rest, done=(*state.done, name))
    return (
        replace(rest, upstream=(*state.upstream, name))
        if which == "upstream"
        else replace(rest, skipped=(*state.skipped, name))
    )


def _end(path: Path) -> None:
    for ref in (_THEIR_BASE, _THEIR_SERIES):
        run(path, "update-ref", "-d", ref)
    _file(path).unlink(missing_ok=True)


def _file(path: Path) -> Path:
    return path / git(path, "rev-parse", "--git-path", "apex-port.json")


def _read(onto: Pin, path: Path) -> Port:
    try:
        data = read_json(_file(path))
        lists = {key: tuple(map(str, data[key])) for key in ("done", "upstream", "skipped")}
        todo = tuple((str(commit), str(name)) for commit, name in data["todo"])
        return Port(str(data["origin"]), str(data["start"]), str(data["head"]), todo, **lists)
    except FileNotFoundError:
        raise TreeEdited(
            f"no port is in progress in {path}", hint=f"apex patch port --onto {onto.own_file or onto.name}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GitFailed(f"{_file(path)} cannot be read: {error}", hint=f"git -C {path} cherry-pick --abort") from None
