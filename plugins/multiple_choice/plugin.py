"""Multiple-choice tasks, scored by llama-perplexity, from data files that the user gives."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from apex_build.plugin_api import (
    EvaluationRefused,
    Evaluator,
    Figure,
    Parameter,
    Step,
    Task,
    ToolFailed,
    hookimpl,
    logged_error,
    scratch_folder,
    share_interval,
    tasks_scored,
)

from .tasks import Reader, read_hellaswag, read_multiple_choice, read_winogrande

APEX_API = 3

_PARALLEL = 16  # sequences at once; each costs memory in models with a recurrent part

_EVALUATORS: tuple[tuple[str, str, Reader, str], ...] = (
    ("hellaswag", "--hellaswag", read_hellaswag, "HellaSwag: which of four endings is right? (normalized by tokens)"),
    ("winogrande", "--winogrande", read_winogrande, "Winogrande: which of two words fits the gap?"),
    ("mmlu", "--multiple-choice", read_multiple_choice, "MMLU: which answer is right? (normalized by tokens)"),
    ("arc", "--multiple-choice", read_multiple_choice, "ARC: which answer is right? (normalized by tokens)"),
    (
        "truthfulqa",
        "--multiple-choice",
        read_multiple_choice,
        "TruthfulQA: which answer is true? (normalized by tokens)",
    ),
)


@hookimpl
def apex_evaluators() -> list[Evaluator]:
    parameters = {
        "tasks": Parameter(0, "int", "number of tasks, chosen at random but always the same; 0: all"),
        "context": Parameter(
            2048, "int", "tokens evaluated at once; a task needs room for its question and all its answers"
        ),
    }
    return [
        Evaluator(
            name, functools.partial(evaluate, mode, read), ("data",), parameters=parameters, description=description
        )
        for name, mode, read, description in _EVALUATORS
    ]


def evaluate(mode: str, read: Reader, task: Task) -> list[Figure]:
    """The share of tasks whose right choice is the most likely one for the model, with its Wilson 95 % interval."""
    if task.data is None:
        raise EvaluationRefused(f"{task.evaluator} needs its data file", hint=f"--data {task.evaluator}=FILE")
    tasks = read(task.data, task.model.metadata.get("tokenizer.ggml.add_bos_token") is True)
    wanted = min(task.number("tasks") or tasks.count, tasks.count)
    parallel = max(_PARALLEL, tasks.answers)
    context = -(-task.number("context") // parallel)  # the tool's --ctx-size is for one sequence
    arguments = (mode, f"{mode}-tasks", str(wanted), "--parallel", str(parallel), "--ctx-size", str(context))
    task.report(Step(f"{task.evaluator}: {task.model.path.name}", 0, wanted, "tasks"))
    with scratch_folder("tasks") as scratch:
        file = scratch / "tasks"
        file.write_bytes(tasks.content)
        accuracy = _accuracy(task, mode, wanted, ("--binary-file", file, *arguments))
    notes = [f"{tasks.left_out} tasks left out, which the tool cannot score"] if tasks.left_out else []
    low, high = share_interval(round(accuracy * wanted / 100), wanted)
    note = "; ".join(notes)
    return [
        Figure(
            "accuracy", accuracy, 100 * low, 100 * high, "%", wanted, note=note, better="higher", label="right answers"
        )
    ]


def _accuracy(task: Task, mode: str, wanted: int, arguments: Sequence[str | Path]) -> float:
    """In percent, over all tasks asked for. The tool exits with code 0 even if it gave up. Raises ToolFailed."""
    run = task.run("llama-perplexity", "--model", task.model.path, *arguments)
    done, accuracy = tasks_scored(run.lines)
    if done == wanted:
        return accuracy
    _refuse_errors(task, run.lines)
    tail = "".join(f"\n  | {line}" for line in run.lines[-8:])
    raise ToolFailed(f"llama-perplexity {mode} printed scores of {done} of {wanted} tasks{tail}")


def _refuse_errors(task: Task, lines: Sequence[str]) -> None:
    """The tool exits with code 0 even if it gave up."""
    if (said := logged_error(lines)) is not None:
        fits = "does not fit in the context" in said
        hint = f"--set {task.evaluator}.context={4 * task.number('context')}" if fits else None
        raise ToolFailed(f"llama-perplexity failed: {said}", hint=hint)
