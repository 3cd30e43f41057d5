"""The evaluator `draft-acceptance` on the testbed: its figures are consistent, and its errors are reported."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from children import servers
from gguf_edit import uneven_norms

from apex_build.errors import EvaluationRefused, ParameterUnknown, ToolKilled
from apex_build.evaluation.run import Inputs, Work, evaluate, plan_work
from apex_build.evaluation.task import Prompt, read_prompts
from apex_build.gguf_model.model import read_model
from apex_build.hookspecs import Figure
from apex_build.native import server as native_server
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins
from apex_build.progress import Step

WorkOf = Callable[..., Work]
Values = dict[tuple[str, str], Figure]


def measured(work: Work) -> Values:
    return {(figure.name, figure.domain): figure for figure in work.evaluator.evaluate(work.task)}


@pytest.fixture
def prompts(heldout: Path) -> Inputs:
    """Twelve prompts, three from each domain."""
    return Inputs(prompts=read_prompts(heldout / "prompts.jsonl")[::4])


def test_the_figures_fit_together(work_of: WorkOf, prompts: Inputs) -> None:
    steps: list[Step] = []
    work = work_of("draft-acceptance", prompts, report=steps.append, lengths="3,1", n_predict="24")
    found = measured(work)
    assert [(step.done, step.total, step.unit) for step in steps] == [(n, 12 * 5, "prompts") for n in range(1, 61)]
    for mode in ("greedy", "sampled"):
        for length in (1, 3):
            name = f"{mode}.n{length}"
            drafted, accepted = (found[f"{name}.{what}", ""].value or 0 for what in ("drafted", "accepted"))
            for what in ("drafted", "accepted"):
                domains = [figure.value or 0 for key, figure in found.items() if key[0] == f"{name}.{what}" and key[1]]
                assert len(domains) == 4 and sum(domains) == found[f"{name}.{what}", ""].value
            rate = found[f"{name}.acceptance", ""]
            assert rate.value == pytest.approx(100 * accepted / drafted) and rate.n == 12
            assert rate.low is not None and rate.high is not None and rate.low < (rate.value or 0) < rate.high
            places = [found[f"{name}.acceptance_at_{place}", ""].value or 0 for place in range(1, length + 1)]
            assert places == sorted(places, reverse=True)  # a token is accepted only after the one before it
            assert length == 3 or places == [pytest.approx(rate.value)]
            assert 1 < (found[f"{name}.tokens_per_step", ""].value or 0) <= 1 + length
    assert (found["greedy.n3.tokens_per_step", ""].value or 0) > (found["greedy.n1.tokens_per_step", ""].value or 0)
    assert (found["greedy.n1.same_text", ""].value or 0) >= 75  # a near tie may fall otherwise with another batch
    assert ("sampled.n1.same_text", "") not in found


def test_the_same_seed_gives_the_same_figures(work_of: WorkOf, prompts: Inputs) -> None:
    few = Inputs(prompts=prompts.prompts[:4])
    once, again = (measured(work_of("draft-acceptance", few, lengths="2", n_predict="16")) for _ in range(2))
    assert once == again
    other = measured(work_of("draft-acceptance", few, lengths="2", n_predict="16", seed="77"))
    assert {key: other[key] for key in once if key[0].startswith("greedy")} == {
        key: once[key] for key in once if key[0].startswith("greedy")
    }
    assert other != once
    greedy_only = measured(work_of("draft-acceptance", few, lengths="2", n_predict="16", temperature="0"))
    assert not any(name.startswith("sampled") for name, _ in greedy_only)


def test_the_rows_are_the_servers_own_or_as_asked_for(
    rows_choice: None, tools: Toolset, testbed: Path, prompts: Inputs, tmp_path: Path
) -> None:
    """With final norms as uneven as these, and a head trained for rows before them."""
    plugins = load_plugins()
    evaluator = plugins.evaluators()["draft-acceptance"]
    model = read_model(uneven_norms(testbed, tmp_path / "uneven.gguf"), plugins.role_of)
    few = prompts.prompts[:6]
    rates = {}
    for rows in ("auto", "post", "pre"):
        settings = {"lengths": "1", "n_predict": "32", "temperature": "0", "rows": rows}
        inputs = Inputs(prompts=few, settings={f"draft-acceptance.{name}": value for name, value in settings.items()})
        found = measured(plan_work(evaluator, model, inputs, tools, threads=1))
        rates[rows] = found["greedy.n1.acceptance", ""].value or 0
    assert rates["auto"] == rates["post"] < rates["pre"]


def test_a_prompt_longer_than_the_context_is_named_before_anything_is_written(work_of: WorkOf, prompts: Inputs) -> None:
    steps: list[Step] = []
    long = Prompt("chat", "<|im_start|>user\n" + "Tell me more. " * 300, "prompts.jsonl:7")
    work = work_of("draft-acceptance", Inputs(prompts=(*prompts.prompts, long)), report=steps.append, context="1024")
    says = (
        r"prompts\.jsonl:7: the prompt has \d{3,4} tokens, and 48 are to be written after it, but the context "
        r"holds 1024"
    )
    with pytest.raises(EvaluationRefused, match=says):
        work.evaluator.evaluate(work.task)
    assert not steps


@pytest.mark.parametrize(
    ("name", "value"), [("lengths", "0"), ("lengths", "2,,3"), ("lengths", "many"), ("n_predict", "1"), ("rows", "x")]
)
def test_settings_that_make_no_sense(work_of: WorkOf, prompts: Inputs, name: str, value: str) -> None:
    work = work_of("draft-acceptance", prompts, **{name: value})
    with pytest.raises(ParameterUnknown, match=rf"draft-acceptance\.{name} takes .* not '?{value}"):
        work.evaluator.evaluate(work.task)


def test_a_server_that_is_killed_while_it_writes(work_of: WorkOf, prompts: Inputs, tmp_path: Path) -> None:
    """The error names the signal, nothing is recorded, no server keeps running, and the other evaluators still run."""
    killed: list[int] = []

    def kill(step: Step) -> None:
        if step.done == 2 and not killed:
            killed.extend(servers())
            os.kill(killed[0], signal.SIGKILL)

    dying = work_of("draft-acceptance", prompts, report=kill, lengths="1")
    other = work_of("speed", prompt="8", generate="4", repetitions="1")
    first, second = evaluate([dying, other], tmp_path / "results.jsonl")
    assert isinstance(first.error, ToolKilled) and "llama-server was ended by SIGKILL" in first.error.message
    assert len(killed) == 1 and not first.figures and not servers()
    assert second.error is None and len(second.figures) == 2
    assert (tmp_path / "results.jsonl").read_text().count("\n") == 1


def test_a_server_that_does_not_tell_of_its_drafts(
    work_of: WorkOf, prompts: Inputs, tools: Toolset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older llama.cpp: it reports the totals, and we do not guess the rest."""
    monkeypatch.setattr(native_server, "_LOG_WAIT", 0.3)
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "llama-server"
    script.write_text(f'#!/bin/sh\nunset LLAMA_TRACE\nexec "{tools.tool("llama-server")}" "$@"\n')
    script.chmod(0o755)
    for library in tools.bin.glob("lib*.so*"):
        (tmp_path / "bin" / library.name).symlink_to(library)
    work = work_of(
        "draft-acceptance",
        Inputs(prompts=prompts.prompts[:2]),
        tools=Toolset(tmp_path),
        lengths="2",
        n_predict="16",
        temperature="0",
    )
    found = measured(work)
    assert not any(domain for _, domain in found)  # both prompts are chat
    assert (found["greedy.n2.drafted", ""].value or 0) > 0 and found["greedy.n2.acceptance", ""].value is not None
    for name in ("greedy.n2.acceptance_at_1", "greedy.n2.tokens_per_step"):
        assert found[name, ""].value is None and "does not report each draft" in found[name, ""].note
