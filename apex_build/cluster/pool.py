"""Shards as tasks of a cluster: one each, taken from whatever worker is fit, put in place here by content."""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apex_build.calibration.run import Job, Settings
from apex_build.calibration.shards import Shard, ShardRecord, Task, Together, counts_file, parts_of
from apex_build.cluster import worker as remote
from apex_build.cluster.connect import Cluster
from apex_build.errors import ApexError, ClusterFailed, WorkersUnfit
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.fingerprint import fingerprint
from apex_build.gguf_model.imatrix import read_imatrix
from apex_build.native.run import unwinding_signals
from apex_build.native.toolset import Toolset
from apex_build.progress import Report, Step
from apex_build.storage.artifacts import Artifact, making
from apex_build.storage.digests import sha256_file, sha256_json
from apex_build.storage.manifest import IMATRIX
from apex_build.storage.outputs import LOG, beside, whole_file

if TYPE_CHECKING:
    from distributed import Future

_BLOCK = 32 << 20
_LOOK = 1.0  # seconds between two looks at the workers
_ALONE = 60.0  # seconds without a worker, before it is given up
_LOST = "what is done is kept: start the scheduler and the workers again, then the same command"


@dataclass
class ClusterPool:
    cluster: Cluster
    model: Model
    tools: Toolset
    settings: Settings
    ready: set[str] = field(default_factory=set)  # workers that have the model

    @property
    def order(self) -> remote.ModelOrder:
        model = self.model
        names = tuple(path.name for path in model.files)
        return remote.ModelOrder(str(model.path.absolute()), fingerprint(model), names)

    def __call__(self, tasks: Sequence[Task], report: Report) -> None:
        """Make the file of each task (`shards.Pool`). Raises ClusterFailed, WorkersUnfit, and what a shard raises."""
        together = Together(report, tasks)
        # the same for two clients that want the same shards: those are made once, and both are told
        topic = f"apex-{sha256_json([[task.sha256, task.shard.first] for task in tasks])[:16]}"

        def told(event: tuple[float, dict[str, Any]]) -> None:
            said = event[1]
            together.of(said["number"])(Step("calibrating", said["done"], said["total"], "chunks"))

        missing: list[int] = []
        for number, task in enumerate(tasks):
            if _is_there(self.model, task, self.tools, self.settings):
                together.of(number)(Step("calibrating", task.shard.chunks, task.shard.chunks, "chunks"))
            else:
                missing.append(number)
        if not missing:
            return
        with unwinding_signals():
            try:
                self.cluster.client.subscribe_topic(topic, told)
                self._all(tasks, missing, topic, together)
            except (OSError, TimeoutError) as error:
                raise self._lost(str(error)) from None

    def count(self, job: Job, text: Path) -> int:
        """Chunks of a text, counted by a worker: here there may be no room for the model."""
        self._prepare(job.report)
        task = Task(text, job.text.sha256, Shard(0, 1), text)
        order = replace(self._order(task, 0, ""), settings=job.settings)
        job.report(Step("counting the text's chunks", 0))
        address = sorted(self.cluster.fit)[0]
        key = f"apex-count-{sha256_json([order.sha256, fingerprint(self.model), time.time()])[:24]}"
        future = self.cluster.client.submit(remote.count, order, key=key, workers=[address], allow_other_workers=False)
        with unwinding_signals():
            return int(self._result(future, "counting the chunks"))

    def _all(self, tasks: Sequence[Task], missing: list[int], topic: str, together: Together) -> None:
        waiting: dict[int, Future] = {}
        allowed: dict[int, set[str]] = {}
        alone: float | None = None
        try:
            while missing or waiting:
                self._alive()
                self.cluster.look(self.tools)
                if self.cluster.fit:
                    alone = None
                    self._prepare(together.report)
                else:
                    alone = alone or time.monotonic()
                    if time.monotonic() - alone > _ALONE:
                        self.cluster.check()
                for number in [one for one in waiting if not allowed[one] & self.ready]:
                    # its workers are gone, and where some are refused it may not go to just any other
                    self.cluster.client.cancel([waiting.pop(number)])
                    missing.append(number)
                if self.ready:
                    for number in missing:
                        waiting[number] = self._submit(tasks[number], number, topic)
                        allowed[number] = set(self.ready)
                    missing = []
                if not waiting:
                    time.sleep(_LOOK)
                    continue
                _await([*waiting.values()])
                for number in [one for one, future in waiting.items() if future.done()]:
                    future = waiting.pop(number)
                    self._take(tasks[number], number, future, len(tasks))
                    chunks = tasks[number].shard.chunks
                    together.of(number)(Step("calibrating", chunks, chunks, "chunks"))
        finally:
            if waiting and self.cluster.alive:
                self.cluster.client.cancel([*waiting.values()])

    def _alive(self) -> None:
        if not self.cluster.alive:
            raise self._lost("")

    def _lost(self, why: str) -> ClusterFailed:
        said = f": {why.splitlines()[0]}" if why else ""
        return ClusterFailed(f"{self.cluster.address}: the scheduler is gone{said}", hint=_LOST)

    def _submit(self, task: Task, number: int, topic: str) -> Future:
        order = self._order(task, number, topic)
        key = sha256_json(parts_of(self.model, task, self.settings, self.tools))
        resources = self._resources()
        restricted = bool(self.cluster.refused) or self.ready != set(self.cluster.fit)
        return self.cluster.client.submit(
            remote.run_shard,
            order,
            key=f"apex-shard-{key[:32]}",
            resources=resources or None,
            workers=sorted(self.ready) if restricted else None,
            allow_other_workers=False,
            pure=False,
        )

    def _resources(self) -> dict[str, float]:
        """What a shard takes, of the kinds that workers declare (dask worker --resources 'GPU=1 MEMORY=64e9')."""
        kinds = {kind for found in self.cluster.fit.values() for kind in found.resources}
        needed = {"GPU": 1.0, "MEMORY": float(sum(tensor.n_bytes for tensor in self.model.tensors))}
        wanted = {kind: amount for kind, amount in needed.items() if kind in kinds}
        most = [found.resources for found in self.cluster.fit.values()]
        if wanted and not any(all(has.get(kind, 0) >= amount for kind, amount in wanted.items()) for has in most):
            said = ", ".join(f"{kind}={amount:g}" for kind, amount in wanted.items())
            offered = "; ".join(str(has) for has in most[:3])
            raise WorkersUnfit(
                f"a shard of {self.model.path.name} takes {said}, and no worker of {self.cluster.address} declares as "
                f"much: {offered}",
                hint="dask worker --resources 'GPU=1 MEMORY=BYTES'; without that option any worker may take a shard",
            )
        return wanted

    def _order(self, task: Task, number: int, topic: str) -> remote.ShardOrder:
        text = zlib.compress(task.text.read_bytes(), 6)
        return remote.ShardOrder(
            self.order, self.tools.identity, text, task.text.name, task.sha256, task.shard, task.every, self.settings,
            topic, number,
        )  # fmt: skip

    def _result(self, future: Future, what: str) -> Any:
        """What a task gave. Raises its error, named."""
        while not future.done():
            self._alive()
            _await([future])
        if future.status == "finished":
            return future.result(timeout=60)
        self._alive()
        if future.status != "error":
            raise self._lost(f"{what} was {future.status}")
        error = future.exception(timeout=60)
        if isinstance(error, ApexError):
            error.message = f"{what}: {error.message}"
            raise error
        kind = type(error).__name__
        if kind == "KilledWorker":
            raise ClusterFailed(
                f"{what}: the workers that took it died, several times",
                hint="look at the workers' own output: most often memory ran out; then the same command again",
            )
        raise ClusterFailed(f"{what}: {kind}: {str(error).splitlines()[0] if str(error) else ''}", hint=_LOST)

    def _take(self, task: Task, number: int, future: Future, total: int) -> None:
        result: remote.ShardResult = self._result(future, f"shard {number + 1} of {total}")
        artifact = Artifact(task.out, IMATRIX, parts_of(self.model, task, self.settings, self.tools))
        with making(artifact, replace="own", wait=f"another run that takes {task.out.name}") as draft:
            if draft.found:
                return
            draft.part.write_bytes(result.content)
            if sha256_file(draft.part) != result.details.get("sha256"):
                raise ClusterFailed(f"shard {number + 1} of {total} arrived damaged", hint="the same command again")
            read_imatrix(draft.part)
            if result.counts:
                with whole_file(counts_file(task.out)) as part:
                    part.write_bytes(result.counts)
            beside(task.out, LOG).write_bytes(result.log)
            seconds = result.details.get("seconds")
            draft.done(ShardRecord(result.details.get("perplexity"), float(seconds or 0), result.details.get("device")))

    def _prepare(self, report: Report) -> None:
        """Let every fit worker have the model: at the same path, or sent, once for all that share a cache."""
        new = sorted(self.cluster.fit.keys() - self.ready)
        self.ready &= self.cluster.fit.keys()
        if not new:
            return
        has = self.cluster.client.run(remote.has_model, self.order, workers=new, on_error="return")
        sent: dict[tuple[str, str], bool] = {}
        for address, found in has.items():
            about = self.cluster.fit[address]
            place = about.host, about.cache
            if found is not True and place not in sent:
                sent[place] = self._send(address, about.host, report)
            if found is True or sent[place]:
                self.ready.add(address)

    def _send(self, address: str, host: str, report: Report) -> bool:
        client, order = self.cluster.client, self.order
        total = sum(path.stat().st_size for path in self.model.files)
        done = 0
        for path in self.model.files:
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    offset = file.tell() - len(block)
                    wrote = client.run(remote.write_block, order, path.name, offset, block, workers=[address])[address]
                    if wrote != hashlib.sha256(block).hexdigest():
                        raise ClusterFailed(f"{host} wrote another block of {path.name} than it was sent")
                    done += len(block)
                    report(Step(f"sending {self.model.path.name} to {host}", done / 1e6, total / 1e6, "MB"))
        if not client.run(remote.finish_model, order, workers=[address])[address]:
            raise ClusterFailed(f"{host}: the model that arrived is not {self.model.path}")
        return True


def _await(futures: Sequence[Future]) -> None:
    """Until one of them is done, but no longer than to the next look at the workers."""
    end = time.monotonic() + _LOOK
    while time.monotonic() < end and not any(future.done() for future in futures):
        time.sleep(0.05)


def _is_there(model: Model, task: Task, tools: Toolset, settings: Settings) -> bool:
    found = Artifact(task.out, IMATRIX, parts_of(model, task, settings, tools)).found()
    noted = not task.every or counts_file(task.out).is_file()
    return found is not None and noted and found.describes(task.out)
