"""Compare rows of a written tensor with the same rows of the source, to find errors far beyond its type's.

Rows whose error is far over their type's (type_errors.py), and runs of columns that all became nearly zero, are
quantized again with the same library and importance: a legitimate row is reproduced bit for bit.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from apex_build.native.tensor_data import Bytes, Codec, Floats
from apex_build.quantization.type_errors import far_over

Numbers = npt.NDArray[np.int64]

LEAST_ROWS = 4  # of each matrix
_RUN = 16  # columns: the shortest run that a type loses whole
_LOST = 0.9  # of a run's squares: zeros are 1
_STRONG = 0.25  # of a matrix's root mean square: weaker runs are legitimately lost next to strong ones
_TINY = 2.0**-13  # scales are half floats: below this, types of many levels have none left
_LOOKED_AT = 8  # rows of a tensor that are quantized again, the worst first
_WORSE = 1.1


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row, counted over the whole tensor; for a message about it."""

    row: int
    what: str


def sample(name: str, n_rows: int, n_matrices: int, share: float) -> Numbers:
    """Numbers of sampled rows: the same count, evenly spaced, in each matrix, with a different offset for each."""
    of_matrix = n_rows // n_matrices
    count = min(of_matrix, max(LEAST_ROWS, round(share * of_matrix)))
    start = np.random.default_rng(zlib.crc32(name.encode())).random((n_matrices, 1))
    within = ((np.arange(count) + start) * of_matrix / count).astype(np.int64)
    return (within + of_matrix * np.arange(n_matrices)[:, None]).ravel()


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor, by number; `matrices` numbers the matrix of each."""

    numbers: Numbers
    matrices: Numbers
    written: Bytes
    source: Floats


@dataclass(frozen=True)
class Kind:
    """How a tensor was made. `weights`: its importance, [matrices, columns]; computed only if something is odd."""

    type: str
    codec: Codec
    weights: Callable[[], Floats | None]


def find_fault(rows: Rows, kind: Kind, *, runs: bool = True) -> Fault | None:
    """The worst fault of the rows, None if there is none.

    `runs`: look for lost columns too; the rows are an equal count of each matrix then, in order.
    """
    decoded = kind.codec.decode(kind.type, rows.written, rows.source.shape[1])
    if decoded is None:
        return None
    with np.errstate(all="ignore"):  # infinities from the source
        squares = np.square(rows.source)
        errors = np.square(decoded - rows.source)
        own, error = squares.mean(axis=1), errors.mean(axis=1)
    if not np.isfinite(error).all():
        index = int(np.flatnonzero(~np.isfinite(error))[0])
        where = "the source holds" if not np.isfinite(own[index]) else "it holds"
        return Fault(int(rows.numbers[index]), f"{where} values that are not finite")
    over = np.sqrt(error) > far_over(kind.type) * np.sqrt(own) + _TINY
    if over.any():
        worst = np.argsort(-np.where(over, error / np.maximum(own, 1e-38), 0), kind="stable")[
            : min(_LOOKED_AT, int(over.sum()))
        ]
        for index in worst:
            again = np.sqrt(np.square(_once_more(rows, int(index), kind) - rows.source[index]).mean())
            actual, size = np.sqrt(error[index]), np.sqrt(own[index])
            if actual > _WORSE * again + _TINY:
                is_, does = f"{actual / size:.2f}", f"{again / size:.2f}"
                return Fault(
                    int(rows.numbers[index]), f"its error is {is_} of its weights, but {kind.type} gives {does}"
                )
    return _lost_columns(rows, errors, squares, kind) if runs else None


def _lost_columns(rows: Rows, errors: Floats, squares: Floats, kind: Kind) -> Fault | None:
    """A run of columns that is lost in all rows of a matrix, though its weights are strong."""
    columns = squares.shape[1] // _RUN * _RUN
    if not columns:
        return None
    matrices = len(np.unique(rows.matrices))
    shape = (matrices, -1, columns // _RUN, _RUN)
    error = errors[:, :columns].reshape(shape).mean(axis=(1, 3))
    own = squares[:, :columns].reshape(shape).mean(axis=(1, 3))
    strong = own > np.maximum(_STRONG**2 * own.mean(axis=1, keepdims=True), _TINY**2)
    for matrix, run in np.argwhere(strong & (error >= _LOST * own))[:_LOOKED_AT]:
        index, part = int(matrix) * (len(rows.numbers) // matrices), slice(run * _RUN, (run + 1) * _RUN)
        again = np.sqrt(np.square((_once_more(rows, index, kind) - rows.source[index])[part]).mean())
        if np.sqrt(errors[index, part].mean()) > _WORSE * again + _TINY:
            return Fault(
                int(rows.numbers[index]),
                f"columns {part.start} to {part.stop - 1} are lost, which {kind.type} would keep",
            )
    return None


def _once_more(rows: Rows, index: int, kind: Kind) -> Floats:
    weights, row = kind.weights(), rows.source[index]
    own = None if weights is None else weights[rows.matrices[index]]
    made = kind.codec.decode(kind.type, kind.codec.encode(kind.type, row[None], own), len(row))
    assert made is not None  # it was decoded before
    only: Floats = made[0]
    return only
