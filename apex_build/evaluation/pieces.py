"""The work of evaluators, as pieces of a whole with expected times."""

from __future__ import annotations

from collections.abc import Sequence

from apex_build.evaluation import pace
from apex_build.evaluation.run import Work
from apex_build.evaluation.task import Task
from apex_build.hookspecs import Evaluator
from apex_build.progress import Piece


def runs_of(evaluator: Evaluator, task: Task) -> dict[str, float]:
    """Tasks that it will report, and about how many tokens the model reads in each. One that does not say reads its
    inputs once.
    """
    if evaluator.runs is not None:
        return dict(evaluator.runs(task))
    read = sum(task.tokens_of_text(domain) for domain in task.texts)
    read += sum(pace.tokens_of(len(prompt.text)) + 48 * pace.GENERATED for prompt in task.prompts)
    read += pace.tokens_of(task.data.stat().st_size) if task.data else 0.0
    return {f"{evaluator.name}: {task.model.path.name}": read or 1.0}


def piece_of(works: Sequence[Work]) -> tuple[Piece, pace.Estimate]:
    """What some works are together, and how long that takes; measured where each of them was measured before."""
    runs: dict[str, float] = {}
    seconds, measured = 0.0, True
    for work in works:
        own = runs_of(work.evaluator, work.task)
        parameters = pace.active_parameters(work.task.model)
        found = pace.expect(work.evaluator.name, sum(own.values()) * parameters, gpu=work.task.gpu)
        seconds, measured = seconds + found.seconds, measured and found.measured
        runs |= {name: tokens * found.seconds / (sum(own.values()) or 1.0) for name, tokens in own.items()}
    kind = works[0].evaluator.name if len(works) == 1 else "+".join(sorted(work.evaluator.name for work in works))
    alone = any(work.evaluator.timed for work in works)
    return Piece(kind, runs, seconds, alone), pace.Estimate(seconds, measured)


def remember(work: Work, share: float, seconds: float) -> None:
    """Record the time of a work, of which `share` had to be done: the rest was cached."""
    tokens = sum(runs_of(work.evaluator, work.task).values()) * share
    parameters = pace.active_parameters(work.task.model)
    pace.remember(work.evaluator.name, tokens * parameters, seconds, gpu=work.task.gpu)
