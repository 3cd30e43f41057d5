"""`draft_head=auto`: measured on the given model, cached, resumed after an interruption, refused if it cannot be
measured.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import gguf_edit
import pytest
from apex_runs import SMALL, run_apex
from gates import gated, started

from apex_build.errors import ChatTemplateFailed, DataMissing, EvaluationRefused
from apex_build.gguf_model.model import read_model
from apex_build.hookspecs import Figure
from apex_build.native.toolset import Toolset
from apex_build.parameters import Value
from apex_build.plugins import load_plugins
from apex_build.sweep.auto import Question, _choice, known_choice, measure, parameter_at_auto
from apex_build.sweep.rows import Row

AGREEMENT, TOKENS = "depth1.agreement", "tokens.2"
FIGURES = {"agreement": AGREEMENT, "tokens": TOKENS}
AUTO = ("--policy", "i-nano", *SMALL, "--set", "draft_head=auto", "--threads", "1")


@pytest.fixture
def question(
    tools: Toolset, testbed: Path, calibrated: Path, heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Question:
    """Eight chunks of two texts, in a separate cache: these tests check how a mixture is chosen and cached."""
    monkeypatch.setenv("APEX_CACHE_DIR", str(tmp_path / "cache"))
    plugins = load_plugins()
    texts = {name: heldout / f"{name}.txt" for name in ("chat", "code")}
    model = read_model(testbed, plugins.role_of)
    parameters: dict[str, Value] = {"edge": 1, "near": 1, "attention_edge": 1, "draft_head": "auto"}
    return Question(
        model, plugins.policy("i-nano"), parameters, calibrated, tools, plugins.evaluators(), texts, threads=1, chunks=8
    )


def measured(files: Iterable[Path]) -> list[str]:
    """Identities of the rows with figures."""
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [one["identity"] for one in rows if one["measured"]]


def row(value: str, size: int, loss: tuple[float, float, float], *, baseline: bool = False) -> Row:
    """A `loss` of agreement in points, and half as many hundredths of tokens a step."""
    low, high = -loss[2], -loss[1]
    figures = (
        Figure(AGREEMENT, 70.0, 69, 71, "%", 8000, better="higher", paired=f"{AGREEMENT}.difference"),
        Figure(f"{AGREEMENT}.difference", -loss[0], low, high, "points", 8000),
        Figure(TOKENS, 2.0, 1.9, 2.1, "tokens", 8000, better="higher", paired=f"{TOKENS}.difference"),
        Figure(f"{TOKENS}.difference", -loss[0] / 100, low / 100, high / 100, "tokens", 8000),
    )
    return Row(value, {"draft_head": value}, True, baseline, size, 1, 1, figures={"draft-head": figures})


def test_the_smallest_that_loses_little_is_chosen_and_a_wide_interval_is_not_enough() -> None:
    rows = [
        row("Q8_0", 100, (0, 0, 0), baseline=True), row("Q6_K", 80, (0.1, 0.0, 0.2)), row("Q4_K", 60, (0.3, 0.1, 0.5)),
        row("Q3_K", 50, (0.4, -0.4, 1.2)), row("Q2_K", 40, (2.0, 1.5, 2.5)),
    ]  # fmt: skip
    choice = _choice(rows, "draft_head", 0.5, FIGURES, reused=False)
    assert choice.value == "Q4_K" and choice.positions == 8000
    assert [one.fits for one in choice.candidates] == [True, True, False, False]
    assert (
        choice.text
        == "loss 0.30 [0.10, 0.50] points of agreement, 0.15 [0.05, 0.25] % of tokens a step, 8000 positions"
    )
    assert len(choice.text) <= 127
    strict = _choice(rows, "draft_head", 0.05, FIGURES, reused=False)
    assert strict.value == "Q8_0" and "none smaller loses less" in strict.text
    assert _choice(rows, "draft_head", 3.0, FIGURES, reused=False).value == "Q2_K"


def test_it_is_measured_once_and_kept(question: Question) -> None:
    assert known_choice(question) is None
    choice = measure(question)
    assert not choice.reused and choice.positions == 2 * 8 * 255
    measured = question.policy.parameters["draft_head"].measured
    assert choice.value in measured and choice.candidates[0].value == measured[1]
    sizes = [one.head_bytes for one in choice.candidates]
    assert sizes == sorted(sizes, reverse=True)
    again = measure(question)
    assert again.reused and replace(again, reused=False) == choice
    assert known_choice(question) == again
    # another bound is another choice from the same measurements, as far as they reach
    loose = replace(question, parameters={**question.parameters, "draft_loss": 50})
    assert (known_choice(loose) is None) == (len(choice.candidates) < len(measured) - 1)
    assert measure(loose).value == measured[-1]
    assert (known := known_choice(loose)) is not None and known.bound == 50 and known.value == measured[-1]


@pytest.mark.parametrize("policy, given, name", [
    ("i-nano", {}, None), ("i-nano", {"draft_head": "AUTO"}, "draft_head"), ("i-nano-mtp", {}, "draft_head"),
    ("i-nano-mtp", {"draft_head": "Q4_K"}, None), ("uniform", {}, None),
])  # fmt: skip
def test_which_policies_measure(policy: str, given: dict[str, str], name: str | None) -> None:
    assert parameter_at_auto(load_plugins().policy(policy), given) == name


def test_what_cannot_be_measured_is_refused(
    question: Question, headless_imatrix: Path, testbed: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataMissing, match="no imatrix was given"):
        measure(replace(question, imatrix=None))
    with pytest.raises(DataMissing, match="has no data for the draft head"):
        measure(replace(question, imatrix=headless_imatrix))
    headless = read_model(gguf_edit.without_head(testbed, tmp_path / "headless.gguf"), load_plugins().role_of)
    with pytest.raises(EvaluationRefused, match="has no draft head, which draft_head=auto would measure"):
        measure(replace(question, model=headless))


def test_without_text_and_chat_template_it_says_how_to_give_a_text(
    tools: Toolset, testbed: Path, calibrated: Path, tmp_path: Path
) -> None:
    bare = gguf_edit.copy(testbed, tmp_path / "bare.gguf", keys={"tokenizer.chat_template": None})
    ran = run_apex(
        "quantize", bare, *AUTO, "--imatrix", calibrated, "-o", tmp_path / "o.gguf", code=ChatTemplateFailed.exit_code
    )
    assert "no chat template" in ran.stderr and "--text FILE" in ran.stderr


def test_a_file_whose_head_was_not_measured_says_so(
    tools: Toolset, testbed: Path, calibrated: Path, tmp_path: Path
) -> None:
    plain = run_apex(
        "quantize", testbed, "--policy", "i-nano", *SMALL, "--imatrix", calibrated, "-o", tmp_path / "plain.gguf"
    )
    assert "its loss was not measured on this model (draft_head=auto measures it)" in plain.stdout


def test_a_plan_without_a_measurement_is_cautious_and_says_so(tools: Toolset, testbed: Path) -> None:
    ran = run_apex("plan", testbed, "--policy", "i-nano-mtp", "--json")
    types = {t["name"]: t["type"] for t in json.loads(ran.stdout)["tensors"] if t["draft_head"]}
    assert types["blk.6.ffn_up_exps.weight"] == "Q3_K" and types["blk.6.nextn.eh_proj.weight"] == "Q5_K"
    assert "not measured on this model" in run_apex("plan", testbed, "--policy", "i-nano-mtp").stderr


def test_an_interrupted_measurement_is_resumed_and_shown_and_the_file_says_it(
    tools: Toolset, testbed: Path, calibrated: Path, heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APEX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("APEX_TOOLS", str(tools.root))
    out = tmp_path / "out.gguf"
    given = ("--text", heldout / "chat.txt", "--imatrix", calibrated, "-o", out)
    command = ["quantize", testbed, *AUTO, *given]
    dry = run_apex(*command, "--dry-run")
    assert "not measured" in dry.stdout and not out.exists()
    with (
        gated(tools, tmp_path / "gate", "llama-quantize", having="--override-kv") as gate,
        started(gate, command) as child,
    ):
        for files in range(5):  # some are written before one is measured
            gate.next(child, after=files)
            if measured((tmp_path / "cache").glob("evaluation/auto/*/sweep.jsonl")):
                break
            gate.let(1)
        child.send_signal(signal.SIGINT)
        _, stderr = child.communicate(timeout=120)
    assert child.returncode == 130 and "Traceback" not in stderr and not out.exists()
    (kept,) = (tmp_path / "cache").glob("evaluation/auto/*/sweep.jsonl")
    before = {
        line["identity"]: line["measured"]
        for line in map(json.loads, kept.read_text().splitlines())
        if line["measured"]
    }
    ran = run_apex(*command)
    after = {line["identity"]: line["measured"] for line in map(json.loads, kept.read_text().splitlines())}
    assert before and before.items() <= after.items()
    assert "loss of agreement, points" in ran.stderr and "IQ2_XXS+Q4_K" in ran.stderr
    assert "draft head: " in ran.stdout
    assert "points of agreement" in ran.stdout or "Q8_0: none smaller loses less than 0.5 points" in ran.stdout
    manifest = json.loads(out.with_name("out.gguf.json").read_text())
    assert manifest["parameters"]["draft_head"] != "auto" and "apex.draft_loss" in manifest["from"]
