"""Speed: llama-bench, and llama-server with and without drafting side by side."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from apex_build.plugin_api import (
    GENERATED,
    Evaluator,
    Figure,
    Parameter,
    ParameterUnknown,
    Prompt,
    Server,
    Step,
    Task,
    ToolFailed,
    ToolKilled,
    hookimpl,
    ratio_interval,
    student,
    tokens_of,
)

APEX_API = 3

_UNIT = "tokens/s"


@hookimpl
def apex_evaluators() -> list[Evaluator]:
    return [
        Evaluator(
            name="speed",
            evaluate=evaluate,
            uses=("prompts",),
            timed=True,
            parameters={
                "prompt": Parameter(512, "int", "llama-bench: tokens of the prompt"),
                "generate": Parameter(128, "int", "llama-bench: tokens generated; and those written after each prompt"),
                "repetitions": Parameter(5, "int", "llama-bench: how often each is timed"),
                "n_max": Parameter(2, "int", "tokens drafted at a time; 0: no comparison with drafting"),
                "context": Parameter(2048, "int", "the servers' context: a prompt and its continuation"),
            },
            headline=(("generation", "speed"), ("end_to_end.drafting", "drafting")),
            runs=_runs,
            description="llama-bench; and, for a file with a draft head and prompts, llama-server with and without "
            "drafting",
        )
    ]


def _runs(task: Task) -> dict[str, float]:
    name, written = f"{task.evaluator}: {task.model.path.name}", task.number("generate") * GENERATED
    runs = {f"{name}, llama-bench": (task.number("repetitions") + 1) * (task.number("prompt") + written)}
    if task.prompts and task.model.has_head and task.number("n_max"):
        read = sum(tokens_of(len(prompt.text.encode())) for prompt in task.prompts)
        runs[name] = 2 * (read + len(task.prompts) * written)
    return runs


@dataclass(frozen=True)
class Timing:
    """One answer: tokens written, and the seconds from the request to its end, the prompt's evaluation among them."""

    tokens: int
    seconds: float


def evaluate(task: Task) -> list[Figure]:
    for name in ("prompt", "generate", "repetitions"):
        if not task.number(name):
            raise ParameterUnknown(f"speed.{name} takes a number from 1")
    figures = _bench(task)
    if task.prompts and task.model.has_head and task.number("n_max"):
        figures += _end_to_end(task)
    return figures


def _bench(task: Task) -> list[Figure]:
    """Mean of the repetitions, with the interval that their scatter gives; the tool warms up before each."""
    repetitions = task.number("repetitions")
    task.report(Step(f"{task.evaluator}: {task.model.path.name}, llama-bench", 0))
    run = task.run(
        "llama-bench", "--model", task.model.path, "--output", "jsonl", "--repetitions", str(repetitions),
        "--n-prompt", str(task.number("prompt")), "--n-gen", str(task.number("generate")),
    )  # fmt: skip
    rows = [row for line in run.lines if (row := _row(line)) is not None]
    figures = []
    for name, key in (("prompt", "n_prompt"), ("generation", "n_gen")):
        samples = next(([float(sample) for sample in row["samples_ts"]] for row in rows if row[key]), [])
        if len(samples) != repetitions:
            tail = "".join(f"\n  | {line}" for line in run.lines[-5:])
            raise ToolFailed(f"llama-bench gave {len(samples)} times for {key}, expected {repetitions}{tail}")
        mean = statistics.fmean(samples)
        spread = statistics.stdev(samples) if repetitions > 1 else None
        half = None if spread is None else student(repetitions - 1) * spread / math.sqrt(repetitions)
        note = f"standard deviation {spread:.4g} between repetitions" if spread is not None else ""
        low, high = (None, None) if half is None else (max(0.0, mean - half), mean + half)
        figures.append(Figure(name, mean, low, high, _UNIT, repetitions, note=note, better="higher"))
    return figures


def _end_to_end(task: Task) -> list[Figure]:
    """Both servers up at once, each prompt given to one and then the other, so that what else the machine does meets
    both alike.
    """
    n_predict = task.number("generate")
    drafting = ("--spec-type", "draft-mtp", "--spec-draft-n-max", str(task.number("n_max")))
    # without --fit off the second server, finding the GPU's memory taken, would quietly put less on it than the first
    base = ("--parallel", "1", "--ctx-size", str(task.number("context")), "--fit", "off")
    with task.serve(*base) as plain, ExitStack() as stack:
        try:
            drafted = stack.enter_context(plain.beside(*drafting))
        except (ToolFailed, ToolKilled) as error:
            hint = (
                "the model is in memory twice for this comparison; where that is too much: --set "
                f"{task.evaluator}.n_max=0"
            )
            raise type(error)(error.message, hint=hint) from None
        plain.check_room(((prompt.origin, prompt.text) for prompt in task.prompts), n_predict)
        for server in (plain, drafted):
            _timed(server, task.prompts[0], n_predict)  # to warm up
        pairs = []
        for number, prompt in enumerate(task.prompts):
            if number % 2:
                with_drafts, without = _timed(drafted, prompt, n_predict), _timed(plain, prompt, n_predict)
            else:
                without, with_drafts = _timed(plain, prompt, n_predict), _timed(drafted, prompt, n_predict)
            pairs.append((without, with_drafts))
            task.report(Step(f"{task.evaluator}: {task.model.path.name}", number + 1, len(task.prompts), "prompts"))
    return _compare([prompt.domain for prompt in task.prompts], pairs)


def _timed(server: Server, prompt: Prompt, n_predict: int) -> Timing:
    began = time.monotonic()
    answer = server.completion(prompt.text, n_predict=n_predict, cache_prompt=False)
    return Timing(int(answer["tokens_predicted"]), time.monotonic() - began)


def _compare(domains: Sequence[str], pairs: Sequence[tuple[Timing, Timing]]) -> list[Figure]:
    """Rates over all prompts, and how many times faster the same tokens were written: each prompt has both times, so
    the interval is of their ratio. Where the two texts differ in length, the time without drafting is taken in
    proportion.
    """
    strata = [sorted(set(domains)).index(domain) for domain in domains]
    rates = {
        f"end_to_end.{name}": ratio_interval(
            [pair[side].tokens for pair in pairs], [pair[side].seconds for pair in pairs], strata
        )
        for side, name in enumerate(("plain", "drafting"))
    }
    without = [plain.seconds * drafted.tokens / max(1, plain.tokens) for plain, drafted in pairs]
    ratio = ratio_interval(without, [drafted.seconds for _, drafted in pairs], strata)
    note = "with drafting over without, from one run with the prompts in turn"
    return [
        *(
            Figure(name, rate.value, rate.low, rate.high, _UNIT, len(pairs), better="higher")
            for name, rate in rates.items()
        ),
        Figure("end_to_end.ratio", ratio.value, ratio.low, ratio.high, "", len(pairs), note=note, better="higher"),
    ]


def _row(line: str) -> dict[str, Any] | None:
    """A line of llama-bench --output jsonl, among the lines of its log."""
    if not line.startswith("{"):
        return None
    try:
        row = json.loads(line)
        return row if isinstance(row["samples_ts"], list) and {"n_prompt", "n_gen"} <= set(row) else None
    except (ValueError, TypeError, KeyError):
        return None
