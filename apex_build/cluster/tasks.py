"""Tasks on a cluster: each to whatever worker is fit and has the models, and again elsewhere where a worker is lost."""

from __future__ import annotations

import asyncio
import hashlib
import queue
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apex_build.cluster import worker as remote
from apex_build.cluster.connect import Cluster
from apex_build.errors import ApexError, ClusterFailed, WorkersUnfit
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.fingerprint import fingerprint
from apex_build.native.toolset import Toolset
from apex_build.progress import Report, Step, silent
from apex_build.storage.digests import sha256_file

if TYPE_CHECKING:
    from distributed import Future

_BLOCK = 32 << 20
_LOOK = 1.0  # seconds between two looks at the workers
_ALONE = 60.0  # seconds without a worker, before it is given up
_PATIENCE = 600.0  # seconds for what a task gave to arrive
_GONE = (OSError, TimeoutError, asyncio.TimeoutError)  # the last two are the same from Python 3.11 on
_STEP = frozenset(one.name for one in fields(Step))
_LOST = "finished work is kept: start the scheduler and the workers again, then run the same command"


def order_of(model: Model) -> remote.ModelOrder:
    names = tuple(path.name for path in model.files)
    return remote.ModelOrder(str(model.path.absolute()), fingerprint(model), names)


def order_of_file(path: Path) -> remote.ModelOrder:
    """For a file that is not a model, such as an imatrix."""
    return remote.ModelOrder(str(path.absolute()), sha256_file(path), (path.name,), of_model=False)


@dataclass
class ClusterTasks:
    """`models` and `files`: what every worker must have. `ready`: addresses of those that do.

    `reports`: of the tasks that are waited for, by key; `begun`: by key, the worker that began it last. `said`: what
    workers reported since it was last looked at; it arrives in a thread of Dask's.
    `arrived`: what tasks gave, by key, until it is taken.
    """

    cluster: Cluster
    tools: Toolset
    models: tuple[Model, ...]
    files: tuple[Path, ...] = ()
    ready: set[str] = field(default_factory=set)
    reports: dict[str, Report] = field(default_factory=dict)
    begun: dict[str, str] = field(default_factory=dict)
    said: queue.SimpleQueue[tuple[str, dict[str, Any]]] = field(default_factory=queue.SimpleQueue)
    arrived: dict[str, Any] = field(default_factory=dict)

    def submit(self, function: Callable[..., Any], order: Any, key: str, report: Report = silent) -> Future:
        """To one of the workers that are ready: Dask would give it to any that comes, fit or not. `report` gets the
        task's progress, in the thread that waits for it: from whatever worker has it, also where another client waits
        for it too.
        """
        if key not in self.reports:
            self.cluster.client.subscribe_topic(key, lambda event: self.said.put((key, event[1])))
        self.reports[key] = report
        self.begun.pop(key, None)
        return self.cluster.client.submit(
            function,
            order,
            key=key,
            resources=self._resources() or None,
            workers=sorted(self.ready),
            allow_other_workers=False,
            pure=False,
        )

    def run(
        self,
        numbers: Iterable[int],
        submit: Callable[[int], Future],
        take: Callable[[int, Future], None],
        report: Report,
    ) -> None:
        """Submit each number, and take what comes of it. Raises ClusterFailed, WorkersUnfit, and what `take` does."""
        with closing(self.each(numbers, submit, report)) as done:
            for number, future in done:
                take(number, future)

    def each(
        self, numbers: Iterable[int], submit: Callable[[int], Future], report: Report
    ) -> Generator[tuple[int, Future], None, None]:
        """Submit each number, and give it with its future as soon as that is done. Closed early, it cancels the others.

        Raises ClusterFailed, WorkersUnfit.
        """
        missing = list(numbers)
        waiting: dict[int, Future] = {}
        allowed: dict[int, set[str]] = {}
        alone: float | None = None
        try:
            while missing or waiting:
                self.alive()
                self.cluster.look(self.tools)
                if self.cluster.fit:
                    alone = None
                    self.prepare(report)
                else:
                    alone = alone or time.monotonic()
                    if time.monotonic() - alone > _ALONE:
                        self.cluster.check()
                for number, future in [*waiting.items()]:
                    more = self.ready - allowed[number] and self.begun.get(future.key) not in self.ready
                    if more or not allowed[number] & self.ready:
                        self._release(waiting.pop(number))
                        missing.append(number)
                if self.ready:
                    for number in missing:
                        waiting[number] = submit(number)
                        allowed[number] = set(self.ready)
                    missing = []
                if not waiting:
                    time.sleep(_LOOK)
                    continue
                self._await([*waiting.values()])
                for number in [one for one, future in waiting.items() if future.done()]:
                    if not self._has_arrived(waiting[number]):
                        continue  # lost with its worker
                    future = waiting.pop(number)
                    self._forget(future)
                    yield number, future
                    future.release()  # else the task is done again if the worker that keeps its result is lost
        except _GONE as error:
            raise self.lost(str(error)) from None
        finally:
            if waiting and self.cluster.alive:
                for future in waiting.values():
                    self._forget(future)
                self.cluster.client.cancel([*waiting.values()])

    def _await(self, futures: Sequence[Future]) -> None:
        """Report what workers do until one of these is done, but no longer than to the next look at the workers."""
        end = time.monotonic() + _LOOK
        while time.monotonic() < end and not any(future.done() for future in futures):
            self._tell()
            time.sleep(0.05)
        self._tell()

    def _release(self, future: Future) -> None:
        """Want it no more, so that its key can be submitted again. What Dask says after cancel() may come so late that
        it ends the new task.
        """
        future.release()
        self.cluster.client.sync(asyncio.sleep, 0)  # that is done in Dask's thread

    def _has_arrived(self, future: Future) -> bool:
        """Fetch what a finished task gave. False if the worker that kept it is lost: the task is pending again then."""
        patience = _LOOK
        while future.status == "finished" and self.cluster.alive:
            try:
                self.arrived[future.key] = future.result(timeout=patience)
                return True
            except _GONE:
                if future.status == "finished" and patience > _PATIENCE:
                    raise
                patience *= 2  # it may be large
            except CancelledError:
                break
        return bool(future.done())

    def _tell(self) -> None:
        with suppress(queue.Empty):
            while True:
                key, said = self.said.get_nowait()
                if "begun" in said:
                    self.begun[key] = said["begun"]
                else:
                    step = Step(**{name: value for name, value in said.items() if name in _STEP})  # Dask adds some
                    self.reports.get(key, silent)(step)

    def _forget(self, future: Future) -> None:
        """Report no more of a task: what it said may arrive after it is done."""
        if self.reports.pop(future.key, None) is not None and self.cluster.alive:
            self.cluster.client.unsubscribe_topic(future.key)

    def alive(self) -> None:
        if not self.cluster.alive:
            raise self.lost("")

    def lost(self, why: str) -> ClusterFailed:
        said = f": {why.splitlines()[0]}" if why else ""
        return ClusterFailed(f"{self.cluster.address}: the scheduler is gone{said}", hint=_LOST)

    def _resources(self) -> dict[str, float]:
        """What a shard takes, of the kinds that workers declare (dask worker --resources 'GPU=1 MEMORY=64e9')."""
        kinds = {kind for found in self.cluster.fit.values() for kind in found.resources}
        needed = {
            "GPU": 1.0,
            "MEMORY": float(max(sum(tensor.n_bytes for tensor in model.tensors) for model in self.models)),
        }
        wanted = {kind: amount for kind, amount in needed.items() if kind in kinds}
        most = [found.resources for found in self.cluster.fit.values()]
        if wanted and not any(all(has.get(kind, 0) >= amount for kind, amount in wanted.items()) for has in most):
            said = ", ".join(f"{kind}={amount:g}" for kind, amount in wanted.items())
            offered = "; ".join(str(has) for has in most[:3])
            raise WorkersUnfit(
                f"a task with {self.models[0].path.name} takes {said}, and no worker of {self.cluster.address} "
                f"declares as much: {offered}",
                hint="dask worker --resources 'GPU=1 MEMORY=BYTES'; without that option any worker may take a shard",
            )
        return wanted

    def result(self, future: Future, what: str) -> Any:
        """What a task that `each` gave has given. Raises its error, named; ClusterFailed."""
        if future.key in self.arrived:
            return self.arrived.pop(future.key)
        self.alive()
        if future.status != "error":
            raise self.lost(f"{what} was {future.status}")
        try:
            error = future.exception(timeout=60)
        except _GONE as gone:
            raise self.lost(str(gone)) from None
        if isinstance(error, ApexError):
            error.message = f"{what}: {error.message}"
            raise error
        kind = type(error).__name__
        if kind == "KilledWorker":
            raise ClusterFailed(
                f"{what}: the workers that took it died, several times",
                hint="look at the workers' own output: most often memory ran out; then run the same command again",
            )
        raise ClusterFailed(f"{what}: {kind}: {str(error).splitlines()[0] if str(error) else ''}", hint=_LOST)

    def prepare(self, report: Report) -> None:
        """Let every fit worker have the files: at the same path, or sent, once for all that share a cache."""
        self.ready &= self.cluster.fit.keys()
        new = sorted(self.cluster.fit.keys() - self.ready)
        if not new:
            return
        for order, paths in self._needed():
            has = self.cluster.client.run(remote.has_model, order, workers=new, on_error="return")
            sent: set[tuple[str, str]] = set()
            for address, found in has.items():
                about = self.cluster.fit[address]
                if found is not True and (about.host, about.cache) not in sent:
                    self._send(order, paths, address, about.host, report)
                    sent.add((about.host, about.cache))
        self.ready |= set(new)

    def _needed(self) -> Iterator[tuple[remote.ModelOrder, tuple[Path, ...]]]:
        for model in self.models:
            yield order_of(model), model.files
        for path in self.files:
            yield order_of_file(path), (path,)

    def _send(self, order: remote.ModelOrder, paths: Sequence[Path], address: str, host: str, report: Report) -> None:
        client, name = self.cluster.client, Path(order.path).name
        total = sum(path.stat().st_size for path in paths)
        done = 0
        for path in paths:
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    offset = file.tell() - len(block)
                    wrote = client.run(remote.write_block, order, path.name, offset, block, workers=[address])[address]
                    if wrote != hashlib.sha256(block).hexdigest():
                        raise ClusterFailed(f"{host} wrote another block of {path.name} than it was sent")
                    done += len(block)
                    report(Step(f"sending {name} to {host}", done / 1e6, total / 1e6, "MB"))
        if not client.run(remote.finish_model, order, workers=[address])[address]:
            raise ClusterFailed(f"{host}: the file that arrived is not {order.path}")
