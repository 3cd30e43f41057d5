"""The evaluator `speed` on the testbed. The times are not checked, since the machine may be busy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from children import servers

from apex_build.errors import EvaluationRefused, ParameterUnknown, ToolFailed
from apex_build.evaluation.run import Inputs, Work
from apex_build.evaluation.task import read_prompts
from apex_build.native.toolset import Toolset
from apex_build.progress import Step

WorkOf = Callable[..., Work]
QUICK = {"prompt": "16", "generate": "8", "repetitions": "3"}


def test_llama_bench_alone(work_of: WorkOf) -> None:
    """Comparing with drafting needs prompts."""
    work = work_of("speed", **QUICK)
    assert work.evaluator.timed
    prompt, generation = work.evaluator.evaluate(work.task)
    assert (prompt.name, generation.name) == ("prompt", "generation")
    for figure in (prompt, generation):
        assert figure.unit == "tokens/s" and figure.n == 3 and "standard deviation" in figure.note
        assert (
            figure.low is not None and figure.high is not None and 0 <= figure.low < (figure.value or 0) < figure.high
        )
    once = work_of("speed", **{**QUICK, "repetitions": "1"})
    single, _ = once.evaluator.evaluate(once.task)
    assert single.value and single.low is single.high is None


def test_with_and_without_drafting_side_by_side(work_of: WorkOf, heldout: Path) -> None:
    """Both rates and their ratio come from one run, over the same prompts."""
    steps: list[Step] = []
    prompts = Inputs(prompts=read_prompts(heldout / "prompts.jsonl")[::4])
    work = work_of("speed", prompts, report=steps.append, **QUICK)
    found = {figure.name: figure for figure in work.evaluator.evaluate(work.task)}
    assert set(found) == {"prompt", "generation", "end_to_end.plain", "end_to_end.drafting", "end_to_end.ratio"}
    plain, drafting, ratio = (found[f"end_to_end.{name}"] for name in ("plain", "drafting", "ratio"))
    assert plain.n == drafting.n == ratio.n == 12
    assert ratio.value == pytest.approx(
        (drafting.value or 0) / (plain.value or 1), rel=0.2
    )  # exact where the texts are as long
    for figure in (plain, drafting, ratio):
        assert figure.low is not None and figure.high is not None and figure.low <= (figure.value or 0) <= figure.high
    assert [step.done for step in steps if step.unit == "prompts"] == list(range(1, 13))
    without = work_of("speed", prompts, n_max="0", **QUICK)
    assert len(without.evaluator.evaluate(without.task)) == 2


def test_no_memory_for_two_servers(work_of: WorkOf, heldout: Path, tools: Toolset, tmp_path: Path) -> None:
    """It is an error, and not hidden by moving part of the second one off the GPU: both get --fit off."""
    (tmp_path / "bin").mkdir()
    for path in tools.bin.iterdir():
        (tmp_path / "bin" / path.name).symlink_to(path)
    script = tmp_path / "bin" / "llama-server"
    script.unlink()
    given = tmp_path / "given.txt"
    script.write_text(
        f'#!/bin/sh\necho "$*" >> {given}\n'
        'case "$*" in *draft-mtp*) echo "failed to allocate CUDA0 buffer"; exit 1;; esac\n'
        f'exec "{tools.tool("llama-server")}" "$@"\n'
    )
    script.chmod(0o755)
    prompts = Inputs(prompts=read_prompts(heldout / "prompts.jsonl")[:1])
    work = work_of("speed", prompts, tools=Toolset(tmp_path), **QUICK)
    with pytest.raises(ToolFailed, match="memory ran out") as caught:
        work.evaluator.evaluate(work.task)
    assert caught.value.hint and "in memory twice" in caught.value.hint and "--set speed.n_max=0" in caught.value.hint
    assert [" --fit off" in line for line in given.read_text().splitlines()] == [True, True] and not servers()


def test_what_is_refused(work_of: WorkOf, heldout: Path) -> None:
    for name in QUICK:
        work = work_of("speed", **{**QUICK, name: "0"})
        with pytest.raises(ParameterUnknown, match=rf"speed\.{name} takes a number from 1"):
            work.evaluator.evaluate(work.task)
    prompts = Inputs(prompts=read_prompts(heldout / "prompts.jsonl"))
    work = work_of("speed", prompts, context="256", **QUICK)
    with pytest.raises(
        EvaluationRefused, match=r"prompts\.jsonl:\d+: the prompt has \d+ tokens, and 8 are to be written"
    ):
        work.evaluator.evaluate(work.task)
