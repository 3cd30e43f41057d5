"""`apex check`: a good file passes, a dead head fails; the built-in evaluation set differs from the calibration set."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import gguf_edit
import pytest
from apex_runs import run_apex

from apex_build.calibration.sets import load_set
from apex_build.errors import CheckFailed, EvaluationRefused
from apex_build.evaluation.built_in import built_in_prompts, built_in_texts, evaluation_set
from apex_build.gguf_model.model import read_model
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins

ONE = ("--threads", "1")


def test_a_good_file_passes(tools: Toolset, testbed: Path) -> None:
    ran = run_apex("check", testbed, *ONE, "--json")
    told = json.loads(ran.stdout)
    assert told["good"] and not told["problems"]
    assert set(told["acceptance"]) == set(told["perplexity"]) == {"all", "chat", "code", "reasoning", "tool-calling"}
    rate = told["acceptance"]["all"]
    assert 20 < rate["value"] < 100 and rate["low"] < rate["value"] < rate["high"] and rate["n"] == 16
    assert told["same_text"]["value"] >= 75


@pytest.mark.parametrize("spoil", [gguf_edit.with_zero_head, gguf_edit.with_noise_head, gguf_edit.with_foreign_head])
def test_a_dead_head_fails(tools: Toolset, testbed: Path, tmp_path: Path, spoil: Callable[[Path, Path], Path]) -> None:
    bad = spoil(testbed, tmp_path / "bad.gguf")
    ran = run_apex("check", bad, *ONE, "--prompts-per-domain", 2, code=CheckFailed.exit_code)
    found = re.search(r"(\d+\.\d) % of the drafts of its head are accepted, expected at least 20 %", ran.stderr)
    assert found and float(found[1]) < 20, ran.stderr
    assert "good" not in ran.stdout


def test_half_of_the_reference_is_asked_for(tools: Toolset, testbed: Path, tmp_path: Path) -> None:
    from apex_build.evaluation.check import Bounds, _head, _trunk
    from apex_build.hookspecs import Figure

    def of(value: float) -> dict[str, Figure]:
        return {"": Figure("x", value)}

    assert not _head(of(31), of(60), Bounds()) and _head(of(29), of(60), Bounds()) and _head(of(19), {}, Bounds())
    assert not _trunk(of(14), of(10), Bounds(), 2048) and _trunk(of(16), of(10), Bounds(), 2048)
    assert _trunk(of(600), {}, Bounds(), 2048) and not _trunk(of(600), {}, Bounds(), 248_320)
    ran = run_apex("check", testbed, "--reference", testbed, *ONE, "--prompts-per-domain", 1)
    assert "good" in ran.stdout
    headless = gguf_edit.without_head(testbed, tmp_path / "headless.gguf")
    run_apex("check", testbed, "--reference", headless, code=EvaluationRefused.exit_code)
    assert "no draft head" in run_apex("check", headless, *ONE, "--prompts-per-domain", 1).stdout


def test_a_trunk_of_noise_fails(tools: Toolset, testbed: Path, tmp_path: Path) -> None:
    import numpy as np

    random = np.random.default_rng(3)
    bad = gguf_edit.changed(
        testbed, tmp_path / "bad.gguf",
        lambda name, v: random.normal(0, 0.02, v.shape).astype(v.dtype) if name == "output.weight" else v,
    )  # fmt: skip
    ran = run_apex("check", bad, *ONE, "--prompts-per-domain", 1, code=CheckFailed.exit_code)
    assert "the trunk does not write text" in ran.stderr


def words(text: str) -> set[tuple[str, ...]]:
    found = re.findall(r"\w+", text.lower())
    return set(zip(*(found[n:] for n in range(10)), strict=False))


def test_no_ten_words_of_the_evaluation_set_are_in_the_calibration_set(testbed: Path) -> None:
    sets = (evaluation_set(), load_set("default"))
    evaluated, calibrated = (
        set().union(
            *(
                words((one.path.parent / part.options["file"]).read_text())
                for part in one.parts
                if "file" in part.options
            )
        )
        for one in sets
    )
    shared = evaluated & calibrated
    assert len(evaluated) > 20_000 and len(shared) <= 3, sorted(shared)[:5]


def test_texts_and_prompts_are_of_four_domains(testbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APEX_CACHE_DIR", str(tmp_path))
    plugins = load_plugins()
    model, sources = read_model(testbed, plugins.role_of), plugins.calibration_sources()
    texts = built_in_texts(model, sources)
    assert list(texts) == ["chat", "code", "reasoning", "tool-calling"]
    assert all(path.stat().st_size > 50_000 for path in texts.values()) and texts == built_in_texts(model, sources)
    prompts = built_in_prompts(model, sources, 4)
    assert [prompt.domain for prompt in prompts].count("chat") == 4 and len(prompts) == 16
    assert all(p.text.endswith("<|im_start|>assistant\n") for p in prompts if p.domain != "code")
