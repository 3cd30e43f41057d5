"""Evaluations as tasks of a cluster: one for each evaluator and file. What is timed is measured here."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apex_build.cluster import worker as remote
from apex_build.cluster.connect import Cluster
from apex_build.cluster.tasks import ClusterTasks, order_of
from apex_build.errors import ApexError, ClusterFailed, WorkersUnfit
from apex_build.evaluation.run import Result, Work, evaluate, recorded, taken
from apex_build.gguf_model.catalogue import Model
from apex_build.native.run import unwinding_signals
from apex_build.native.toolset import Toolset
from apex_build.progress import Report, Step
from apex_build.storage.digests import sha256_json

if TYPE_CHECKING:
    from distributed import Future


@dataclass
class ClusterEvaluations:
    cluster: Cluster
    tools: Toolset
    report: Report

    def __call__(self, works: Sequence[Work], results: Path | None, *, force: bool = False) -> Iterator[Result]:
        """As `evaluation.run.evaluate`. Results are recorded as they arrive, so none is lost with the scheduler."""
        known = {} if force or results is None else recorded(results)
        sent = [work for work in works if not work.evaluator.timed and work.identity not in known]
        yield from self._all(sent, results) if sent else ()
        rest = [work for work in works if work not in sent]
        yield from evaluate(rest, results, force=force)

    def _all(self, works: list[Work], results: Path | None) -> list[Result]:
        models: dict[Path, Model] = {}
        for work in works:
            for model in (work.task.model, work.task.reference):
                if model is not None:
                    models[model.path] = model
        tasks = ClusterTasks(self.cluster, self.tools, tuple(models.values()))
        done: dict[int, Result] = {}

        def submit(number: int) -> Future:
            # also by the model's path: two clients may mean the same file by two names
            key = sha256_json([works[number].identity, str(works[number].task.model.path.absolute())])
            return tasks.submit(remote.run_evaluation, _order(works[number]), f"apex-evaluation-{key[:32]}")

        def take(number: int, future: Future) -> None:
            work = works[number]
            name = f"{work.evaluator.name} of {work.task.model.path.name}"
            try:
                figures, seconds = tasks.result(future, name)
                done[number] = taken(work, figures, seconds, results)
            except (ClusterFailed, WorkersUnfit):
                raise
            except ApexError as error:
                done[number] = Result(work, (), 0.0, error=error)
            self.report(Step("evaluating", len(done), len(works), "measurements"))

        with unwinding_signals():
            tasks.run(range(len(works)), submit, take, self.report)
        return [done[number] for number in range(len(works))]


def _order(work: Work) -> remote.EvaluationOrder:
    task = work.task
    return remote.EvaluationOrder(
        evaluator=work.evaluator.name,
        version=work.evaluator.version,
        code=task.code,
        model=order_of(task.model),
        reference=order_of(task.reference) if task.reference else None,
        tools=task.tools.identity,
        texts={domain: zlib.compress(path.read_bytes(), 6) for domain, path in task.texts.items()},
        prompts=task.prompts,
        data=zlib.compress(task.data.read_bytes(), 6) if task.data else None,
        data_name=task.data.name if task.data else "",
        settings=dict(task.settings),
        threads=task.threads,
        options=task.options,
    )
