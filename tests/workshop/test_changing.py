"""`apex patch edit`, `new`, `drop`, `reorder`: series and tree stay in sync, and nothing is lost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from source.tiny import IMATRIX, LINES, Apex, World, commit, edited, folder, git

from apex_build.errors import PatchConflict, PatchUnknown, TreeEdited
from apex_build.source.fetch import verify
from apex_build.source.series import read_series, save_series


def subjects(world: World) -> list[str]:
    return [patch.subject for patch in read_series(world.pin)]


def heads(world: World) -> str:
    return git(world.tree, "log", "--format=%H %P %s")


def test_edit_names_the_commits(series: World, apex: Apex) -> None:
    git(series.tree, "reset", "--quiet", "--hard", "apex-base")
    said = apex("patch", "edit")
    assert said.code == 0
    assert [line.split()[-1] for line in said.out.splitlines()[:2]] == [patch.name for patch in read_series(series.pin)]
    assert f"git -C {series.tree} rebase -i apex-base" in said.out
    assert verify(series.pin), "the tree is the series"


def test_each_verb_answers_in_json(series: World, apex: Apex) -> None:
    def said(*arguments: str) -> dict[str, Any]:
        ran = apex("patch", *arguments, "--json")
        assert ran.code == 0, ran.err
        return dict(json.loads(ran.out))

    names = [patch.name for patch in read_series(series.pin)]
    git(series.tree, "reset", "--quiet", "--hard", "apex-base")
    assert said("apply") == {"pin": "tiny", "applied": names}
    opened = said("edit")
    assert [one["patch"] for one in opened["commits"]] == names and opened["at"] is None
    assert opened["tree"] == str(series.tree)
    saved = said("save")
    assert saved == {
        "pin": "tiny",
        "folder": str(series.patches),
        "patches": names,
        "written": [],
        "removed": [],
    }
    (series.tree / IMATRIX).write_bytes(edited(10, "TEN"))
    new = said("new", "imatrix: ten")
    assert new["written"] == ["0003-imatrix-ten.patch"] and new["patches"] == [*names, *new["written"]]
    commit = git(series.tree, "rev-parse", "HEAD")
    dropped = said("drop", "3")
    assert dropped["dropped"] == {"patch": "0003-imatrix-ten.patch", "commit": commit}
    assert dropped["removed"] == ["0003-imatrix-ten.patch"] and dropped["patches"] == names
    put_first = said("reorder", "2")
    assert [name[5:] for name in put_first["patches"]] == [name[5:] for name in reversed(names)]


def test_edit_a_patch_with_gits_own_tools(series: World, apex: Apex) -> None:
    last = series.patches / "0002-ggml-ndern.patch"
    before = last.read_bytes()
    said = apex("patch", "edit", "1")
    assert said.code == 0 and "-> " in said.out and "rebase --continue" in said.out
    assert git(series.tree, "log", "-1", "--format=%s") == "imatrix: record the draft head"
    (series.tree / IMATRIX).write_bytes(edited(10, "TEN"))
    git(series.tree, "commit", "--quiet", "-a", "--amend", "--no-edit")
    assert apex("patch", "edit", "2").code == TreeEdited.exit_code, "one at a time"
    git(series.tree, "rebase", "--continue")
    assert git(series.tree, "symbolic-ref", "--short", "HEAD") == "apex"
    said = apex("patch", "save")
    assert said.out == f"wrote {series.patches / '0001-imatrix-record-the-draft-head.patch'}\n"
    assert last.read_bytes() == before, "the other patch keeps its bytes"
    assert apex("patch", "save").out == "2 patches, all as saved before\n"
    assert verify(series.pin)


def test_edit_refuses_what_it_could_not_keep(series: World, apex: Apex) -> None:
    (series.tree / IMATRIX).write_text("mine\n")
    said = apex("patch", "edit", "1")
    assert said.code == TreeEdited.exit_code
    assert "has uncommitted edits" in said.err
    assert apex("patch", "edit").code == 0, "only to look"
    assert (series.tree / IMATRIX).read_text() == "mine\n"
    git(series.tree, "checkout", "--quiet", ".")
    assert apex("patch", "edit", "7").code == PatchUnknown.exit_code


def test_new(series: World, apex: Apex) -> None:
    said = apex("patch", "new", "imatrix: eleven")
    assert said.code == TreeEdited.exit_code
    assert f"no edits in {series.tree}" in said.err
    (series.tree / "tools/imatrix/README.md").write_text("# more\n")
    (series.tree / "ggml/src/more.c").write_text("more\n")
    said = apex("patch", "new", "ggml: more", "ggml/src/more.c", "-m", "It was too little.")
    assert said.out == f"wrote {series.patches / '0003-ggml-more.patch'}\n"
    text = (series.patches / "0003-ggml-more.patch").read_text()
    assert "Subject: [PATCH] ggml: more\n\nIt was too little.\n" in text
    assert "<dev@example.org>" in text, "the author of the series"
    assert git(series.tree, "status", "--porcelain") == "M tools/imatrix/README.md"
    assert apex("patch", "new", "imatrix: document").code == 0
    assert subjects(series)[2:] == ["ggml: more", "imatrix: document"]
    assert verify(series.pin)


def test_the_first_patch_needs_an_author(world: World, apex: Apex, monkeypatch: pytest.MonkeyPatch) -> None:
    assert apex("source", "fetch").code == 0
    (world.tree / IMATRIX).write_bytes(edited(3, "three"))
    monkeypatch.setenv("HOME", str(world.cache))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.delenv("GIT_CONFIG_GLOBAL", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    said = apex("patch", "new", "imatrix: three")
    assert said.code == TreeEdited.exit_code
    assert "git does not know the author: user.name is not set" in said.err
    world.cache.mkdir(exist_ok=True)
    (world.cache / ".gitconfig").write_text("[user]\nname = Ada\nemail = ada@example.org\n")
    assert apex("patch", "new", "imatrix: three").code == 0
    assert [(patch.author, patch.email) for patch in read_series(world.pin)] == [("Ada", "ada@example.org")]


def test_drop(series: World, apex: Apex) -> None:
    commit(series.tree, {IMATRIX: edited(10, "ten and more")}, "imatrix: more")
    save_series(series.pin)
    before, then = folder(series.patches), heads(series)
    said = apex("patch", "drop", "1")
    assert said.code == PatchConflict.exit_code
    assert f"0003-imatrix-more.patch does not apply: {IMATRIX}, hunk 1 of 1" in said.err
    assert folder(series.patches) == before and heads(series) == then
    gone = git(series.tree, "rev-parse", "--short=9", "HEAD")
    said = apex("patch", "drop", "more")
    assert said.out.endswith(f"dropped 0003-imatrix-more.patch; its commit was {gone}\n")
    assert apex("patch", "drop", "ggml").code == 0
    assert subjects(series) == ["imatrix: record the draft head"]
    assert not (series.tree / "ggml/src/new.c").exists()
    assert verify(series.pin)


def test_drop_takes_nothing_along(series: World, apex: Apex) -> None:
    commit(series.tree, {"mine.c": b"mine\n"}, "my work")
    said = apex("patch", "drop", "2")
    assert said.code == TreeEdited.exit_code and "'my work'" in said.err
    assert len(subjects(series)) == 2


def test_reorder(series: World, apex: Apex) -> None:
    """The third patch changes the line next to the first one's: if it goes first, its context differs."""
    three = LINES.replace("line 10\n", "ten\n").replace("line 13\n", "thirteen\n")
    commit(series.tree, {IMATRIX: three.encode()}, "imatrix: thirteen")
    commit(series.tree, {IMATRIX: three.replace("ten\n", "tenth\n").encode()}, "imatrix: tenth")
    save_series(series.pin)
    files = git(series.tree, "rev-parse", "HEAD^{tree}")
    assert apex("patch", "reorder", "3", "2").code == 0
    assert subjects(series) == ["imatrix: thirteen", "ggml: ändern", "imatrix: record the draft head", "imatrix: tenth"]
    assert git(series.tree, "rev-parse", "HEAD^{tree}") == files
    assert verify(series.pin)
    before, then = folder(series.patches), heads(series)
    said = apex("patch", "reorder", "tenth")
    assert said.code == PatchConflict.exit_code
    assert "in that order, 0004-imatrix-tenth.patch does not apply" in said.err
    assert folder(series.patches) == before and heads(series) == then
    assert apex("patch", "reorder", "1", "1").code == PatchUnknown.exit_code
    assert apex("patch", "reorder", "1").out == "4 patches, all as saved before\n"
