"""How the patches of a series apply to a pin's source, one after another, regardless of the tree's current state."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from apex_build.errors import PatchUnknown
from apex_build.near import nearby
from apex_build.source.git import git, run
from apex_build.source.patch import Patch, commit_patches, explain
from apex_build.source.tree import BASE, commit_identity
from apex_build.storage.scratch import scratch_folder

Applies = Literal["yes", "offset", "conflict", "upstream"]
_FILE = re.compile(r"Checking patch (.+)\.\.\.")
_OFFSET = re.compile(r"Hunk #(\d+) succeeded at \d+ \(offset (-?\d+) lines?\)")


@dataclass(frozen=True)
class Standing:
    """How a patch applies to the base with the applicable patches before it.

    `applies`: "upstream" means that the source already has the change. `detail`: file and hunk that moved or does not
    apply. `commit`: a commit of the patch, outside the working tree; `identity`: identity of the source up to this
    patch, as in a build's manifest. Both are None if the patch does not apply or adds nothing.
    """

    patch: Patch
    applies: Applies
    detail: str | None
    commit: str | None
    identity: str | None


def stand(path: Path, patches: Sequence[Patch], onto: str | None = None) -> Iterator[Standing]:
    """Try each patch on the base of the tree at `path`, or on the commit `onto`, without touching the working tree."""
    head = onto or git(path, "rev-parse", "--verify", f"refs/tags/{BASE}^{{commit}}")
    for patch in patches:
        applies, detail = _try(path, head, patch)
        commit = identity = None
        if applies in ("yes", "offset"):
            head = commit = commit_patches(path, head, [patch])[-1]
            identity = commit_identity(path, commit)
        yield Standing(patch, applies, detail, commit, identity)


def _try(path: Path, onto: str, patch: Patch) -> tuple[Applies, str | None]:
    check = ("apply", "--cached", "--check", "--whitespace=nowarn")
    with scratch_folder("index") as temp:
        index = {"GIT_INDEX_FILE": str(temp / "index")}
        git(path, "read-tree", onto, env=index)
        done = run(path, *check, "--verbose", "-", feed=patch.diff, env=index)
        if done.returncode == 0:
            moved = _moved(done.stderr.decode("utf-8", "replace"))
            return ("offset", moved) if moved else ("yes", None)
        if patch.diff and run(path, *check, "--reverse", "-", feed=patch.diff, env=index).returncode == 0:
            return "upstream", None
        done = run(
            path, *check, "-", feed=patch.diff, env=index
        )  # without --verbose: it prints every line searched for
    return "conflict", explain(patch.diff, done.stderr)


def _moved(said: str) -> str:
    """`src/a.cpp, hunk 2 by 12 lines`, from the output of git apply."""
    file, found = "", []
    for line in said.splitlines():
        if named := _FILE.match(line):
            file = named[1]
        elif moved := _OFFSET.match(line):
            found.append(f"{file}, hunk {moved[1]} by {moved[2]} lines")
    return "; ".join(found)


def find_patch(patches: Sequence[Patch], given: str) -> Patch:
    """The patch with this number (3, 0003), this name, or this text in its subject. Raises PatchUnknown."""
    numbered = [patch for patch in patches if given.isdigit() and int(patch.name[:4]) == int(given)]
    named = numbered or [
        patch for patch in patches if given in (patch.name, patch.name.removesuffix(".patch"), patch.subject)
    ]
    found = named or [patch for patch in patches if given.casefold() in patch.subject.casefold()]
    if len(found) == 1:
        return found[0]
    known = [patch.name for patch in found or patches]
    why = "several patches match" if found else "no patch of the series matches"
    listed = ", ".join(known) or "none"
    raise PatchUnknown(
        f"{why} {given!r}; patches: {listed}{nearby(given, known)}",
        hint="give a number or a name that apex patch status shows",
    )
