"""`apex cache prune --kind sources`: removes a tree only if no work is lost."""

from __future__ import annotations

import pytest
from source.tiny import World, commit

from apex_build import pruning


def test_a_tree_with_work_that_is_nowhere_else_stays(series: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "all_pins", lambda: [series.pin])
    (item,) = pruning.items(["sources"])
    assert item.path == series.tree and not item.kept
    (series.tree / "notes.txt").write_text("mine")
    assert pruning.remove(item).kept == "holds unsaved work: new: notes.txt" and series.tree.exists()
    (series.tree / "notes.txt").unlink()
    commit(series.tree, {"ggml/src/more.c": b"more\n"}, "ggml: more")
    assert "holds unsaved work: commit" in pruning.remove(item).kept and series.tree.exists()


def test_a_tree_that_can_be_fetched_again_goes(series: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from apex_build.source.fetch import fetch

    monkeypatch.setattr(pruning, "all_pins", lambda: [series.pin])
    (item,) = pruning.items(["sources"])
    assert not pruning.remove(item).kept and not series.tree.exists()
    assert fetch(series.pin).path == series.tree
