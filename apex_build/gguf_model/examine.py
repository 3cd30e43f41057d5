"""Find calibration data that would ruin a tensor before it is used, and make a harmless copy.

llama-quantize weights each error by its column's mean square. Where that is zero the quantizers ignore the column:
16 columns of zeros in a row are lost at Q3_K, 32 at Q4_0, IQ4_XS and IQ2_XXS, 128 at Q6_K, 256 at Q2_K, Q4_K and Q5_K
(they silently become zeros in the file). The smallest floor is enough: with 1e-8 of the mean instead of zero,
all types did as well on such columns as on others (runs of 16 to 512 columns, normal weights). FLOOR leaves a margin
on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from apex_build.errors import ImatrixInvalid, OutputUnwritable
from apex_build.gguf_model.imatrix import HEAD_ROWS, HEAD_TOKENS, Entry, Imatrix, checked_values, read_imatrix
from apex_build.storage.digests import sha256_file, sha256_json
from apex_build.storage.outputs import whole_file

FLOOR = 1e-7  # of the mean of a matrix's values
_RAISED_TO = 2 * FLOOR  # so that an examined copy, whose means are higher, passes too
_SOURCE = "apex.imatrix.source"  # key of a copy: digest of the file that it was made of
_FLOOR = "apex.imatrix.floor"
_NAMES = "apex.imatrix.entries"


@dataclass(frozen=True)
class Finding:
    """Faults of one entry. `empty`: matrices with a count but only zero sums; they hold no data, whatever the count.
    `low`: values under the floor in the others. `longest`: the longest run of those.
    """

    name: str
    matrices: int
    empty: tuple[int, ...]
    low: int
    longest: int


@dataclass(frozen=True)
class Examined:
    """Findings by the entry's name; entries without any are left out."""

    findings: Mapping[str, Finding]

    @property
    def low(self) -> int:
        return sum(finding.low for finding in self.findings.values())

    @property
    def sound(self) -> bool:
        return not self.findings

    def lines(self) -> list[str]:
        """Messages for the user, a line for each kind."""
        said = []
        empty = [finding for finding in self.findings.values() if finding.empty]
        if empty:
            worst = max(empty, key=lambda finding: len(finding.empty))
            of = f", {len(worst.empty)} of {worst.matrices} matrices" if worst.matrices > 1 else ""
            count = f"{len(empty)} entries count" if len(empty) > 1 else "1 entry counts"
            said.append(f"{count} tokens, but all sums are zero: they hold no data ({worst.name}{of})")
        low = [finding for finding in self.findings.values() if finding.low]
        if low:
            worst = max(low, key=lambda finding: finding.longest)
            many = f"{len(low)} entries" if len(low) > 1 else "1 entry"
            said.append(
                f"{self.low} values of {many} are zero or almost zero, {worst.longest} side by side in {worst.name}: "
                f"quantizers lose such weights; they are raised to {_RAISED_TO:g} of their matrix's mean"
            )
        return said


def examine(imatrix: Imatrix, matrices: Mapping[str, int] | None = None) -> Examined:
    """Read all values. `matrices`: how many a tensor has, for legacy files, which do not record it.

    Raises ImatrixInvalid for values that are negative, infinite or not numbers.
    """
    found = {}
    for name, entry in imatrix.entries.items():
        if finding := _finding(imatrix, entry, (matrices or {}).get(name, 1)):
            found[name] = finding
    return Examined(found)


def _finding(imatrix: Imatrix, entry: Entry, matrices: int) -> Finding | None:
    checked_values(entry)
    rows, counted = _rows(imatrix, entry, matrices)
    means = rows.mean(axis=1, dtype=np.float64)
    empty = counted & (means == 0)
    low = rows < (FLOOR * means)[:, None]
    low[~counted] = False
    if not (low.any() or empty.any()):
        return None
    return Finding(entry.name, len(rows), tuple(np.flatnonzero(empty).tolist()), int(low.sum()), _longest(low))


def _rows(imatrix: Imatrix, entry: Entry, matrices: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """The values of each matrix, and whether it has a count."""
    values = entry.values()
    if imatrix.format == "legacy" and matrices > 1 and values.size % matrices == 0:
        values = values.reshape(matrices, -1)
    counts = np.array(entry.counts, dtype=np.float32)
    return values, np.broadcast_to(counts > 0, (len(values),)) if len(counts) == 1 else counts > 0


def _longest(low: npt.NDArray[np.bool_]) -> int:
    """The longest run of True in any row."""
    most = 0
    for row in low[low.any(axis=1)]:
        edges = np.flatnonzero(np.diff(np.concatenate(([0], row.view(np.int8), [0]))))
        most = max(most, int((edges[1::2] - edges[::2]).max()))
    return most


def weights(imatrix: Imatrix, entry: Entry, matrices: int) -> npt.NDArray[np.float32]:
    """The weights that llama-quantize gives columns, shape [matrices, row length], with the examined copy."""
    rows, counted = _rows(imatrix, entry, matrices)
    means = rows.mean(axis=1, dtype=np.float64)
    counts = np.broadcast_to(np.array(entry.counts, dtype=np.float32), (len(rows),))
    known = counted & (means > 0)
    return np.where(known[:, None], _raised(rows, means) / np.where(known, counts, 1)[:, None], np.float32(1)).astype(
        np.float32
    )


def _raised(rows: npt.NDArray[np.float32], means: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    raised = np.where(rows < (FLOOR * means)[:, None], (_RAISED_TO * means)[:, None], rows)
    return raised.astype(np.float32)


def write_examined(imatrix: Imatrix, out: Path, matrices: Mapping[str, int] | None = None) -> Path:
    """A copy in GGUF with low values raised, and without the counts of matrices that hold no data (llama-quantize gives
    all of their columns one weight then). `imatrix` may have entries under more names than its file (`fused.crossed`).

    An earlier copy is used or replaced; other files of that name are not. Raises OutputUnwritable.
    """
    origin = {_SOURCE: sha256_file(imatrix.path), _FLOOR: f"{FLOOR:g}", _NAMES: sha256_json(sorted(imatrix.entries))}
    check_copy_free(out)
    if out.exists() and _origin(out) == origin:
        return out
    with whole_file(out) as part:
        _write(imatrix, part, matrices or {}, origin)
    return out


def check_copy_free(out: Path) -> None:
    """Raises OutputUnwritable if another file than an earlier copy is at `out`."""
    if out.exists() and _origin(out)[_SOURCE] is None:
        raise OutputUnwritable(
            f"{out} exists, and apex did not write it", hint="move it away, or write elsewhere with -o"
        )


def _origin(path: Path) -> dict[str, str | None]:
    try:
        metadata = read_imatrix(path).metadata
    except ImatrixInvalid:
        metadata = {}
    return {key: metadata.get(key) for key in (_SOURCE, _FLOOR, _NAMES)}


def _write(imatrix: Imatrix, path: Path, matrices: Mapping[str, int], origin: Mapping[str, str]) -> None:
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()  # an imatrix has no architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(imatrix.datasets) or ["not named"])
    writer.add_uint32("imatrix.chunk_count", imatrix.chunk_count or 0)
    writer.add_uint32("imatrix.chunk_size", imatrix.chunk_size or 0)
    if imatrix.head_tokens is not None:
        writer.add_uint32(HEAD_TOKENS, imatrix.head_tokens)
    if imatrix.head_rows is not None:
        writer.add_string(HEAD_ROWS, imatrix.head_rows)
    for key, text in origin.items():
        writer.add_string(key, text)
    for name, entry in imatrix.entries.items():
        rows, counted = _rows(imatrix, entry, matrices.get(name, 1))
        means = rows.mean(axis=1, dtype=np.float64)
        counts = np.broadcast_to(np.array(entry.counts, dtype=np.float32), (len(rows),)) * (means > 0)
        writer.add_tensor(f"{name}.in_sum2", np.where(counted[:, None], _raised(rows, means), rows).astype(np.float32))
        writer.add_tensor(f"{name}.counts", counts.astype(np.float32).reshape(len(rows), 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
