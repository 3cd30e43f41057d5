"""Change a series: add, drop and reorder patches, or open the tree at a patch to edit it with git."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from apex_build.errors import PatchConflict, PatchUnknown, TreeEdited
from apex_build.progress import Report, silent
from apex_build.source.applied import find_applied, remember
from apex_build.source.git import failed, git, run
from apex_build.source.patch import COMMITTER, ApplyFailed, Patch, commit_patches
from apex_build.source.pins import Pin
from apex_build.source.series import Saved, apply_to, move_to, read_series, save_from, verb
from apex_build.source.tree import edits, refuse_under_way, require_tree, some
from apex_build.storage.locks import locked
from apex_build.storage.scratch import scratch_folder
from apex_build.workshop.standing import find_patch


@dataclass(frozen=True)
class Opened:
    """The tree, ready to edit. `commits`: (commit, patch), oldest first; `at`: the patch at HEAD."""

    path: Path
    commits: tuple[tuple[str, str], ...]
    at: str | None


def edit(pin: Pin, given: str | None = None, report: Report = silent) -> Opened:
    """Apply the series to the tree, one commit per patch. `given`: start an interactive rebase that stops there.

    Raises TreeEdited if edits are not committed or a git operation is in progress; PatchUnknown.
    """
    path = require_tree(pin)
    with locked(path, wait=True, report=report):
        refuse_under_way(path)
        if given is not None:
            _refuse_edits(pin, path)
        if not find_applied(path, read_series(pin)).unsaved:
            apply_to(pin, path)
        found = find_applied(path, read_series(pin))
        named = {commit: name for name, commit in found.commit_of.items()}
        commits = tuple((commit, named.get(commit, patch.subject)) for commit, patch in found.commits.items())
        if given is None:
            return Opened(path, commits, None)
        patch = find_patch(read_series(pin), given)
        if patch.name not in found.commit_of:
            raise PatchUnknown(
                f"{patch.name} is not applied in {path}", hint=f"{verb(pin, 'status')} shows the applied patches"
            )
        _stop_at(path, found.base, found.commit_of[patch.name])
        return Opened(path, commits, patch.name)


# git runs this instead of the user's editor: it replaces `pick` with `edit` for one commit in the list of steps
_EDITOR = """import sys
from pathlib import Path
todo = Path(sys.argv[1])
lines = todo.read_text(encoding="utf-8", errors="surrogateescape").splitlines(True)
steps = (line.split(" ", 2) for line in lines)
wanted = [step[0] == "pick" and {commit!r}.startswith(step[1]) for step in steps]
found = ["edit " + line[5:] if edit else line for line, edit in zip(lines, wanted)]
todo.write_text("".join(found), encoding="utf-8", errors="surrogateescape")
"""


def _stop_at(path: Path, base: str, commit: str) -> None:
    with scratch_folder("todo") as temp:
        editor = temp / "editor.py"
        editor.write_text(_EDITOR.format(commit=commit), encoding="utf-8")
        command = shlex.join([sys.executable, str(editor)])  # git passes it to a shell
        done = run(path, "rebase", "--interactive", base, env={**COMMITTER, "GIT_SEQUENCE_EDITOR": command})
    if done.returncode != 0:
        run(path, "rebase", "--abort")
        raise failed(f"git rebase failed in {path}", done.stderr)


def new_patch(pin: Pin, subject: str, message: str = "", files: Sequence[str] = (), report: Report = silent) -> Saved:
    """Commit the edits in the tree (or only these files) as a new patch on top, and save the series.

    The author of the series becomes its author; for the first patch, git's configured user. Raises TreeEdited if there
    is nothing to commit.
    """
    path = require_tree(pin)
    with locked(path, wait=True, report=report):
        refuse_under_way(path)
        edited, untracked = edits(path)
        if not edited and not untracked:
            raise TreeEdited(f"no edits in {path}", hint=f"edit files there first, then run {verb(pin, 'new')} again")
        series = read_series(pin)
        if not subject.strip() or "\n" in subject:
            raise TreeEdited(
                "the subject of a patch must be one line, such as 'imatrix : list tensors without data'",
                hint="apex patch new -h",
            )
        git(path, "add", "--all", "--", *(files or ["."]))
        only = ("--only", "--", *files) if files else ()
        who = _author(path, series)
        text = "\n\n".join(filter(None, (subject.strip(), message.strip()))) + "\n"
        done = run(path, "commit", "--quiet", "--file=-", *only, feed=text.encode(), env=who)
        if done.returncode != 0:
            raise failed(f"git commit failed in {path}", done.stdout + done.stderr)
        return save_from(pin, path)


def _author(path: Path, series: Sequence[Patch]) -> dict[str, str]:
    """The author of the last patch, so that a series has only one; for the first patch, the user configured in git."""
    if series:
        name, email = series[-1].author, series[-1].email
    else:
        name, email = (_configured(path, key) for key in ("user.name", "user.email"))
    when = f"{int(time.time())} +0000"
    return {
        **COMMITTER,
        "GIT_AUTHOR_NAME": name,
        "GIT_AUTHOR_EMAIL": email,
        "GIT_AUTHOR_DATE": when,
        "GIT_COMMITTER_DATE": when,
    }


def _configured(path: Path, key: str) -> str:
    done = run(path, "config", "--get", key, own=False)
    if done.returncode != 0 or not done.stdout.strip():
        raise TreeEdited(f"git does not know the author: {key} is not set", hint=f"git config --global {key} ...")
    return done.stdout.decode("utf-8", "replace").strip()


def drop(pin: Pin, given: str, report: Report = silent) -> tuple[Patch, str, Saved]:
    """Remove a patch from the series and the tree; returns the patch, its last commit, and what was saved.

    Raises PatchConflict if later patches depend on it; nothing is changed then.
    """
    with _at_series(pin, report) as (path, series):
        patch = find_patch(series, given)
        commit = find_applied(path, series).commit_of[patch.name]
        return patch, commit, _rebuild(pin, path, [one for one in series if one is not patch], f"without {patch.name}")


def reorder(pin: Pin, given: Sequence[str], report: Report = silent) -> Saved:
    """Move the named patches to the front, in this order; the others keep their order. The patched files stay the same.

    Raises PatchConflict if a patch does not apply in its new place; nothing is changed then.
    """
    with _at_series(pin, report) as (path, series):
        first = [find_patch(series, one) for one in given]
        if twice := next((patch.name for patch in first if first.count(patch) > 1), None):
            raise PatchUnknown(f"{twice} is given twice", hint=f"{verb(pin, 'status')} shows the order")
        return _rebuild(pin, path, [*first, *(one for one in series if one not in first)], "in that order", same=True)


def _rebuild(pin: Pin, path: Path, patches: Sequence[Patch], how: str, *, same: bool = False) -> Saved:
    """Rebuild the tree from these patches by three-way merges (its repository has their blobs), and save the series."""
    found = find_applied(path, read_series(pin))
    by_hand = f"{verb(pin, 'edit')}, then git -C {path} rebase -i apex-base"
    try:
        made = commit_patches(path, found.base, patches, three_way=True)
    except ApplyFailed as error:
        raise PatchConflict(f"{how}, {error.patch.name} does not apply: {error.reason}", hint=by_hand) from None
    end = made[-1] if made else found.base
    if same and git(path, "rev-parse", f"{end}^{{tree}}") != git(path, "rev-parse", f"{found.head}^{{tree}}"):
        raise PatchConflict(f"{how}, the patches no longer result in the same files", hint=by_hand)
    move_to(path, found.head, end)
    try:
        saved = save_from(pin, path)
    except BaseException:
        move_to(path, end, found.head)
        raise
    remember(path, made={commit: patch.sha256 for commit, patch in zip(made, read_series(pin), strict=True)})
    return saved


@contextmanager
def _at_series(pin: Pin, report: Report) -> Iterator[tuple[Path, tuple[Patch, ...]]]:
    """The tree and the series, once they match: all patches applied, nothing unsaved."""
    path = require_tree(pin)
    with locked(path, wait=True, report=report):
        refuse_under_way(path)
        _refuse_edits(pin, path)
        series = read_series(pin)
        if unsaved := find_applied(path, series).unsaved:
            raise TreeEdited(
                f"{path} has commits that are not in the series: {some([repr(subject) for _, subject in unsaved])}",
                hint=f"{verb(pin, 'save')} adds them",
            )
        apply_to(pin, path)
        remember(path, had=[patch.sha256 for patch in series])
        yield path, series


def _refuse_edits(pin: Pin, path: Path) -> None:
    if names := (*edits(path)[0], *edits(path)[1]):
        raise TreeEdited(
            f"{path} has uncommitted edits: {some(names)}", hint=f"{verb(pin, 'new')} makes a patch of them"
        )
