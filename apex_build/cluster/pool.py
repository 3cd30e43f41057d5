"""Shards as tasks of a cluster, put in place here by content."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from apex_build.calibration.run import Job, Settings
from apex_build.calibration.shards import Shard, ShardRecord, Task, Together, counts_file, parts_of
from apex_build.cluster import worker as remote
from apex_build.cluster.connect import Cluster
from apex_build.cluster.tasks import ClusterTasks, order_of
from apex_build.errors import ClusterFailed
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.imatrix import read_imatrix
from apex_build.native.run import unwinding_signals
from apex_build.native.toolset import Toolset
from apex_build.progress import Report, Step
from apex_build.storage.artifacts import Artifact, making
from apex_build.storage.digests import sha256_file, sha256_json
from apex_build.storage.disk import writing
from apex_build.storage.manifest import IMATRIX
from apex_build.storage.outputs import LOG, beside, whole_file

if TYPE_CHECKING:
    from distributed import Future


@dataclass
class ClusterPool:
    cluster: Cluster
    model: Model
    tools: Toolset
    settings: Settings
    tasks: ClusterTasks = field(init=False)

    def __post_init__(self) -> None:
        self.tasks = ClusterTasks(self.cluster, self.tools, (self.model,))

    def __call__(self, tasks: Sequence[Task], report: Report) -> None:
        """Make the file of each task (`shards.Pool`). Raises ClusterFailed, WorkersUnfit, and what a shard raises."""
        together = Together(report, tasks)

        def submit(number: int) -> Future:
            task = tasks[number]
            # the same for two clients that need the same shards: each is made once, and both get it
            key = f"apex-shard-{sha256_json(parts_of(self.model, task, self.settings, self.tools))[:32]}"
            return self.tasks.submit(remote.run_shard, self._order(task), key, together.of(number))

        def take(number: int, future: Future) -> None:
            self._take(tasks[number], f"shard {number + 1} of {len(tasks)}", future)
            together.whole(number)

        missing: list[int] = []
        for number, task in enumerate(tasks):
            if _is_there(self.model, task, self.tools, self.settings):
                together.whole(number)
            else:
                missing.append(number)
        if missing:
            with unwinding_signals():
                self.tasks.run(missing, submit, take, together.report)

    def count(self, job: Job, text: Path) -> int:
        """Chunks of a text, counted by a worker: here there may be no room for the model."""
        task = Task(text, job.text.sha256, Shard(0, 1), text)
        key = f"apex-count-{sha256_json([task.sha256, time.time()])[:24]}"
        job.report(Step("counting the text's chunks", 0))
        counted: list[int] = []
        with unwinding_signals():
            self.tasks.run(
                [0],
                lambda _: self.tasks.submit(remote.count, self._order(task), key),
                lambda _, future: counted.append(int(self.tasks.result(future, "counting the chunks"))),
                job.report,
            )
        return counted[0]

    def _order(self, task: Task) -> remote.ShardOrder:
        text = zlib.compress(task.text.read_bytes(), 6)
        return remote.ShardOrder(
            order_of(self.model), self.tools.identity, text, task.text.name, task.sha256, task.shard, task.every,
            self.settings,
        )  # fmt: skip

    def _take(self, task: Task, name: str, future: Future) -> None:
        result: remote.ShardResult = self.tasks.result(future, name)
        artifact = Artifact(task.out, IMATRIX, parts_of(self.model, task, self.settings, self.tools))
        with making(artifact, replace="own", wait=f"another run that takes {task.out.name}") as draft:
            if draft.found:
                return
            with writing(draft.part):
                draft.part.write_bytes(result.content)
            if sha256_file(draft.part) != result.details.get("sha256"):
                raise ClusterFailed(f"{name} arrived damaged", hint="run the same command again")
            read_imatrix(draft.part)
            if result.counts:
                with whole_file(counts_file(task.out)) as part:
                    part.write_bytes(result.counts)
            log = beside(task.out, LOG)
            with writing(log):
                log.write_bytes(result.log)
            seconds = result.details.get("seconds")
            draft.done(ShardRecord(result.details.get("perplexity"), float(seconds or 0), result.details.get("device")))


def _is_there(model: Model, task: Task, tools: Toolset, settings: Settings) -> bool:
    found = Artifact(task.out, IMATRIX, parts_of(model, task, settings, tools)).found()
    noted = not task.every or counts_file(task.out).is_file()
    return found is not None and noted and found.describes(task.out)
