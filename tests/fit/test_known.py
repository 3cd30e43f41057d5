"""A measurement that is there already: used, refused or replaced, and what is said of it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from apex_runs import run_apex

from apex_build.errors import MeasurementUnfit, OutputUnwritable
from apex_build.native.toolset import Toolset
from apex_build.stages.given import workplace

run: Any = importlib.import_module("fit.run")
data: Any = importlib.import_module("fit.data")
measurement: Any = importlib.import_module("fit.measurement")

Look = Callable[..., Any]


@pytest.fixture
def look(testbed: Path, calibrated: Path, heldout: Path, tools: Toolset, tmp_path: Path) -> Look:
    """The preview of a request, changed by the arguments."""
    place = workplace(tools.root)
    asked = data.Asked(
        imatrix=calibrated, texts=(heldout / "chat.txt",), out=tmp_path / "fit.gguf", size=8 << 20, chunks=4
    )
    return lambda **changes: run.preview(testbed, replace(asked, **changes), place)


@pytest.fixture
def written(look: Look, by_hand: Any, tmp_path: Path) -> Path:
    """A measurement for that request, with the name that it gets by itself."""
    path = tmp_path / "fit.measurement.json"
    measurement.write(replace(by_hand, parts=look().plan.parts), path)
    return path


def test_other_settings_are_named_before_anything_is_measured(
    look: Look, written: Path, headless_imatrix: Path, heldout: Path
) -> None:
    assert look().known is not None and look(measurement=written).known is not None
    before = written.read_bytes()
    for changes, said in (
        ({"chunks": 8}, "--chunks 4, not 8"),
        ({"probe_budget": 300}, "--probe-budget 0, not 300"),
        ({"texts": (heldout / "code.txt",)}, "another --text"),
        ({"imatrix": headless_imatrix}, "another --imatrix"),
        ({"sample": 8192}, "another --sample"),
        ({"head_score": False}, "with --head-score"),
        ({"settings": {"types": "Q8_0,Q4_K,Q3_K"}}, "another --types"),
        ({"chunks": 8, "sample": 8192}, "--chunks 4, not 8; another --sample"),
    ):
        with pytest.raises(OutputUnwritable) as caught:
            look(measurement=written, **changes)
        what = caught.value.message.removeprefix(f"{written} exists and was made from something else: ")
        assert what == said
        assert caught.value.hint == "give another name with --measurement, or --force to replace it"
        forced, beside = look(measurement=written, force=True, **changes), look(**changes)
        for replaced in (forced, beside):
            assert replaced.known is None and replaced.at == written
            assert replaced.warnings == (f"{written} was made from something else and is replaced: {what}",)
            assert f"warning: {replaced.warnings[0]}" in replaced.lines()
    assert written.read_bytes() == before, "looking changes nothing"


def test_that_of_another_model_beside_the_output(look: Look, other: Any, tmp_path: Path) -> None:
    """It was not named, so it is neither used nor replaced."""
    beside = tmp_path / "fit.measurement.json"
    other(model="0" * 64).rename(beside)
    with pytest.raises(OutputUnwritable, match=r"made from something else: the model another-F16\.gguf") as caught:
        look()
    assert caught.value.hint == "give another name with -o, or --force to replace it"
    assert look(measurement=beside).known is not None, "named, it is used"
    assert look(force=True).known is None and "is replaced: the model another-F16.gguf" in look(force=True).warnings[0]
    other(tools="0" * 64).rename(beside)
    with pytest.raises(MeasurementUnfit, match="made with another build"):
        look()
    assert look(force=True).known is None


def test_the_verb_ends_as_for_any_output_that_exists(
    written: Path, testbed: Path, calibrated: Path, heldout: Path, tools: Toolset, tmp_path: Path
) -> None:
    before = written.read_bytes()
    given = ["fit", testbed, "--imatrix", calibrated, "--text", heldout / "chat.txt", "--tools", tools.root]
    given += ["--target-size", "8MiB", "-o", tmp_path / "fit.gguf", "--chunks", "8"]
    ran = run_apex(*given, "--measurement", written, code=71)
    assert "--chunks 4, not 8" in ran.stderr and "--force" in ran.stderr and "measuring" not in ran.stderr
    shown = json.loads(run_apex(*given, "--dry-run", "--json").stdout)
    assert not shown["measured_before"] and "--chunks 4, not 8" in shown["warnings"][0]
    assert written.read_bytes() == before and not (tmp_path / "fit.gguf").exists()
    nowhere = tmp_path / "none" / "m.json"
    assert "no such folder" in run_apex(*given, "--measurement", nowhere, code=71).stderr
