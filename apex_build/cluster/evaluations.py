"""Evaluations as tasks of a cluster: one for each evaluator and file. What is timed is measured here."""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apex_build.cluster import worker as remote
from apex_build.cluster.connect import Cluster
from apex_build.cluster.tasks import ClusterTasks, order_of
from apex_build.errors import ApexError, ClusterFailed, WorkersUnfit
from apex_build.evaluation.run import Result, Work, checked, evaluate, kept, recorded
from apex_build.native.run import unwinding_signals
from apex_build.native.toolset import Toolset
from apex_build.progress import Report
from apex_build.storage.digests import sha256_json

if TYPE_CHECKING:
    from distributed import Future


def to_send(works: Sequence[Work], results: Path | None, *, force: bool = False) -> list[Work]:
    """Those of which a cluster makes tasks: neither recorded nor timed."""
    known = {} if force or results is None else recorded(results)
    return [work for work in works if not work.evaluator.timed and work.identity not in known]


@dataclass
class ClusterEvaluations:
    cluster: Cluster
    tools: Toolset
    report: Report

    def __call__(
        self, works: Sequence[Work], results: Path | None, *, force: bool = False
    ) -> Generator[Result, None, None]:
        """As `evaluation.run.evaluate`: first what is recorded, then what the workers measure, as soon as each is done,
        then what is timed. Results are recorded as they arrive, so none is lost with the scheduler.
        """
        sent = to_send(works, results, force=force)
        here = [work for work in works if work not in sent]
        yield from evaluate([work for work in here if not work.evaluator.timed], results)
        yield from self._sent(sent, results) if sent else ()
        yield from evaluate([work for work in here if work.evaluator.timed], results, force=force)

    def _sent(self, works: Sequence[Work], results: Path | None) -> Iterator[Result]:
        models = {model.path: model for work in works for model in (work.task.model, work.task.reference) if model}
        tasks = ClusterTasks(self.cluster, self.tools, tuple(models.values()))

        def submit(number: int) -> Future:
            work = works[number]
            # also by the model's path: two clients may mean the same file by two names
            key = sha256_json([work.identity, str(work.task.model.path.absolute())])
            return tasks.submit(remote.run_evaluation, _order(work), f"apex-evaluation-{key[:32]}", work.task.report)

        with unwinding_signals(), closing(tasks.each(range(len(works)), submit, self.report)) as done:
            for number, future in done:
                work = works[number]
                try:
                    figures, seconds = tasks.result(future, f"{work.evaluator.name} of {work.task.model.path.name}")
                    result = Result(work, checked(work.evaluator, figures), seconds)
                except (ClusterFailed, WorkersUnfit):
                    raise
                except ApexError as error:
                    yield Result(work, (), 0.0, error=error)
                else:
                    yield from kept(result, results)


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
