"""Part 1: measure the error of each candidate type on each tensor, with the build's own quantizers on sampled rows.

The error is relative: the squared error of the weights over the squares of the weights, where each column is weighted
by its mean square in the imatrix, and each expert by how often it was used. This is the noise in the tensor's output as
a fraction of the output.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from apex_build.plugin_api import (
    Codec,
    Data,
    Ggml,
    Model,
    PaceEstimate,
    Step,
    Tensor,
    TensorRows,
    Toolset,
    cache_folder,
    codec,
    cpus,
    expect,
    fingerprint,
    importance,
    mapped_rows,
    quantize_seconds,
    remember,
    sha256_json,
    work_of,
)

Floats = npt.NDArray[np.float64]
Report = Callable[[Step], None]

VERSION = 1  # raise it when a change of the code changes the errors of a tensor
SAMPLE = 1 << 17  # weights to sample from a tensor; at least one row of each expert
TASK = "measuring errors"

# the smallest types first
TYPES = (
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_0",
    "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0",
)  # fmt: skip
# if rows consist of whole blocks of 256, there is always a better type of about the same size
_FOR_SHORT_ROWS = frozenset({"IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1"})
_BLOCK = 256
_PACE = "errors of a model's types"
_CALL = 3e-4  # seconds of a core for each matrix and type, beside the quantizer's own


@dataclass(frozen=True)
class TypeLoss:
    """The relative error of a type on a tensor, and the standard deviation due to sampling."""

    error: float
    deviation: float


Errors = Mapping[str, Mapping[str, TypeLoss]]  # tensor -> type ->


@dataclass(frozen=True)
class Work:
    """What to measure on a model. `types`: the candidates for each tensor, by its name."""

    model: Model
    data: Data | None
    tools: Toolset
    types: Mapping[str, tuple[str, ...]]
    sample: int = SAMPLE

    @property
    def identity(self) -> str:
        return sha256_json(
            {
                "version": VERSION,
                "model": fingerprint(self.model),
                "imatrix": self.data.sha256 if self.data else None,
                "tools": self.tools.identity,
                "sample": self.sample,
            }
        )

    @property
    def kept(self) -> Path:
        """The file of measured errors, one line for each tensor and type."""
        return cache_folder("fit", self.identity[:32]) / "errors.jsonl"


def candidates(
    tensor: Tensor, ggml: Ggml, data: Data | None, wanted: Sequence[str] = TYPES, base_type: str = "Q8_0"
) -> tuple[str, ...]:
    """The types that the tensor can get: this build knows them, their blocks divide its rows, and the imatrix covers
    the tensor if they need that.
    """
    columns = tensor.shape[0]
    has_data = data is not None and data.covered.has_data(tensor.name)
    if data is not None and tensor.name in data.covered.missing:
        wanted = [one for one in wanted if one == "Q8_0"]  # every other type uses the imatrix, which lacks the tensor
    known = set(ggml.type_names())
    found = []
    for name in wanted:
        if name not in known or (columns % _BLOCK == 0 and name in _FOR_SHORT_ROWS):
            continue
        if columns % ggml.type_traits(name).block_size:
            continue
        if not has_data and ggml.needs_imatrix(name, tensor.name, base_type):
            continue
        found.append(name)
    return tuple(found)


def measure(work: Work, *, threads: int, report: Report) -> Errors:
    """Measure whatever has not been measured yet. Each result is kept at once, so an interrupted run loses none."""
    known = read_kept(work.kept)
    tensors = {tensor.name: tensor for tensor in work.model.tensors}
    left = {name: tuple(one for one in types if one not in known.get(name, {})) for name, types in work.types.items()}
    left = {name: types for name, types in left.items() if types}
    if left:
        _measure(work, [(tensors[name], types) for name, types in left.items()], threads, report)
        known = read_kept(work.kept)
    return {name: {one: known[name][one] for one in types} for name, types in work.types.items()}


def expected(work: Work, threads: int) -> PaceEstimate:
    """How long `measure` will take."""
    known = read_kept(work.kept)
    cost = sum(
        _cost(tensor, [one for one in work.types.get(tensor.name, ()) if one not in known.get(tensor.name, {})], work)
        for tensor in work.model.tensors
    )
    found = expect(_PACE, work_of(cost))  # of all cores
    return replace(found, seconds=found.seconds * cpus() / threads)


def read_kept(path: Path) -> dict[str, dict[str, TypeLoss]]:
    """The errors measured so far; a last line that was cut short is ignored."""
    found: dict[str, dict[str, TypeLoss]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return found
    for line in lines:
        try:
            name, kind, error, deviation = json.loads(line)
            found.setdefault(str(name), {})[str(kind)] = TypeLoss(float(error), float(deviation))
        except (ValueError, TypeError, RecursionError):
            continue
    return found


def _cost(tensor: Tensor, types: Sequence[str], work: Work) -> float:
    """Seconds on one core."""
    weights = _rows(tensor, work.sample)[1] * tensor.shape[0]
    return sum(quantize_seconds(one, weights) + _CALL * _matrices(tensor) for one in types)


def _matrices(tensor: Tensor) -> int:
    return tensor.shape[2] if len(tensor.shape) > 2 else 1


def _rows(tensor: Tensor, sample: int) -> tuple[int, int]:
    """Number of rows to sample from each matrix, and in total."""
    matrices = _matrices(tensor)
    of_matrix = tensor.n_elements // tensor.shape[0] // matrices
    share = max(1, round(sample / (matrices * tensor.shape[0])))
    return min(of_matrix, share), min(of_matrix, share) * matrices


def _measure(work: Work, left: Sequence[tuple[Tensor, tuple[str, ...]]], threads: int, report: Report) -> None:
    coder = codec(work.tools)
    for name in {one for _, types in left for one in types} | {tensor.type for tensor, _ in left}:
        coder.decodes(name)  # declare the C functions before threads share them
    total = sum(_cost(tensor, types, work) for tensor, types in left) or 1.0
    done = 0.0
    lock = threading.Lock()
    stop = threading.Event()
    began = time.monotonic()
    with (
        mapped_rows(work.model.headers) as mapped,
        work.kept.open("a", encoding="utf-8") as kept,
        ThreadPoolExecutor(threads) as pool,
    ):
        if kept.tell():
            kept.write("\n")  # the last line may be cut short

        def one(tensor: Tensor, types: tuple[str, ...]) -> float:
            for kind, found in _errors(tensor, types, mapped[tensor.name], work, coder, stop):
                line = json.dumps([tensor.name, kind, found.error, found.deviation])
                with lock:
                    kept.write(f"{line}\n")
                    kept.flush()
            return _cost(tensor, types, work)

        report(Step(TASK, 0, 100, "%", left=total / threads))
        # the most expensive first, so that no single thread works on one at the end
        waiting = {
            pool.submit(one, tensor, types)
            for tensor, types in sorted(left, key=lambda item: -_cost(item[0], item[1], work))
        }
        try:
            while waiting:
                ready, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                done += sum(future.result() for future in ready)
                rest = (time.monotonic() - began) / done * (total - done) if done else total / threads
                report(Step(TASK, 100 * done / total, 100, "%", left=rest))
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    remember(_PACE, work_of(total) * cpus() / threads, time.monotonic() - began)


def _errors(
    tensor: Tensor, types: Sequence[str], data: TensorRows, work: Work, coder: Codec, stop: threading.Event
) -> Iterator[tuple[str, TypeLoss]]:
    columns = tensor.shape[0]
    matrices = _matrices(tensor)
    of_matrix = len(data.rows) // matrices
    each, _ = _rows(tensor, work.sample)
    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(tensor.name.encode()).digest()[:8], "little"))
    picked = [
        matrix * of_matrix + np.sort(generator.choice(of_matrix, each, replace=False)) for matrix in range(matrices)
    ]
    columns_weigh, used = _weights(tensor, matrices, work)
    for kind in types:
        noise, signal = np.zeros((matrices, each)), np.zeros((matrices, each))
        for matrix, numbers in enumerate(picked):
            if stop.is_set():
                return
            rows = coder.decode(data.type, data.rows[numbers], columns)
            assert rows is not None
            weigh = columns_weigh[matrix] if columns_weigh is not None else None
            restored = coder.decode(kind, coder.encode(kind, rows, weigh), columns)
            assert restored is not None
            by = np.ones(columns) if weigh is None else weigh.astype(np.float64)
            noise[matrix] = np.square(rows - restored, dtype=np.float64) @ by
            signal[matrix] = np.square(rows, dtype=np.float64) @ by
        yield kind, _ratio(noise, signal, used, each / of_matrix)


def _ratio(noise: Floats, signal: Floats, used: Floats, share: float) -> TypeLoss:
    """The error over all rows, each matrix weighted by its use; the deviation follows from the scatter between rows, a
    fraction `share` of which was sampled.
    """
    whole = float((signal.sum(axis=1) * used).sum())
    if whole <= 0:
        return TypeLoss(0.0, 0.0)
    error = float((noise.sum(axis=1) * used).sum()) / whole
    rest = (noise - error * signal) * used[:, None]
    n = rest.size
    if share >= 1 or n < 2:
        return TypeLoss(error, 0.0)
    return TypeLoss(error, float(np.sqrt((1 - share) * n / (n - 1) * np.square(rest - rest.mean()).sum()) / whole))


def _weights(tensor: Tensor, matrices: int, work: Work) -> tuple[npt.NDArray[np.float32] | None, Floats]:
    """The column weights of each matrix, and the share of tokens that use each matrix."""
    even = np.full(matrices, 1 / matrices)
    imatrix = work.data.covered.imatrix if work.data else None
    entry = imatrix.entries.get(tensor.name) if imatrix else None
    if imatrix is None or entry is None or not work.data or not work.data.covered.has_data(tensor.name):
        return None, even
    found = importance(imatrix, entry, matrices)
    if found.shape != (matrices, tensor.shape[0]):
        return None, even
    counts = np.array(entry.counts, dtype=np.float64)
    return found, counts / counts.sum() if len(counts) == matrices and counts.sum() > 0 else even
