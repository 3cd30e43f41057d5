"""What runs on the workers: who they are, the model's files, and one shard.

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
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apex_build import __version__
from apex_build.calibration.run import Settings
from apex_build.calibration.shards import Shard, Task, count_chunks, counts_file, make_shard
from apex_build.errors import ApexError, ModelMissing, WorkersUnfit
from apex_build.evaluation.task import Prompt, ToolOptions
from apex_build.evaluation.task import Task as EvaluationTask
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.fingerprint import fingerprint
from apex_build.gguf_model.model import read_model
from apex_build.hookspecs import Figure
from apex_build.loaded import origin_of
from apex_build.native.run import Stopped
from apex_build.native.toolset import Toolset, find_toolset
from apex_build.parameters import Value
from apex_build.places import cache_root
from apex_build.plugins import load_plugins
from apex_build.progress import Report, Step, silent
from apex_build.storage.outputs import LOG, MANIFEST, beside
from apex_build.storage.scratch import scratch_folder

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
    """A model by its path on the client, and what it must be."""

    path: str
    fingerprint: str
    files: tuple[str, ...]  # names


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
    topic: str
    number: int


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
        _model(order)
    except ModelMissing:
        return False
    return True


def write_block(order: ModelOrder, name: str, offset: int, block: bytes) -> str:
    """Put a piece of a model's file into the cache; returns the digest of what is on the disk."""
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
    """All pieces are there: the model counts from now on, if it is the one that was asked for."""
    folder = _folder(order)
    part = folder.with_name(f"{order.fingerprint}.part")
    if not has_model(order):
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    return has_model(order)


def run_shard(order: ShardOrder) -> ShardResult:
    """Make one shard. Raises WorkersUnfit where this worker must not, and what the tool does."""
    tools = _tools(order)
    model = _model(order.model)
    with scratch_folder("shard") as folder:
        task = _task(order, folder)
        stopped, report = _watched(order)
        try:
            make_shard(model, task, tools, order.settings, stopped=stopped, report=report)
        except Stopped:
            raise RuntimeError("nobody waits for this shard any more") from None
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
    tools, plugins = _tools(order), load_plugins()
    evaluator = plugins.evaluators().get(order.evaluator)
    if evaluator is None or evaluator.version != order.version or origin_of(evaluator)[1] != order.code:
        found = "no" if evaluator is None else "another"
        raise WorkersUnfit(f"{platform.node()} has {found} evaluator '{order.evaluator}'")
    model = _model(order.model)
    reference = _model(order.reference) if order.reference else None
    with scratch_folder("evaluation") as folder:
        texts = {}
        for number, (domain, text) in enumerate(order.texts.items()):
            texts[domain] = folder / f"{number}.txt"
            texts[domain].write_bytes(zlib.decompress(text))
        data = folder / order.data_name if order.data is not None else None
        if data is not None and order.data is not None:
            data.write_bytes(zlib.decompress(order.data))
        task = EvaluationTask(
            order.evaluator, model, tools, reference, texts, order.prompts, data, order.settings, order.threads,
            silent, order.options, order.code,
        )  # fmt: skip
        began = time.monotonic()
        return tuple(evaluator.evaluate(task)), time.monotonic() - began


def count(order: ShardOrder) -> int:
    """Whole chunks of the text."""
    tools, model = _tools(order), _model(order.model)
    with scratch_folder("shard") as folder:
        return count_chunks(model, _task(order, folder).text, tools, order.settings)


def _tools(order: ShardOrder | EvaluationOrder) -> Toolset:
    tools = find_toolset()
    if tools.identity != order.tools:
        raise WorkersUnfit(f"{platform.node()} has another build of the tools: {tools.identity}, not {order.tools}")
    return tools


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


def _watched(order: ShardOrder) -> tuple[Callable[[], bool], Report]:
    """Whether to stop, since nobody waits any more; and whom to tell how far it is."""
    from distributed import get_worker
    from distributed.core import Status

    worker = get_worker()
    key = worker.get_current_task()
    last = [0.0]

    def stopped() -> bool:
        task = worker.state.tasks.get(key)
        running = worker.status in (Status.running, Status.paused)
        return not running or task is None or task.state in ("cancelled", "released", "forgotten")

    def report(step: Step) -> None:
        now = time.monotonic()
        if step.total and (now - last[0] >= _TELL or step.done >= step.total):
            last[0] = now
            told = {"number": order.number, "done": step.done, "total": step.total}
            worker.loop.add_callback(worker.log_event, order.topic, told)

    return stopped, report if order.topic else silent
