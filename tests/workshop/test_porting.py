"""`apex patch port`: three-way, with a real conflict, continued, skipped and aborted; neither series is lost, nor any
work.
"""

from __future__ import annotations

import json

import pytest
from source.tiny import IMATRIX, LINES, World, commit, edited, folder, git
from workshop.conftest import MakeLater, Run

from apex_build.errors import PatchConflict, TreeEdited
from apex_build.source.fetch import fetch, verify
from apex_build.source.series import read_series, save_series
from apex_build.workshop.porting import ABORTED

MOVED = LINES.replace("line 10\n", "line ten\n")  # upstream touched the line that the first patch changes


@pytest.fixture
def pair(series: World, make_later: MakeLater) -> tuple[World, World]:
    """Four patches on `tiny`. On `later`, the first conflicts, the second applies, the third is already there, and the
    file of the fourth has moved.
    """
    commit(series.tree, {"LICENSE": b"MIT or any\n"}, "licence: or any")
    commit(series.tree, {"ggml/src/ggml.c": edited(30, "thirty")}, "ggml: thirty")
    save_series(series.pin)
    later = make_later(
        {
            IMATRIX: MOVED.encode(),
            "LICENSE": b"MIT or any\n",
            "ggml/src/core.c": LINES.encode(),
            "ggml/src/ggml.c": None,
        }
    )
    fetch(later.pin)
    return series, later


def subjects(world: World) -> list[str]:
    return [patch.subject for patch in read_series(world.pin)]


def test_dry_run_touches_nothing(pair: tuple[World, World], run: Run) -> None:
    tiny, later = pair
    said = run("patch", "port", "--onto", later.toml, "--from", tiny.toml, "--dry-run")
    assert [line.split()[0] for line in said.out.splitlines()] == ["conflict", "yes", "upstream", "conflict"]
    assert f"{IMATRIX}, hunk 1 of 1" in said.out
    found = json.loads(run("patch", "port", "--onto", later.toml, "--from", tiny.toml, "--dry-run", "--json").out)
    assert found[1] == {"patch": "0002-ggml-ndern.patch", "applies": "yes", "detail": None}
    assert git(later.tree, "rev-list", "--count", "HEAD") == "1"


def test_a_conflict_resolved_and_continued(pair: tuple[World, World], run: Run) -> None:
    tiny, later = pair
    before = folder(tiny.patches)
    head, mine = git(tiny.tree, "rev-parse", "HEAD"), git(tiny.tree, "for-each-ref")
    said = run("patch", "port", "--onto", later.toml, "--from", tiny.toml)
    assert said.code == PatchConflict.exit_code
    assert f"0001-imatrix-record-the-draft-head.patch conflicts with later in {IMATRIX}; " in said.err
    assert "; patches left after it: 3\n" in said.err
    assert f"apex patch port --onto {later.toml} --continue" in said.err
    text = (later.tree / IMATRIX).read_text()
    assert "<<<<<<< HEAD\nline ten\n||||||| " in text and "line 10\n=======\nten\n>>>>>>> " in text
    assert git(later.tree, "status", "--porcelain") == f"UU {IMATRIX}"

    again = run("patch", "port", "--onto", later.toml, "--continue")
    assert again.code == said.code and said.err.endswith(again.err), "nothing is resolved yet"
    git(later.tree, "add", IMATRIX)
    left = run("patch", "port", "--onto", later.toml, "--continue")
    assert left.code == PatchConflict.exit_code and f"{IMATRIX}:10: leftover conflict marker" in left.err
    (later.tree / IMATRIX).write_text(MOVED.replace("line ten\n", "ten, of the head\n"))
    left = run("patch", "port", "--onto", later.toml, "--continue")
    assert left.code == TreeEdited.exit_code and f"has unstaged changes: {IMATRIX}" in left.err
    assert run("patch", "save", "--pin", later.toml).code == TreeEdited.exit_code
    assert run("patch", "port", "--onto", later.toml, "--from", tiny.toml).code == TreeEdited.exit_code
    git(later.tree, "add", IMATRIX)
    said = run("patch", "port", "--onto", later.toml, "--continue")
    assert said.code == 0, said.err
    assert said.out.splitlines()[:4] == [
        "ported: 0001-imatrix-record-the-draft-head.patch",
        "ported: 0002-ggml-ndern.patch",
        "ported: 0004-ggml-thirty.patch",
        "already in the source: 0003-licence-or-any.patch",
    ]
    assert subjects(later) == ["imatrix: record the draft head", "ggml: ändern", "ggml: thirty"]
    assert (later.tree / "ggml/src/core.c").read_bytes() == edited(30, "thirty"), "git found where the file went"
    assert verify(later.pin)
    assert read_series(later.pin)[0].message == read_series(tiny.pin)[0].message
    assert folder(tiny.patches) == before, "both series lie side by side"
    assert (git(tiny.tree, "rev-parse", "HEAD"), git(tiny.tree, "for-each-ref")) == (head, mine)
    assert "port" not in git(later.tree, "for-each-ref"), "what it needed is gone"
    said = run("patch", "port", "--onto", later.toml, "--from", tiny.toml, "2")
    assert said.code == 0 and "already in the source" in said.out, "named, though there is one of that subject"


def test_a_patch_of_later_work_alone(pair: tuple[World, World], run: Run) -> None:
    """A patch whose subject the other series has is not ported again, even if it was changed there."""
    tiny, later = pair
    assert run("patch", "port", "--onto", later.toml, "--from", tiny.toml, "ndern").code == 0
    git(later.tree, "commit", "--quiet", "--amend", "-m", "ggml: ändern\n\nAnd why.")
    save_series(later.pin)
    run("patch", "port", "--onto", later.toml, "--from", tiny.toml)
    said = run("patch", "port", "--onto", later.toml, "--skip", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["skipped"] == ["0001-imatrix-record-the-draft-head.patch"] and found["ported"] == [
        "0004-ggml-thirty.patch"
    ]
    assert subjects(later) == ["ggml: ändern", "ggml: thirty"]
    commit(tiny.tree, {"ggml/src/new.c": b"newer\n"}, "ggml: newer")
    save_series(tiny.pin)
    said = run("patch", "port", "--onto", later.toml, "--from", tiny.toml, "newer")
    assert said.out.startswith("ported: 0005-ggml-newer.patch\n")
    assert subjects(later)[-1] == "ggml: newer"


def test_aborted(pair: tuple[World, World], run: Run) -> None:
    tiny, later = pair
    git(
        tiny.tree, "reset", "--quiet", "--hard", "apex-base"
    )  # what is in the other tree does not count, its series does
    assert run("patch", "port", "--onto", later.toml, "--from", tiny.toml, "2").code == 0
    head, files = git(later.tree, "rev-parse", "HEAD"), folder(later.patches)
    assert run("patch", "port", "--onto", later.toml, "--from", tiny.toml).code == PatchConflict.exit_code
    (later.tree / IMATRIX).write_text("half resolved\n")
    (later.tree / "note.txt").write_text("mine\n")
    said = run("patch", "port", "--onto", later.toml, "--abort")
    assert said.code == 0, said.err
    assert "later is restored" in said.out
    assert git(later.tree, "rev-parse", "HEAD") == head and folder(later.patches) == files
    assert git(later.tree, "status", "--porcelain") == "?? note.txt"
    assert git(later.tree, "show", f"{ABORTED}:{IMATRIX}") == "half resolved"
    assert run("patch", "port", "--onto", later.toml, "--abort").code == TreeEdited.exit_code
    assert "no port is in progress" in run("patch", "port", "--onto", later.toml, "--continue").err


def test_aborted_after_some_were_ported(pair: tuple[World, World], run: Run) -> None:
    tiny, later = pair
    assert run("patch", "reorder", "2", "--pin", tiny.toml).code == 0
    head = git(later.tree, "rev-parse", "HEAD")
    assert run("patch", "port", "--onto", later.toml, "--from", tiny.toml).code == PatchConflict.exit_code
    assert git(later.tree, "rev-list", "--count", "HEAD") == "2"
    assert run("patch", "port", "--onto", later.toml, "--abort").code == 0
    assert git(later.tree, "rev-parse", "HEAD") == head
    assert git(later.tree, "show", f"{ABORTED}:ggml/src/new.c") == "new"


def test_ended_by_hand(pair: tuple[World, World], run: Run) -> None:
    """The user may also do this with git: commit, or skip the patch."""
    tiny, later = pair
    assert run("patch", "port", "--onto", later.toml, "--from", tiny.toml, "1", "4").code == PatchConflict.exit_code
    (later.tree / IMATRIX).write_text(MOVED.replace("line ten\n", "ten\n"))
    git(later.tree, "add", IMATRIX)
    git(later.tree, "-c", "core.editor=true", "cherry-pick", "--continue")
    said = run("patch", "port", "--onto", later.toml, "--continue")
    assert said.out.startswith("ported: 0001-imatrix-record-the-draft-head.patch\nported: 0004-ggml-thirty.patch\n")
    git(later.tree, "reset", "--quiet", "--hard", "apex-base")
    save_series(later.pin)
    assert run("patch", "port", "--onto", later.toml, "--from", tiny.toml, "1", "4").code == PatchConflict.exit_code
    git(later.tree, "cherry-pick", "--abort")
    said = run("patch", "port", "--onto", later.toml, "--continue")
    assert "skipped: 0001-imatrix-record-the-draft-head.patch" in said.out
    assert subjects(later) == ["ggml: thirty"]


def test_unsaved_work_is_not_built_upon(pair: tuple[World, World], run: Run) -> None:
    tiny, later = pair
    (later.tree / "LICENSE").write_text("mine\n")
    said = run("patch", "port", "--onto", later.toml, "--from", tiny.toml)
    assert said.code == TreeEdited.exit_code and "uncommitted edits: LICENSE" in said.err
    assert (later.tree / "LICENSE").read_text() == "mine\n"
    commit(later.tree, {}, "my work")
    said = run("patch", "port", "--onto", later.toml, "--from", tiny.toml)
    assert said.code == TreeEdited.exit_code and "'my work'" in said.err
    assert run("patch", "port", "--onto", tiny.toml, "--from", tiny.toml).code == 2
    assert run("patch", "port", "--onto", tiny.toml, "--skip", "--abort").code == 2
