"""Importance matrices as llama-imatrix writes them, in GGUF and in the older format (.dat).

GGUF: general.type 'imatrix'; for each weight `<name>.in_sum2`, F32 [row length, matrices], sums of squared inputs, and
`<name>.counts`, F32 [1, matrices], tokens. Legacy, all int32 and float32: number of entries; for each: name length,
name, calls, number of values, values; then the last call, the length of the data set's name, and that name
(tools/imatrix/imatrix.cpp).
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from gguf.constants import GGUFValueType

from apex_build.errors import ImatrixInvalid, ModelInvalid, ModelMissing
from apex_build.gguf_model.cursor import I32, Cursor, quoted
from apex_build.gguf_model.header import MAX_TENSORS, Header, TensorEntry, read_header
from apex_build.gguf_model.model import kind_of
from apex_build.gguf_model.open_file import MAGIC, open_file

HEAD_TOKENS = "imatrix.mtp_token_count"  # this and the next key are written by our patch of llama-imatrix
HEAD_ROWS = "imatrix.mtp_hidden"
GOAL = "apex.imatrix.until_experts"  # tokens that each expert should see, in our files
_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_LEGACY_NAME = 256


@dataclass(frozen=True)
class Entry:
    """The data of one weight. The values stay in the file until they are read.

    `counts` holds tokens for each matrix (each expert, or one for a dense weight); in a legacy file it is one
    number, the calls, since that format does not record experts separately.
    """

    name: str
    row_length: int  # values for each count: the length of the weight's rows, where counts are for each matrix
    counts: tuple[float, ...]
    path: Path
    offset: int  # of the values in the file

    @property
    def n_values(self) -> int:
        return self.row_length * len(self.counts)

    def values(self) -> npt.NDArray[np.float32]:
        """Sums of squared inputs, shape [matrices, row length], mapped from the file. Legacy: means of squares times
        the calls.
        """
        try:
            shape = (len(self.counts), self.row_length)
            return np.memmap(self.path, dtype="<f4", mode="r", offset=self.offset, shape=shape)
        except (OSError, ValueError) as error:
            raise ImatrixInvalid(f"{self.path}: the values of {self.name} cannot be read: {error}") from error


@dataclass(frozen=True)
class Imatrix:
    """An imatrix file. Values that a legacy file does not record are None."""

    path: Path
    format: Literal["gguf", "legacy"]
    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    chunk_count: int | None
    chunk_size: int | None  # tokens
    head_tokens: int | None  # tokens that the draft head was run over; None: not recorded
    head_rows: str | None  # hidden rows that the head read, as in mtp_rows; None: not recorded
    metadata: Mapping[str, Any]


def read_imatrix(path: Path) -> Imatrix:
    """Read an imatrix file of either format; the values stay in the file, see `check_values`. Raises ImatrixInvalid."""
    try:
        with open_file(path) as file:
            start = file.read(len(MAGIC))
        return _from_gguf(read_header(path)) if start == MAGIC else _from_legacy(path)
    except (ModelMissing, ModelInvalid) as error:
        raise ImatrixInvalid(error.message, hint=error.hint) from error
    except OSError as error:
        raise ImatrixInvalid(f"{path}: cannot be read: {error.strerror or error}") from error


@dataclass(frozen=True)
class LeastTokens:
    """Weight -> tokens of the matrix that saw fewest; `goal`: what each expert was to see, where the file says so."""

    by_name: Mapping[str, int]
    goal: int | None = None


def least_tokens(imatrix: Imatrix) -> LeastTokens:
    """None for a legacy file: it counts calls."""
    if imatrix.format == "legacy":
        return LeastTokens({})
    goal = imatrix.metadata.get(GOAL)
    counts = {name: int(min(entry.counts)) for name, entry in imatrix.entries.items()}
    return LeastTokens(counts, goal if isinstance(goal, int) else None)


def check_values(imatrix: Imatrix) -> None:
    """Read all values: none may be negative, infinite or NaN. Raises ImatrixInvalid naming the first that is."""
    for entry in imatrix.entries.values():
        checked_values(entry)


def checked_values(entry: Entry) -> npt.NDArray[np.float32]:
    """The entry's values, checked to be sums of squares. Raises ImatrixInvalid."""
    values = entry.values()
    # minimum and maximum propagate NaN, and comparisons with NaN are false
    if not (values.min() >= 0 and values.max() < np.inf):
        bad = np.argwhere(~(np.isfinite(values) & (values >= 0)))
        matrix, column = (int(index) for index in bad[0])
        raise ImatrixInvalid(
            f"{entry.path}: {len(bad)} of the {values.size} values of {entry.name} are not sums of squares: "
            f"matrix {matrix}, column {column} is {values[matrix, column]}",
            hint="calibrate again: apex calibrate MODEL",
        )
    return values


def looks_legacy(path: Path) -> bool:
    """Whether a file that is not GGUF starts like a legacy imatrix: a number of entries, then a tensor's name."""
    with open_file(path) as file:
        start = file.read(8 + _MAX_LEGACY_NAME)
    if len(start) < 16 or start.startswith(MAGIC):
        return False
    n_entries, length = struct.unpack_from("<ii", start)
    name = start[8 : 8 + length] if 0 < length <= _MAX_LEGACY_NAME else b""
    return 0 < n_entries <= MAX_TENSORS and len(name) == length and _printable(name)


def _from_gguf(header: Header) -> Imatrix:
    path, metadata = header.path, header.metadata
    if kind_of(header) != "imatrix":
        raise ImatrixInvalid(
            f"{path}: not an imatrix: a GGUF file of kind {quoted(kind_of(header))}", hint=f"apex inspect {path}"
        )
    last = header.tensors[-1] if header.tensors else None
    end = header.data_offset + (last.offset + last.n_bytes + -last.n_bytes % header.alignment if last else 0)
    if end > header.file_size:  # ggml reads the padding too, and treats a file without it as a legacy one
        raise ImatrixInvalid(f"{path}: truncated: expected {end} bytes, found {header.file_size}")
    datasets = metadata.get("imatrix.datasets")
    if not isinstance(datasets, tuple) or not all(isinstance(item, str) for item in datasets):
        raise ImatrixInvalid(f"{path}: imatrix.datasets is missing or not a short list of names")
    sums, counts = (
        {t.name.removesuffix(end): t for t in header.tensors if t.name.endswith(end)} for end in (_SUMS, _COUNTS)
    )
    if not sums:
        raise ImatrixInvalid(f"{path}: the imatrix has no entries")
    if odd := sorted(set(sums) ^ set(counts)):
        raise ImatrixInvalid(f"{path}: {odd[0]} has {_SUMS if odd[0] in sums else _COUNTS} but not its counterpart")
    with open_file(path) as file:  # not mapped: the system would read ahead at each small read
        entries = {name: _entry(header, name, sums[name], counts[name], file) for name in sums}
    return Imatrix(
        path=path,
        format="gguf",
        entries=entries,
        datasets=datasets,
        chunk_count=_whole(header, "imatrix.chunk_count"),
        chunk_size=_whole(header, "imatrix.chunk_size"),
        head_tokens=_whole(header, HEAD_TOKENS) if HEAD_TOKENS in metadata else None,
        head_rows=_word(header, HEAD_ROWS) if HEAD_ROWS in metadata else None,
        metadata=metadata,
    )


def _entry(header: Header, name: str, sums: TensorEntry, counts: TensorEntry, file: BinaryIO) -> Entry:
    path, n_counts = header.path, counts.n_bytes // 4
    if sums.type != "F32" or counts.type != "F32":
        raise ImatrixInvalid(f"{path}: the entry {name} is of type {sums.type}/{counts.type}, expected F32")
    # llama-quantize reads one count for each row of in_sum2, whatever the length of counts
    if sums.n_bytes // 4 // sums.shape[0] != n_counts:
        raise ImatrixInvalid(f"{path}: the entry {name} has sums of shape {sums.shape} but {n_counts} counts")
    raw = os.pread(file.fileno(), counts.n_bytes, header.data_offset + counts.offset)
    if len(raw) != counts.n_bytes:
        raise ImatrixInvalid(f"{path}: truncated while it was read: the counts of {name} are gone")
    numbers = np.frombuffer(raw, dtype="<f4")
    if not (numbers.min() >= 0 and numbers.max() < np.inf):
        raise ImatrixInvalid(
            f"{path}: the counts of {name} are not numbers of tokens: from {numbers.min()} to {numbers.max()}"
        )
    return Entry(name, sums.shape[0], tuple(numbers.tolist()), path, header.data_offset + sums.offset)


def _whole(header: Header, key: str) -> int:
    value = header.metadata.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ImatrixInvalid(
            f"{header.path}: {key} is {'missing' if value is None else quoted(value)}: expected a whole number"
        )
    return value


def _word(header: Header, key: str) -> str:
    value = header.metadata.get(key)
    if not isinstance(value, str) or not re.fullmatch(r"[a-z0-9_]{1,40}", value):
        raise ImatrixInvalid(f"{header.path}: {key} is {quoted(value)}: expected a word such as post_norm")
    return value


def _from_legacy(path: Path) -> Imatrix:
    if not looks_legacy(path):
        raise ImatrixInvalid(
            f"{path}: not an imatrix: neither GGUF nor llama-imatrix's older format",
            hint=f"apex inspect {path}  shows what it may be",
        )
    with open_file(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        data.madvise(mmap.MADV_RANDOM)  # no read-ahead: the names are far apart
        cursor = Cursor(path, data, 0, len(data), len(data))
        entries: dict[str, Entry] = {}
        n_entries = _natural(cursor, "the number of entries")
        for index in range(n_entries):
            what = f"entry {index + 1} of {n_entries}"
            raw = cursor.raw(_natural(cursor, what), f"the name of {what}", longest=_MAX_LEGACY_NAME)
            name = raw.decode("ascii", errors="replace")
            if not _printable(raw) or name in entries:
                raise ImatrixInvalid(f"{path}: {what} has the name {quoted(raw)}, which is damaged or there twice")
            calls = _natural(cursor, f"the calls of {name}")
            n_values = _natural(cursor, f"the number of values of {name}")
            if n_values == 0:
                raise ImatrixInvalid(f"{path}: {name} has no values")
            entries[name] = Entry(name, n_values, (float(calls),), path, cursor.at)
            cursor.skip(GGUFValueType.FLOAT32, n_values, f"the values of {name}")
        chunk_count: int | None = None
        dataset = ""
        if cursor.at < cursor.limit:  # versions before 2024 end here
            chunk_count = _natural(cursor, "the last call")
            what = "the data set's name"
            dataset = cursor.raw(_natural(cursor, what), what).decode("utf-8", errors="replace")
        if cursor.at != cursor.limit:
            raise ImatrixInvalid(
                f"{path}: {cursor.limit - cursor.at} bytes follow where the imatrix should end, at byte {cursor.at}"
            )
    return Imatrix(path, "legacy", entries, (dataset,) if dataset else (), chunk_count, None, None, None, {})


def _natural(cursor: Cursor, what: str) -> int:
    number: int = cursor.scalar(I32, what)
    if number < 0:
        raise cursor.invalid(f"{what}: the number {number}, expected none below 0")
    return number


def _printable(raw: bytes) -> bool:
    return bool(raw) and all(0x20 < byte < 0x7F for byte in raw)
