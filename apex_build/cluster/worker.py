"""What runs on the workers: who they are, the model's files, and one shard, evaluation, or point of a sweep.

Only names of this module go over the wire, with plain data: a worker runs its own apex-build and its own tools, which
must be those of the client.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import signal
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from apex_build import __version__
from apex_build.calibration.run import Settings
from apex_build.calibration.shards import Shard, Task, count_chunks, counts_file, make_shard, parts_of
from apex_build.errors import ApexError, ModelMissing, WorkersUnfit
from apex_build.evaluation.run import Inputs
from apex_build.evaluation.task import Prompt, ToolOptions
from apex_build.evaluation.task import Task as EvaluationTask
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.fingerprint import fingerprint
from apex_build.gguf_model.model import read_model
from apex_build.hookspecs import Evaluator, Figure, PolicySpec
from apex_build.loaded import origin_of
from apex_build.native.run import Stopped, stopping
from apex_build.native.toolset import Toolset, find_toolset
from apex_build.parameters import Value
from apex_build.places import cache_folder, cache_root, in_use, unused
from apex_build.plugins import load_plugins
from apex_build.policy.plan import Plan
from apex_build.progress import Report, Step
from apex_build.quantization.run import Job
from apex_build.storage.digests import sha256_file, sha256_json
from apex_build.storage.outputs import LOG, MANIFEST, beside
from apex_build.storage.scratch import scratch_folder
from apex_build.sweep.files import Files, Measured, Recipe

_TELL = 0.5  # seconds between two words about the progress


@dataclass(frozen=True)
class About:
    """A worker, as it describes itself. `tools`: the identity of its build, or why it has none."""

    apex: str
    tools: str
    without: str
    host: str
    cache: str
    threads: int
    resources: dict[str, float]


@dataclass(frozen=True)
class ModelOrder:
    """A model or another file by its path on the client, and what it must be; of a file the sha256."""

    path: str
    fingerprint: str
    files: tuple[str, ...]  # names
    of_model: bool = True


@dataclass(frozen=True)
class ShardOrder:
    model: ModelOrder
    tools: str
    text: bytes  # compressed
    text_name: str
    sha256: str
    shard: Shard
    every: int
    settings: Settings


@dataclass(frozen=True)
class ShardResult:
    """Return the content: the client may not see the worker's disk."""

    content: bytes
    counts: bytes
    log: bytes
    details: dict[str, Any]


def dask_setup(_worker: Any) -> None:
    """Called by Dask in the processes of a local cluster: the terminal's Ctrl-C is for the client, which ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def about(dask_worker: Any) -> About:  # Dask requires this parameter name
    worker = dask_worker
    tools, without = "", ""
    try:
        tools = find_toolset().identity
    except ApexError as error:
        without = error.message
    resources = {name: float(amount) for name, amount in worker.state.total_resources.items()}
    threads = sum(executor._max_workers for name, executor in worker.executors.items() if name == "default")
    return About(__version__, tools, without, platform.node(), str(cache_root()), threads, resources)


def has_model(order: ModelOrder) -> bool:
    try:
        _model(order) if order.of_model else _file(order)
    except ModelMissing:
        return False
    return True


def write_block(order: ModelOrder, name: str, offset: int, block: bytes) -> str:
    """Put a piece of a model's file into the cache; returns the digest of the piece on disk."""
    part = _folder(order).with_name(f"{order.fingerprint}.part")
    part.mkdir(parents=True, exist_ok=True)
    path = part / Path(name).name
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666), "r+b") as file:
        file.seek(offset)
        file.write(block)
        file.flush()
        file.seek(offset)
        return hashlib.sha256(file.read(len(block))).hexdigest()


def finish_model(order: ModelOrder) -> bool:
    """Put the model in place after all pieces have arrived, if it is the requested one."""
    folder = _folder(order)
    part = folder.with_name(f"{order.fingerprint}.part")
    if not has_model(order):
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    return has_model(order)


def run_shard(order: ShardOrder) -> ShardResult:
    """Make one shard. Raises WorkersUnfit where this worker must not, and what the tool does.

    Its snapshots are kept in the cache: where it is ended, it is resumed by a worker that has the same cache.
    """
    tools = _tools(order)
    model = _model(order.model)
    with scratch_folder("shard") as folder:
        task = _task(order, folder)
        name = sha256_json(parts_of(model, task, order.settings, tools))[:32]
        task = replace(task, shared=cache_folder("cluster", "shards") / f"{name}.gguf")
        with _watched() as report:
            make_shard(model, task, tools, order.settings, report=report)
        counts = counts_file(task.out)
        details = beside(task.out, MANIFEST).read_bytes()
        log = beside(task.out, LOG)
        return ShardResult(
            task.out.read_bytes(),
            counts.read_bytes() if counts.exists() else b"",
            log.read_bytes() if log.exists() else b"",
            json.loads(details),
        )


@dataclass(frozen=True)
class EvaluationOrder:
    """One evaluator on one file. `texts` by domain, compressed; `data`: the evaluator's file."""

    evaluator: str
    version: int
    code: str
    model: ModelOrder
    reference: ModelOrder | None
    tools: str
    texts: dict[str, bytes]
    prompts: tuple[Prompt, ...]
    data: bytes | None
    data_name: str
    settings: dict[str, Value]
    threads: int | None
    options: ToolOptions


def run_evaluation(order: EvaluationOrder) -> tuple[tuple[Figure, ...], float]:
    """The figures, and the seconds it took. Raises WorkersUnfit where this worker has another plugin."""
    tools = _tools(order)
    evaluator = _evaluator(order.evaluator, order.version, order.code)
    model = _model(order.model)
    reference = _model(order.reference) if order.reference else None
    with in_use(cache_root() / "evaluation"), scratch_folder("evaluation") as folder, _watched() as report:
        texts = _texts(order.texts, folder)
        data = folder / order.data_name if order.data is not None else None
        if data is not None and order.data is not None:
            data.write_bytes(zlib.decompress(order.data))
        task = EvaluationTask(
            order.evaluator, model, tools, reference, texts, order.prompts, data, order.settings, order.threads,
            report, order.options, order.code,
        )  # fmt: skip
        began = time.monotonic()
        return tuple(evaluator.evaluate(task)), time.monotonic() - began


@dataclass(frozen=True)
class JobOrder:
    """A planned file (`quantization.run.Job`), without what the worker has itself. `memory`: of the tool."""

    name: str
    plan: Plan
    keys: dict[str, str | int | float]
    n_bytes: int
    warnings: tuple[str, ...]
    imatrix: ModelOrder | None
    derived: bool
    memory: int | None


@dataclass(frozen=True)
class RecipeOrder:
    job: JobOrder
    trunk: JobOrder | None


@dataclass(frozen=True)
class PointOrder:
    """One point of a sweep. `sweep` names the folder in the worker's cache that its points share; `keep`: the file
    stays there. `evaluators`: name, version and code of each; `data`: the file of each, its name and content.
    """

    sweep: str
    recipe: RecipeOrder
    baseline: RecipeOrder | None
    keep: bool
    model: ModelOrder
    reference: ModelOrder | None
    tools: str
    evaluators: tuple[tuple[str, int, str], ...]
    texts: dict[str, bytes]
    prompts: tuple[Prompt, ...]
    data: dict[str, tuple[str, bytes]]
    settings: dict[str, str]
    options: ToolOptions
    threads: int | None


def run_point(order: PointOrder) -> Measured:
    """Quantize the point's file, measure it, delete it. What the points share is kept until `end_sweep`."""
    tools, model = _tools(order), _model(order.model)
    evaluators = [_evaluator(*one) for one in order.evaluators]
    place = cache_folder("cluster", "sweeps", order.sweep)

    def job_of(one: JobOrder) -> Job:
        imatrix = _file(one.imatrix) if one.imatrix else None
        policy = PolicySpec(one.plan.policy, None, one.plan.base_type)
        return Job(
            model, one.plan, None, imatrix, place / one.name, one.keys, one.n_bytes, one.warnings, tools, policy,
            derived=one.derived, memory=one.memory,
        )  # fmt: skip

    def recipe_of(one: RecipeOrder) -> Recipe:
        return Recipe(job_of(one.job), job_of(one.trunk) if one.trunk else None)

    with in_use(place), scratch_folder("sweep") as folder, _watched() as report:
        data = {name: folder / f"{name}-{file}" for name, (file, _) in order.data.items()}
        for name, path in data.items():
            path.write_bytes(zlib.decompress(order.data[name][1]))
        inputs = Inputs(
            _model(order.reference) if order.reference else None, _texts(order.texts, folder), order.prompts, data,
            order.settings, order.options,
        )  # fmt: skip
        files = Files(place, tools, evaluators, inputs, order.threads, wait="another point of the sweep")
        baseline = recipe_of(order.baseline) if order.baseline else None
        return files.measure(recipe_of(order.recipe), baseline, None, report, keep=order.keep)


def end_sweep(sweep: str) -> None:
    """Remove what its points shared, unless a point of another client is running."""
    place = cache_root() / "cluster" / "sweeps" / sweep
    with suppress(OSError), unused(place):
        shutil.rmtree(place)


def count(order: ShardOrder) -> int:
    """Whole chunks of the text."""
    tools, model = _tools(order), _model(order.model)
    with scratch_folder("shard") as folder:
        return count_chunks(model, _task(order, folder).text, tools, order.settings)


def _tools(order: ShardOrder | EvaluationOrder | PointOrder) -> Toolset:
    tools = find_toolset()
    if tools.identity != order.tools:
        raise WorkersUnfit(f"{platform.node()} has another build of the tools: {tools.identity}, not {order.tools}")
    return tools


def _evaluator(name: str, version: int, code: str) -> Evaluator:
    """Raises WorkersUnfit if this worker has another plugin."""
    found = load_plugins().evaluators().get(name)
    if found is None or found.version != version or origin_of(found)[1] != code:
        raise WorkersUnfit(f"{platform.node()} has {'no' if found is None else 'another'} evaluator '{name}'")
    return found


def _texts(given: dict[str, bytes], folder: Path) -> dict[str, Path]:
    texts = {}
    for number, (domain, text) in enumerate(given.items()):
        texts[domain] = folder / f"{number}.txt"
        texts[domain].write_bytes(zlib.decompress(text))
    return texts


def _task(order: ShardOrder, folder: Path) -> Task:
    text = folder / "text" / order.text_name
    text.parent.mkdir()
    text.write_bytes(zlib.decompress(order.text))
    return Task(text, order.sha256, order.shard, folder / "shard.gguf", order.every)


def _folder(order: ModelOrder) -> Path:
    return cache_root() / "cluster" / "models" / order.fingerprint


def _model(order: ModelOrder) -> Model:
    """At the client's own path, or fetched before. Raises ModelMissing."""
    role_of = load_plugins().role_of
    for path in (Path(order.path), _folder(order) / order.files[0]):
        if path.is_file():
            try:
                model = read_model(path, role_of)
            except ApexError:
                continue
            if fingerprint(model) == order.fingerprint:
                return model if model.path.is_absolute() else replace(model, path=path.absolute())
    raise ModelMissing(f"{platform.node()} does not have {order.path}")


def _file(order: ModelOrder) -> Path:
    """Like `_model`, for another kind of file."""
    for path in (Path(order.path), _folder(order) / order.files[0]):
        if path.is_file() and sha256_file(path) == order.fingerprint:
            return path.absolute()
    raise ModelMissing(f"{platform.node()} does not have {order.path}")


@contextmanager
def _watched() -> Iterator[Report]:
    """Stop the block's tools when no client waits for this task any more. Those that do are told that it has begun, and
    get what is reported, under the task's key (`ClusterTasks.submit`).
    """
    from distributed import Reschedule, get_worker
    from distributed.core import Status

    worker = get_worker()
    key = worker.get_current_task()
    last = [(0.0, "")]
    worker.loop.add_callback(worker.log_event, key, {"begun": worker.address})

    def stopped() -> bool:
        task = worker.state.tasks.get(key)
        running = worker.status in (Status.running, Status.paused)
        return not running or task is None or task.state in ("cancelled", "released", "forgotten")

    def report(step: Step) -> None:
        now, (before, task) = time.monotonic(), last[0]
        ended = step.total is not None and step.done >= step.total
        if step.said or ended or step.task != task or now - before >= _TELL:
            last[0] = (now, step.task)
            worker.loop.add_callback(worker.log_event, key, asdict(step))

    try:
        with stopping(stopped):
            yield report
    except Stopped:
        raise Reschedule from None  # to whom it was given meanwhile, if to anybody
