"""Work that exists only in a tree: no verb discards it, and saving loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from source.tiny import FILES, IMATRIX, Apex, World, commit, folder, git

from apex_build.errors import GitFailed, TreeEdited
from apex_build.source.fetch import ensure_source, fetch, verify
from apex_build.source.series import save_series, series_status


def test_edited_tree(series: World, apex: Apex) -> None:
    (series.tree / "LICENSE").write_text("mine\n")
    git(series.tree, "update-index", "--assume-unchanged", "LICENSE")
    said = apex("source", "verify")
    assert said.code == TreeEdited.exit_code
    assert "has uncommitted edits: LICENSE" in said.err
    assert "apex patch save" in said.err
    git(series.tree, "update-index", "--no-assume-unchanged", "LICENSE")
    for arguments in (("source", "fetch", "--force"),):
        said = apex(*arguments)
        assert said.code == TreeEdited.exit_code
        assert "edited: LICENSE" in said.err
    assert (series.tree / "LICENSE").read_text() == "mine\n"
    assert apex("source", "fetch").code == 0, "without --force the tree is kept as it is"
    assert (series.tree / "LICENSE").read_text() == "mine\n"
    assert series.left_over() == []


@pytest.mark.parametrize("kind", ["commit", "branch", "stash", "new file", "ignored file", "merge"])
def test_force_loses_nothing(series: World, apex: Apex, kind: str) -> None:
    tree = series.tree
    if kind == "commit":
        commit(tree, {"mine.c": b"mine\n"}, "my work")
    elif kind == "branch":
        git(tree, "checkout", "--quiet", "-b", "side")
        commit(tree, {"mine.c": b"mine\n"}, "my work")
        git(tree, "checkout", "--quiet", "apex")
    elif kind == "stash":
        (tree / "LICENSE").write_text("my work\n")
        git(tree, "stash", "--message", "my work")
    elif kind == "merge":
        git(tree, "checkout", "--quiet", "-b", "side", "apex-base")
        commit(tree, {"mine.c": b"mine\n"}, "my work")
        git(tree, "checkout", "--quiet", "apex")
        git(tree, "merge", "--quiet", "--no-ff", "-m", "merged", "side")
    else:
        name = "mine.log" if kind == "ignored file" else "mine.c"
        (tree / name).write_text("my work\n")
    said = apex("source", "fetch", "--force")
    assert said.code == TreeEdited.exit_code
    assert "has work that fetching again would lose" in said.err
    assert "my work" in said.err or "mine." in said.err
    assert series.left_over() == []
    if kind == "commit":
        save_series(series.pin)
        assert apex("source", "fetch", "--force").code == 0, "saved work does not block it"
        assert (tree / "mine.c").read_bytes() == b"mine\n"
        assert verify(series.pin)


def test_python_caches_do_not_count_as_work(series: World, apex: Apex) -> None:
    (series.tree / "conversion/__pycache__").mkdir(parents=True)
    (series.tree / "conversion/__pycache__/x.pyc").write_bytes(b"x")
    assert apex("source", "fetch", "--force").code == 0


def test_apply_does_not_touch_edited_files(series: World, apex: Apex) -> None:
    git(series.tree, "reset", "--quiet", "--hard", "apex-base")
    (series.tree / IMATRIX).write_text("mine\n")
    said = apex("patch", "apply")
    assert said.code == TreeEdited.exit_code
    assert f"uncommitted edits in {IMATRIX}" in said.err
    assert f"commit -a, then apex patch apply --pin {series.toml}" in said.err
    assert (series.tree / IMATRIX).read_text() == "mine\n"
    assert git(series.tree, "rev-list", "--count", "HEAD") == "1"


def test_apply_over_a_new_file_of_the_same_name(series: World, apex: Apex) -> None:
    git(series.tree, "reset", "--quiet", "--hard", "apex-base")
    (series.tree / "ggml/src/new.c").write_text("mine\n")
    said = apex("patch", "apply")
    assert said.code == GitFailed.exit_code
    assert "ggml/src/new.c" in said.err
    assert (series.tree / "ggml/src/new.c").read_text() == "mine\n"
    assert git(series.tree, "rev-list", "--count", "HEAD") == "1"


def test_apply_keeps_unsaved_commits(series: World, apex: Apex) -> None:
    git(series.tree, "reset", "--quiet", "--hard", "HEAD~1")
    mine = commit(series.tree, {"mine.c": b"mine\n"}, "my work")
    said = apex("patch", "apply")
    assert said.code == 0
    assert said.out == "applied 0002-ggml-ndern.patch\n"
    assert git(series.tree, "rev-parse", "HEAD~1") == mine
    assert [name[:4] for name in save_series(series.pin).names] == ["0001", "0002", "0003"]


def test_a_newer_series_replaces_the_older_one(series: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like after git pull: apex may remove commits that it applied; unchanged files keep their times (no rebuild)."""
    monkeypatch.setenv("APEX_SOURCE_DIR", str(tmp_path / "other"))
    other = fetch(series.pin).path
    untouched = (other / IMATRIX).stat().st_mtime_ns
    git(series.tree, "reset", "--quiet", "--hard", "HEAD~1")
    commit(series.tree, {"ggml/src/new.c": b"newer\n"}, "ggml: ändern")
    monkeypatch.setenv("APEX_SOURCE_DIR", str(series.tree.parent))
    save_series(series.pin)
    monkeypatch.setenv("APEX_SOURCE_DIR", str(tmp_path / "other"))
    assert not series_status(series.pin).complete
    assert ensure_source(series.pin) == other
    assert (other / "ggml/src/new.c").read_bytes() == b"newer\n"
    assert (other / "ggml/src/windows.c").read_bytes() == FILES["ggml/src/windows.c"]
    assert (other / IMATRIX).stat().st_mtime_ns == untouched
    assert verify(series.pin)


def test_own_commits_survive_a_series_that_lost_them(series: World, apex: Apex) -> None:
    """After saving, the saved files were deleted: the commits in the tree are the only copy again."""
    head = git(series.tree, "rev-parse", "HEAD")
    (series.patches / "series").write_text("")
    assert ensure_source(series.pin) == series.tree
    assert apex("patch", "apply").code == 0
    assert git(series.tree, "rev-parse", "HEAD") == head
    assert apex("source", "fetch", "--force").code == TreeEdited.exit_code


def test_ensure_source(series: World) -> None:
    git(series.tree, "reset", "--quiet", "--hard", "apex-base")
    assert ensure_source(series.pin) == series.tree
    assert series_status(series.pin).complete
    (series.tree / "LICENSE").write_text("mine\n")
    git(series.tree, "commit", "--quiet", "-am", "mine")
    (series.tree / IMATRIX).write_text("mine\n")
    head = git(series.tree, "rev-parse", "HEAD")
    assert ensure_source(series.pin) == series.tree, "a developer's tree is built as it is"
    assert git(series.tree, "rev-parse", "HEAD") == head


def test_save_refuses_what_a_series_cannot_hold(series: World, apex: Apex) -> None:
    before = folder(series.patches)
    head = git(series.tree, "rev-parse", "HEAD")

    def refuses(*words: str) -> None:
        said = apex("patch", "save")
        assert said.code == TreeEdited.exit_code, said.err
        assert all(word in said.err for word in words), said.err
        assert folder(series.patches) == before
        git(series.tree, "reset", "--quiet", "--hard", head)

    git(series.tree, "commit", "--quiet", "--allow-empty", "-m", "nothing at all")
    refuses("'nothing at all' changes nothing")
    commit(series.tree, {"LICENSE": b"x\n"}, "a message\n\nwith a line\n---\nthat ends a mail's text")
    refuses("'a message' cannot be mailed")
    commit(series.tree, {"LICENSE": b"x\n"}, "[tag] kept\n\nbody")
    assert apex("patch", "save").code == 0
    assert "[PATCH] [tag] kept" in (series.patches / "0003-tag-kept.patch").read_text()
    before = folder(series.patches)
    head = git(series.tree, "rev-parse", "HEAD")
    git(series.tree, "checkout", "--quiet", "-b", "side", "apex-base")
    commit(series.tree, {"mine.c": b"mine\n"}, "side work")
    git(series.tree, "checkout", "--quiet", "apex")
    git(series.tree, "merge", "--quiet", "--no-ff", "-m", "merged", "side")
    refuses("is a merge")


def test_save_of_a_bare_tree_does_not_wipe_the_series(
    series: World, apex: Apex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = folder(series.patches)
    monkeypatch.setenv("APEX_SOURCE_DIR", str(tmp_path / "bare"))
    assert apex("source", "fetch", "--no-patches").code == 0
    said = apex("patch", "save")
    assert said.code == TreeEdited.exit_code
    assert "saving would drop 0001-imatrix-record-the-draft-head.patch, which this tree never had" in said.err
    assert folder(series.patches) == before


def test_a_patch_can_be_dropped_on_purpose(series: World, apex: Apex) -> None:
    git(series.tree, "reset", "--quiet", "--hard", "HEAD~1")
    said = apex("patch", "save")
    assert said.code == 0
    assert said.out == f"removed {series.patches / '0002-ggml-ndern.patch'}\n"
    assert sorted(folder(series.patches)) == ["0001-imatrix-record-the-draft-head.patch", "series"]
    assert verify(series.pin)


def test_save_notes_uncommitted_edits(series: World, apex: Apex) -> None:
    (series.tree / "LICENSE").write_text("mine\n")
    said = apex("patch", "save")
    assert said.code == 0
    assert "warning: LICENSE has uncommitted edits" in said.err
