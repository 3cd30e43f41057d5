"""`apex patch status`: how each patch applies to the pin's source, and what is known about it."""

from __future__ import annotations

import json

import pytest
from source.tiny import IMATRIX, LINES, Apex, World, commit, edited, git

from apex_build.errors import PatchUnknown, TreeEdited
from apex_build.source.fetch import ensure_source
from apex_build.source.series import read_series, save_series
from apex_build.source.tree import commit_identity, tree_identity
from apex_build.workshop import results
from apex_build.workshop.overview import overview
from apex_build.workshop.standing import find_patch, stand


def test_each_patch_on_what_it_stands_on(series: World) -> None:
    """On a source with added lines, one hunk already applied, and one different line."""
    three = LINES.replace("line 10\n", "ten\n").replace("line 30\n", "thirty\n")
    commit(series.tree, {IMATRIX: three.encode()}, "imatrix: thirty")
    commit(series.tree, {IMATRIX: three.replace("line 50\n", "fifty\n").encode()}, "imatrix: fifty")
    save_series(series.pin)
    patches = read_series(series.pin)
    assert [one.applies for one in stand(series.tree, patches)] == ["yes"] * 4

    git(series.tree, "switch", "--quiet", "-c", "later", "apex-base")
    text = "new\n" * 5 + LINES.replace("line 10\n", "ten\n").replace("line 51\n", "other\n")
    later = commit(series.tree, {IMATRIX: text.encode()}, "upstream moved on")
    found = list(stand(series.tree, patches, later))
    assert [one.applies for one in found] == ["upstream", "yes", "offset", "conflict"]
    assert found[2].detail == f"{IMATRIX}, hunk 1 by 5 lines"
    assert found[3].detail == f"{IMATRIX}, hunk 1 of 1 (@@ -47,7 +47,7 @@)"
    assert [one.commit is None for one in found] == [True, False, False, True]
    assert git(series.tree, "status", "--porcelain") == ""


def test_what_is_known_of_a_source(series: World, apex: Apex) -> None:
    said = apex("patch", "status")
    assert "not green: it was not built yet; llama.cpp's tests were not run yet" in said.out
    assert overview(series.pin).whole.builds is None
    identity = tree_identity(series.tree)
    assert identity == commit_identity(series.tree, "HEAD")
    results.remember(identity, "builds", {"ok": False, "error": "a.cpp:1: error: no"})
    found = json.loads(apex("patch", "status", "--json").out)
    assert [patch["builds"] for patch in found["patches"]] == [None, False]
    assert found["patches"][1]["build_error"] == "a.cpp:1: error: no"
    assert found["lacking"][0] == "it does not build"
    results.remember(identity, "builds", {"ok": True, "error": None})
    results.remember(identity, "tests", {"ran": 3, "runnable": 3, "passed": 2, "broken": [], "left_out": {}})
    said = apex("patch", "status")
    assert "2 of 3" in said.out and "tiny: green" in said.out
    (series.tree / IMATRIX).write_bytes(edited(10, "TEN"))
    assert "not green: the tree has uncommitted edits" in apex("patch", "status").out
    git(series.tree, "commit", "--quiet", "-a", "--amend", "--no-edit")
    assert "2 of 3" in apex("patch", "status").out, "the series is as it was"
    save_series(series.pin)
    found = json.loads(apex("patch", "status", "--json").out)
    assert (found["tests"], found["builds"], found["green"]) == (None, None, False), (
        "another source: nothing is known of it"
    )


def test_all_pins_where_none_is_fetched(apex: Apex, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    from apex_build.cli import main

    with pytest.raises(SystemExit):
        main(["patch", "status", "--all", "--json"])
    assert [pin["fetched"] for pin in json.loads(capsys.readouterr().out)["pins"]] == [False, False]
    assert apex("patch", "status", "--all").code == 2


def test_naming_a_patch(series: World) -> None:
    patches = read_series(series.pin)
    for given in ("2", "0002", "0002-ggml-ndern.patch", "0002-ggml-ndern", "ggml: ändern", "GGML"):
        assert find_patch(patches, given) == patches[1]
    with pytest.raises(PatchUnknown, match=r"no patch of the series matches '3'; patches: 0001-.*, 0002-"):
        find_patch(patches, "3")
    with pytest.raises(PatchUnknown, match="several patches match 'r'"):
        find_patch(patches, "r")


def test_a_rebase_under_way_is_left_alone(series: World, apex: Apex) -> None:
    """Its HEAD is in the middle of the series: applying or saving would lose the rest."""
    before = {file.name: file.read_bytes() for file in series.patches.iterdir()}
    git(series.tree, "-c", "sequence.editor=sed -i 1s/pick/edit/", "rebase", "--quiet", "-i", "apex-base")
    head = git(series.tree, "rev-parse", "HEAD")
    for verb in ("save", "apply"):
        said = apex("patch", verb)
        assert said.code == TreeEdited.exit_code
        assert f"a git rebase is in progress\ntry:   git -C {series.tree} rebase --continue finishes it" in said.err
    assert ensure_source(series.pin) == series.tree, "built as it is"
    assert git(series.tree, "rev-parse", "HEAD") == head
    assert {file.name: file.read_bytes() for file in series.patches.iterdir()} == before
    git(series.tree, "-c", "core.editor=true", "rebase", "--continue")
    assert apex("patch", "save").out == "2 patches, all as saved before\n"


def test_save_does_not_overwrite_a_patch_that_was_changed_by_hand(series: World, apex: Apex) -> None:
    file = series.patches / "0002-ggml-ndern.patch"
    file.write_bytes(file.read_bytes().replace(b"+new", b"+by hand"))
    mine = file.read_bytes()
    said = apex("patch", "save")
    assert said.code == TreeEdited.exit_code
    assert f"{file} has changed since it was applied to this tree; saving would overwrite it" in said.err
    assert file.read_bytes() == mine
    assert apex("patch", "save", "--force").code == 0
    assert file.read_bytes() != mine
