"""Calibrate in parts: run llama-imatrix over some whole chunks of the text at a time, and add up the results.

Every part reads the same text and starts at its first chunk (`--chunk`), so the parts see the same chunks as a single
run. llama-imatrix adds one sum of squares for each batch of up to 512 tokens to a weight's total, in single precision;
the parts are added in double precision and rounded once. So counts equal those of a single run exactly. Sums do too
where at most two batches or only one part reached a matrix, and elsewhere differ by at most (batches + 1) * 2^-24 of
their value (`rounding`).
"""

from __future__ import annotations

import itertools
import math
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from apex_build.calibration.disk import check_disk, imatrix_bytes
from apex_build.calibration.merge import plan_merge, write_gguf
from apex_build.calibration.run import (
    SHARDS,
    Job,
    Made,
    Settings,
    ToRun,
    Watch,
    arguments,
    has_snapshots,
    memory_for,
    perplexity_of,
    run_once,
    run_resumed,
    verify,
)
from apex_build.errors import ApexError, CalibrationSetInvalid, ToolKilled
from apex_build.gguf_model.catalogue import Model, Tensor
from apex_build.gguf_model.fingerprint import fingerprint
from apex_build.gguf_model.imatrix import Imatrix, read_imatrix
from apex_build.native import output
from apex_build.native.run import Stopped, ToolRun, run_tool, unwinding_signals
from apex_build.native.toolset import Toolset
from apex_build.progress import Report, Step, silent
from apex_build.storage.artifacts import Artifact, making
from apex_build.storage.digests import sha256_file
from apex_build.storage.disk import check_room, writing
from apex_build.storage.json_files import read_json, write_json
from apex_build.storage.locks import locked
from apex_build.storage.manifest import IMATRIX, Manifest
from apex_build.storage.outputs import LOG, beside, whole_file
from apex_build.storage.scratch import scratch_folder
from apex_build.storage.work import unfinished_work

NO_BOUND = 1 << 24  # chunks of a shard that covers all of its text
_LEAST = 3  # minimum chunks of a shard: llama-imatrix does not start with fewer
_UBATCH = 512  # llama.cpp's default
_TRIES = 2  # maximum runs of a shard whose tool is killed


@dataclass(frozen=True)
class Shard:
    first: int  # number of its first chunk
    chunks: int


@dataclass(frozen=True)
class Task:
    """A shard to make, from a text file that is alone in its folder."""

    text: Path
    sha256: str  # of the text
    shard: Shard
    out: Path
    every: int = 0  # record the tokens of each routed expert after this many chunks, beside `out` (`counts_file`)
    shared: Path | None = None  # as whose unfinished work snapshots are kept, if not as that of `out`


# Makes the file of each task, unless it is there already. If a pool is interrupted, finished files stay.
Pool = Callable[[Sequence[Task], Report], None]


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest of a shard adds to the common keys. `device`: as in CUDA_VISIBLE_DEVICES."""

    perplexity: float | None
    seconds: float
    device: str | None = None


def split(total: int, count: int) -> tuple[Shard, ...]:
    """Split `total` chunks into `count` parts, as evenly as possible. Raises CalibrationSetInvalid."""
    if count > 1 and total < count * _LEAST:
        raise CalibrationSetInvalid(
            f"the text is too short for {count} shards: expected at least {count * _LEAST} chunks ({_LEAST} each), "
            f"found {total}",
            hint=f"use --shards {max(1, total // _LEAST)}, or more text",
        )
    ends = [total * number // count for number in range(count + 1)]
    return tuple(Shard(first, end - first) for first, end in itertools.pairwise(ends))


def rounding(chunks: int, context: int) -> float:
    """How far the sums of a calibration in parts may differ from a single run over `chunks` chunks, relatively."""
    return (chunks * math.ceil(context / _UBATCH) + 1) * 2.0**-24


def count_chunks(model: Model, text: Path, tools: Toolset, settings: Settings, report: Report = silent) -> int:
    """The number of whole chunks in a text, as llama-imatrix prints it before it starts."""

    def line(said: str) -> None:
        if plan := output.planned(said):
            raise _Counted(plan.chunks)

    report(Step("counting chunks of the text", 0))
    trunk = replace(settings, head=False)
    command = [*arguments(model, trunk, tools), "--file", text.name, "--output"]
    memory = memory_for(model, settings)
    with scratch_folder("count") as folder:
        try:
            run_tool(
                [*command, str(folder / "x")], cwd=text.parent, on_line=line, explain=output.explain, memory=memory
            )
        except _Counted as counted:
            return min(counted.chunks, settings.chunks or counted.chunks)
    raise AssertionError("llama-imatrix exited without printing the number of chunks")


class _Counted(Exception):
    def __init__(self, chunks: int) -> None:
        super().__init__(chunks)
        self.chunks = chunks


def parts_of(model: Model, task: Task, settings: Settings, tools: Toolset) -> dict[str, Any]:
    """Everything that determines a shard's data."""
    return {
        "model": fingerprint(model),
        "text": task.sha256,
        "settings": settings.decisive(tools),
        "tools": tools.manifest.get("key") or sha256_file(tools.tool("llama-imatrix")),
        "chunks": [task.shard.first, task.shard.chunks],
        **({"every": task.every} if task.every else {}),
    }


def make_shard(
    model: Model,
    task: Task,
    tools: Toolset,
    settings: Settings,
    *,
    device: str | None = None,
    stopped: Callable[[], bool] | None = None,
    report: Report = silent,
) -> Manifest:
    """Run llama-imatrix over one shard, unless its file exists; from the last snapshot, if a run of it was ended.
    `device`: the GPUs that the tool may use.

    Raises ToolFailed, ToolKilled, VerificationFailed; Stopped.
    """
    artifact = Artifact(task.out, IMATRIX, parts_of(model, task, settings, tools))
    with making(artifact, replace="own", wait=f"another run that makes {task.out.name}", report=report) as draft:
        if draft.found and (not task.every or counts_file(task.out).is_file()):
            if task.shard.chunks < NO_BOUND:
                report(Step("calibrating", task.shard.chunks, task.shard.chunks, "chunks"))
            return draft.found
        run = ToRun(
            model, tools, settings, task.text, task.out, task.shard.first, task.shard.chunks, device, stopped
        )  # fmt: skip
        if task.every:
            ran = _run_counted(run, task.every, draft.part, report)
            return draft.done(ShardRecord(perplexity_of(ran), round(ran.seconds, 3), device))
        with _snapshots_of(task, artifact, report) as work:
            check_disk(work, model)
            partial, made = run_resumed(run, work, report)
            shutil.move(partial, draft.part)
            return draft.done(ShardRecord(made.perplexity, round(made.seconds, 3), device))


@contextmanager
def _snapshots_of(task: Task, artifact: Artifact, report: Report) -> Iterator[Path]:
    """The folder for the snapshots of a shard; whoever makes it next resumes from them."""
    with ExitStack() as stack:
        if task.shared is not None:
            artifact = replace(artifact, out=task.shared)
            wait = "another worker that makes this shard"
            stack.enter_context(locked(task.shared, wait=True, what=wait, report=report))
        yield stack.enter_context(unfinished_work(artifact, {}, has_snapshots, noted=task.shared is not None))


def _run_counted(run: ToRun, every: int, part: Path, report: Report) -> ToolRun:
    """Run the tool, and write the file of counts. Its periodic copies are read for that, so it cannot be resumed."""
    noted = _Noted(run.model, part, every)
    watch = Watch(run.model, run.tools, run.settings, report)

    def line(said: str) -> None:
        watch.line(said)
        if watch.seen > noted.seen:
            noted.look(watch.seen)

    ran, made = run_once(replace(run, settings=replace(run.settings, snapshot_every=every)), part, line)
    noted.write(made, counts_file(run.out))
    return ran


def routed_of(model: Model, *, head: bool = True) -> tuple[Tensor, ...]:
    """One tensor of routed experts per layer: the others of the layer see the same tokens."""
    found: dict[int, Tensor] = {}
    for tensor in sorted(model.tensors, key=lambda one: one.name):
        if (
            tensor.role == "routed"
            and len(tensor.shape) > 2
            and tensor.layer is not None
            and (head or not tensor.draft_head)
        ):
            found.setdefault(tensor.layer, tensor)
    return tuple(found[layer] for layer in sorted(found))


def expert_tokens(found: Imatrix, tensors: Sequence[Tensor]) -> npt.NDArray[np.float64]:
    """The number of tokens that each expert of these tensors saw, tensor by tensor."""
    counts = [found.entries[one.name].counts if one.name in found.entries else (0.0,) * one.shape[2] for one in tensors]
    return np.array([count for each in counts for count in each])


def counts_file(out: Path) -> Path:
    return beside(out, ".counts.npz")


@dataclass
class _Noted:
    """The tokens of each routed expert after every few chunks, read from the tool's periodic copies."""

    model: Model
    part: Path
    every: int
    seen: int = 0  # chunks
    marks: list[int] = field(default_factory=list)
    counts: list[npt.NDArray[np.float64]] = field(default_factory=list)

    def look(self, seen: int) -> None:
        self.seen = seen
        found = (
            (path, int(path.suffix.removeprefix(".at_"))) for path in self.part.parent.glob(f"{self.part.name}.at_*")
        )
        for path, chunks in sorted(found, key=lambda one: one[1]):
            self._note(read_imatrix(path), chunks)
            path.unlink()

    def _note(self, found: Imatrix, chunks: int) -> None:
        self.marks.append(chunks)
        self.counts.append(expert_tokens(found, routed_of(self.model)))

    def write(self, made: Imatrix, out: Path) -> None:
        self.look(self.seen)
        if made.chunk_count and made.chunk_count > max(self.marks, default=0):
            self._note(made, made.chunk_count)
        with whole_file(out) as part, part.open("wb") as file:
            np.savez_compressed(file, marks=np.array(self.marks), counts=np.stack(self.counts))


@dataclass
class Together:
    """One progress bar for shards that run in parallel."""

    report: Report
    tasks: Sequence[Task]
    done: dict[int, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def whole(self, number: int) -> None:
        """Count a shard whose file exists."""
        chunks = self.tasks[number].shard.chunks
        if chunks < NO_BOUND:
            self.of(number)(Step("calibrating", chunks, chunks, "chunks"))

    def of(self, number: int) -> Report:
        def take(step: Step) -> None:
            with self.lock:
                if step.said or not step.total:
                    self.report(step)
                    return
                self.done[number] = step.done
                total = sum(task.shard.chunks for task in self.tasks)
                whole = sum(self.done.get(at, 0) >= task.shard.chunks for at, task in enumerate(self.tasks))
                detail = f"{whole} of {len(self.tasks)} shards" if len(self.tasks) > 1 else ""
                self.report(Step("calibrating", sum(self.done.values()), total, "chunks", detail=detail))

        return take


def local_pool(model: Model, tools: Toolset, settings: Settings, devices: Sequence[str | None] = (None,)) -> Pool:
    """A pool that runs shards on this machine: one at a time for each of these sets of GPUs."""

    def run(tasks: Sequence[Task], report: Report) -> None:
        free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for device in devices:
            free.put(device)
        stop = threading.Event()
        together = Together(report, tasks)

        def one(number: int) -> None:
            device = free.get()
            try:
                for tried in range(1, _TRIES + 1):
                    try:
                        if not stop.is_set():
                            make_shard(
                                model, tasks[number], tools, settings,
                                device=device, stopped=stop.is_set, report=together.of(number),
                            )  # fmt: skip
                        return
                    except ToolKilled as error:
                        if tried == _TRIES:
                            raise
                        reason = error.message.splitlines()[0]
                        said = f"running shard {number + 1} of {len(tasks)} again: {reason}"
                        together.of(number)(Step(said, 0, said=True))
            finally:
                free.put(device)

        with unwinding_signals(), ThreadPoolExecutor(len(devices)) as threads:
            futures = [threads.submit(one, number) for number in range(len(tasks))]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()
        raise_first([future.exception() for future in futures], "shard")

    return run


def raise_first(errors: Sequence[BaseException | None], what: str) -> None:
    """Raise the first error that is not a consequence of another, naming its task."""
    found = [(number, error) for number, error in enumerate(errors, 1) if error is not None]
    for number, error in found:
        if isinstance(error, ApexError):
            error.message = f"{what} {number} of {len(errors)}: {error.message}"
            raise error
    for _, error in found:
        if not isinstance(error, Stopped):
            raise error


def in_shards(count: int, pool: Pool, counter: Callable[[Job, Path], int] | None = None) -> Callable[[Job], Made]:
    """Make an imatrix in `count` parts, for `calibrate`. `counter`: counts the chunks of the text; default: the local
    tool.
    """

    def make(job: Job) -> Made:
        text = job.work / "text" / job.text.name
        folder = job.work / SHARDS
        total = _total(job, text, counter)
        sha256 = job.text.sha256
        tasks = [
            Task(text, sha256, shard, folder / f"{number:04}.gguf")
            for number, shard in enumerate(split(total, count), 1)
        ]
        with writing(folder):
            folder.mkdir(exist_ok=True)
        missing = sum(not task.out.exists() for task in tasks)
        check_room(folder, (missing + 1) * imatrix_bytes(job.model), f"the imatrices of {missing} shards")
        pool(tasks, job.report)
        return put_together(tasks, job.part, job)

    return make


def put_together(tasks: Sequence[Task], part: Path, job: Job, keys: Mapping[str, int] | None = None) -> Made:
    """Add up the shards, verify the sum, and join their logs."""
    write_gguf(plan_merge([task.out for task in tasks]), part, keys)
    made = read_imatrix(part)
    verify(made, job.model, job.settings, job.tools)
    log = beside(job.out, LOG)
    with writing(log), log.open("wb") as file:
        for task in tasks:
            own = beside(task.out, LOG)
            file.write(own.read_bytes() if own.exists() else b"")
    records = [details(task.out) for task in tasks]
    return Made(made, _perplexity(tasks, records), sum(float(one.get("seconds") or 0) for one in records), 0)


def details(out: Path) -> Mapping[str, Any]:
    found = read_json(beside(out, ".json"))
    return found if isinstance(found, dict) else {}


def _total(job: Job, text: Path, counter: Callable[[Job, Path], int] | None) -> int:
    try:
        return int(read_json(job.work / "total.json"))
    except (OSError, ValueError, TypeError):
        if counter is not None:
            total = counter(job, text)
        else:
            total = count_chunks(job.model, text, job.tools, job.settings, job.report)
        write_json(job.work / "total.json", total)
        return total


def _perplexity(tasks: Sequence[Task], records: Sequence[Mapping[str, Any]]) -> float | None:
    """The perplexity of the whole text; every chunk scores the same number of tokens."""
    values = [value for record in records if isinstance(value := record.get("perplexity"), float) and value > 0]
    if len(values) < len(tasks):
        return None
    chunks = sum(task.shard.chunks for task in tasks)
    return math.exp(
        sum(math.log(value) * task.shard.chunks for value, task in zip(values, tasks, strict=True)) / chunks
    )
