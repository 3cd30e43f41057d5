"""Match the commits of a tree with the patches of the series, and find work in a tree that is not saved elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from apex_build.source.git import git
from apex_build.source.patch import Patch, commits_between, format_patches, merges_between
from apex_build.source.tree import base_and_head, edits
from apex_build.storage.json_files import write_json


@dataclass(frozen=True)
class Record:
    """What apex did in this tree, kept inside its `.git`: `made` maps the commits it made from patch files to the
    sha256 of the files; `had` lists the sha256 of every patch file that was applied to this tree or saved from it.
    """

    made: dict[str, str] = field(default_factory=dict)
    had: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Applied:
    """`commits`: commit -> its patch, base to HEAD without merges; `commit_of`: name of a patch -> its commit;
    `unsaved`: (commit, subject) of the user's commits that are not in the series; `complete`: the commits equal the
    series, in order.
    """

    base: str
    head: str
    commits: dict[str, Patch]
    commit_of: dict[str, str]
    unsaved: tuple[tuple[str, str], ...]
    complete: bool


def find_applied(path: Path, series: Sequence[Patch]) -> Applied:
    """A patch and a commit match if apex made one from the other here, or if their content is equal (a rebase changes
    hashes).
    """
    base, head = base_and_head(path)
    commits = format_patches(path, base, head)
    made = record(path).made
    of: dict[str, str] = {}
    for patch in series:
        for commit, own in commits.items():
            if commit not in of.values() and (made.get(commit) == patch.sha256 or own.key == patch.key):
                of[patch.name] = commit
                break
    safe = {*of.values(), *made}
    unsaved = [(commit, patch.subject) for commit, patch in commits.items() if commit not in safe]
    unsaved += [(commit, _subject(path, commit)) for commit in merges_between(path, base, head)]
    complete = [of.get(patch.name) for patch in series] == list(commits) == commits_between(path, base, head)
    return Applied(base, head, commits, of, tuple(unsaved), complete)


def unsaved_work(path: Path, series: Sequence[Patch]) -> tuple[str, ...]:
    """Everything that exists only in this tree, a line each: edits, new and ignored files, commits of any branch, tag
    or stash.
    """
    base, _head = base_and_head(path)
    edited, untracked = edits(path)
    lines = [f"edited: {name}" for name in edited] + [f"new: {name}" for name in untracked]
    ignored = git(path, "status", "--porcelain", "-z", "--ignored=matching", "--untracked-files=all").split("\0")
    lines += [f"ignored: {entry[3:]}" for entry in ignored if entry.startswith("!! ") and "__pycache__/" not in entry]
    refs = [
        "HEAD",
        *git(path, "for-each-ref", "--format=%(objectname)", "refs/heads", "refs/stash", "refs/tags").split(),
    ]
    keys, made = {patch.key for patch in series}, record(path).made
    patches: dict[str, Patch] = {}
    for ref in dict.fromkeys(refs):
        patches |= format_patches(path, base, ref)
    for commit in git(path, "rev-list", "--reverse", *refs, f"^{base}").split():
        if commit not in made and (commit not in patches or patches[commit].key not in keys):
            lines.append(f"commit {commit[:9]} {_subject(path, commit)!r}")
    return tuple(lines)


def record(path: Path) -> Record:
    try:
        data = json.loads(_record_file(path).read_text(encoding="utf-8"))
        return Record(
            {str(commit): str(patch) for commit, patch in data["made"].items()}, frozenset(map(str, data["had"]))
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Record()  # nothing is lost: commits are then matched by their content


def remember(path: Path, *, made: Mapping[str, str] | None = None, had: Iterable[str] = ()) -> None:
    old, made = record(path), made or {}
    write_json(_record_file(path), {"made": {**old.made, **made}, "had": sorted({*old.had, *made.values(), *had})})


def _record_file(path: Path) -> Path:
    return path / git(path, "rev-parse", "--git-path", "apex-patches.json")


def _subject(path: Path, commit: str) -> str:
    return git(path, "log", "-1", "--format=%s", commit)
