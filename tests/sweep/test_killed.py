"""Kill a sweep before and after each system call: its rows and manifest are the old ones or the new ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from apex_runs import run_apex
from kill_points import run_until, traceable

from apex_build.storage.manifest import SWEEP, Parts, manifest_of
from apex_build.sweep.plan import check_folder
from apex_build.sweep.rows import MANIFEST, RESULTS, Row, read_rows, results_of, write_rows

EACH = 5  # every fifth stop: storage/test_artifacts.py kills the mechanism itself at each of them
PARTS: Parts = {"model": "m", "policy": "p", "over": ["draft_head"], "baseline": {"draft_head": "Q8_0"}}


def rows(*kinds: str) -> list[Row]:
    return [Row(kind, {"draft_head": kind}, True, kind == "Q8_0", 1, 2, 3, measured="now") for kind in kinds]


def before(folder: Path, how: str) -> None:
    if how != "nothing":
        write_rows(results_of(folder, PARTS), rows("Q8_0"))
    if how == "schema 0":  # as sweeps wrote it before there was a schema
        (folder / MANIFEST).write_text(json.dumps(PARTS))


@pytest.mark.slow
@pytest.mark.skipif(not traceable(), reason="the system does not let a process trace its child")
@pytest.mark.parametrize("how", ["nothing", "schema 0", "schema 1"])
def test_rows_that_are_replaced(how: str, tmp_path: Path) -> None:
    folder, stop, killed, seen = tmp_path / "out", 0, 0, []
    new = rows("Q8_0", "Q4_K")
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        before(folder, how)
        if run_until(lambda: write_rows(results_of(folder, PARTS), new), stop) is None:
            break
        check_folder(folder, PARTS)  # it is still the folder of this sweep, or of none
        seen.append(len(read_rows(folder)))
        found = manifest_of(folder / RESULTS, folder / MANIFEST)
        if (folder / RESULTS).exists():
            assert found is not None and found.kind == SWEEP and found.parts == PARTS
            assert found.schema == 0 or found.describes(folder / RESULTS), stop
        write_rows(results_of(folder, PARTS), new)
        assert len(read_rows(folder)) == 2 and sorted(path.name for path in folder.iterdir()) == [MANIFEST, RESULTS]
        stop += EACH
        killed += 1
    print(f"rows of a sweep, {how} before: killed {killed} times")
    assert seen == sorted(seen) and set(seen) == {0 if how == "nothing" else 1, 2}


def test_apex_show(tmp_path: Path) -> None:
    before(tmp_path, "schema 1")
    for path in (tmp_path, tmp_path / MANIFEST, tmp_path / RESULTS):
        said = run_apex("show", path, "--check").stdout
        assert "results of a sweep" in said and "checked" in said and "from.baseline.draft_head" in said
        assert "points" in said and "measured" in said
    before(tmp_path, "schema 0")
    said = run_apex("show", tmp_path).stdout
    assert "results of a sweep" in said and "schema 0" in said and "from.model" in said
