"""A written file against its source: sampled rows of every tensor and every expert in it; and each row that is all
zeros.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np

from apex_build.errors import VerificationFailed
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.examine import weights
from apex_build.gguf_model.header import Header
from apex_build.gguf_model.imatrix import Imatrix
from apex_build.gguf_model.rows import TensorRows, mapped_rows
from apex_build.native.tensor_data import Bytes, Codec, Floats, codec
from apex_build.native.toolset import Toolset
from apex_build.policy.plan import Entry, Plan
from apex_build.progress import Report, Step, silent
from apex_build.quantization.compare import Fault, Kind, Numbers, Rows, find_fault, sample

COMPARED = 1 << 28  # weights: all of a model up to this size, else an even share of each tensor
_AT_ONCE = 1 << 22  # weights


def check_against(
    header: Header, plan: Plan, source: Model, imatrix: Imatrix | None, tools: Toolset, report: Report = silent
) -> None:
    """Raises VerificationFailed naming a tensor that differs from its source by far more than its type explains."""
    reading = codec(tools)
    share = COMPARED / max(1, plan.n_elements)
    done, total = 0, plan.n_elements
    with mapped_rows([header]) as written, mapped_rows(source.headers) as given:
        for entry in plan.entries:
            new, old = written[entry.name], given[entry.name]
            if fault := _fault(entry, new, old, share, imatrix, reading):
                raise VerificationFailed(
                    f"{header.path}: {entry.name} ({entry.type}) is not what llama-quantize makes of {source.path}: "
                    f"{_place(entry, fault.row)}: {fault.what}",
                    hint="try again; if it fails again, suspect memory, disk and the source file",
                )
            done += entry.n_elements
            report(Step("comparing with the source", done / 1e6, total / 1e6, "million weights"))


def not_compared(plan: Plan, reading: Codec) -> list[str]:
    """Warnings for tensors that `check_against` cannot compare, because the library cannot decode one of their
    types.
    """
    blind: dict[str, list[str]] = {}
    for entry in plan.entries:
        unknown = [
            name
            for name in (entry.from_type, entry.type)
            if entry.type != entry.from_type and not reading.decodes(name)
        ]
        if unknown:
            blind.setdefault(unknown[0], []).append(entry.name)
    return [
        f"this build's libggml does not decode {kind}: {names[0]}"
        + (f" and {len(names) - 1} others" if len(names) > 1 else "")
        + " will not be compared with the source"
        for kind, names in blind.items()
    ]


def _fault(
    entry: Entry, new: TensorRows, old: TensorRows, share: float, imatrix: Imatrix | None, reading: Codec
) -> Fault | None:
    matrices = entry.n_elements // math.prod(entry.shape[:2])
    of_matrix = len(new.rows) // matrices
    picked = sample(entry.name, len(new.rows), matrices, share)
    if entry.type == entry.from_type:
        same = (new.rows[picked] == old.rows[picked]).all(axis=1)
        return None if same.all() else Fault(int(picked[np.flatnonzero(~same)[0]]), "it should be a copy, but differs")
    kind = Kind(entry.type, reading, functools.cache(lambda: _weights(entry, matrices, imatrix)))

    def rows(numbers: Numbers) -> Rows | None:
        source = reading.decode(old.type, old.rows[numbers], entry.shape[0])
        return None if source is None else Rows(numbers, numbers // of_matrix, new.rows[numbers], source)

    for numbers, runs in (
        *((piece, True) for piece in _pieces(picked, matrices, entry.shape[0])),
        (_zeros(new.rows), False),
    ):
        for part in (numbers,) if runs else _cut(numbers, entry.shape[0]):
            if len(part) and (found := rows(part)) and (fault := find_fault(found, kind, runs=runs)):
                return fault
    return None


def _pieces(picked: Numbers, matrices: int, columns: int) -> Iterator[Numbers]:
    """Pieces of whole matrices as far as memory allows, else parts of one."""
    of_matrix = len(picked) // matrices
    together = _AT_ONCE // (of_matrix * columns)
    if together:
        yield from (picked[at : at + together * of_matrix] for at in range(0, len(picked), together * of_matrix))
        return
    for matrix in range(matrices):
        yield from _cut(picked[matrix * of_matrix : (matrix + 1) * of_matrix], columns)


def _cut(numbers: Numbers, columns: int) -> Iterator[Numbers]:
    step = max(1, _AT_ONCE // columns)
    yield from (numbers[at : at + step] for at in range(0, len(numbers), step))


def _zeros(rows: Bytes) -> Numbers:
    """Rows of zero bytes only."""
    width = next(size for size in (8, 4, 2, 1) if rows.shape[1] % size == 0)
    words = rows.view(f"<u{width}") if rows.flags.c_contiguous else rows
    step = max(1, (64 << 20) // rows.shape[1])
    found = [at + np.flatnonzero(~words[at : at + step].any(axis=1)) for at in range(0, len(rows), step)]
    return np.concatenate(found).astype(np.int64)


def _weights(entry: Entry, matrices: int, imatrix: Imatrix | None) -> Floats | None:
    data = imatrix.entries.get(entry.name) if imatrix else None
    if imatrix is None or data is None:
        return None
    found = weights(imatrix, data, matrices)
    return found if found.shape == (matrices, entry.shape[0]) else None


def _place(entry: Entry, row: int) -> str:
    of_matrix = entry.shape[1] if len(entry.shape) > 1 else 1
    if len(entry.shape) < 3:
        return f"row {row}"
    return f"matrix {row // of_matrix} of {entry.n_elements // math.prod(entry.shape[:2])}, row {row % of_matrix}"
