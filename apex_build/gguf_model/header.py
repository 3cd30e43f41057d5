"""The header of a GGUF file, read without trusting it: version 2 and 3, little-endian, as ggml's gguf.cpp and gguf.h
describe.

What ggml's reader refuses is refused here, with the place and the reason. Arrays of a vocabulary's length stay in the
file.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUF_VERSION, GGMLQuantizationType, GGUFValueType

from apex_build.errors import ModelInvalid, ModelMissing
from apex_build.gguf_model.cursor import SCALARS, U32, U64, Cursor, quoted
from apex_build.gguf_model.open_file import MAGIC, open_file, refuse_foreign

# Bounds far above any real file, so that a hostile one costs little time and memory before it is refused.
MAX_HEADER = 256 << 20  # bytes before the tensor data; a vocabulary of 248,320 takes 15 million
MAX_TENSORS = 1 << 17
MAX_KEYS = 1 << 16
MAX_NAME = 63  # bytes of a tensor name: GGML_MAX_NAME less its terminator
MAX_KEY = 255  # bytes
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
MAX_ELEMENTS = 1 << 17  # of all arrays that are kept, together
MAX_STRINGS = 1 << 22  # of all arrays of strings; a vocabulary with its merges has under a million
SMALL_ARRAY = 1024  # elements; longer arrays are left in the file as an ArrayValue
INT64_MAX = (1 << 63) - 1


@dataclass(frozen=True)
class ArrayValue:
    """A long array of the metadata, left in the file. `type` is GGUF's name of the element type; `offset` is in the
    file.
    """

    path: Path
    type: str
    count: int
    offset: int
    n_bytes: int

    def __len__(self) -> int:
        return self.count

    def read(self) -> tuple[Any, ...]:
        """All elements. Raises ModelInvalid if the file has changed."""
        with open_file(self.path) as file:
            file.seek(self.offset)
            data = file.read(self.n_bytes)
        cursor = Cursor(self.path, data, 0, len(data), len(data))
        return cursor.elements(GGUFValueType[self.type], self.count, "an array")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header lists it. `shape` is ggml's order, the row length first; `offset` counts from the data
    section.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Header:
    """A GGUF file's header. Metadata values are str, int, float, bool, a tuple of those, or an ArrayValue.

    `key_bytes`: how many bytes each key takes in the file, with its value.
    """

    path: Path
    version: int
    metadata: Mapping[str, Any]
    key_bytes: Mapping[str, int]
    tensors: tuple[TensorEntry, ...]
    alignment: int
    data_offset: int
    file_size: int


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file; the tensor data is not read, only that the file holds all of it.

    Raises ModelMissing if there is no such file, ModelInvalid for anything but a complete GGUF file.
    """
    with open_file(path) as file:
        try:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(64)
            mapped = mmap.mmap(file.fileno(), min(size, MAX_HEADER), access=mmap.ACCESS_READ) if size else None
        except (OSError, ValueError) as error:  # ValueError: it has just become shorter
            raise ModelMissing(f"{path}: cannot be read: {error}") from error
        refuse_foreign(path, start, size)
        assert mapped is not None  # refuse_foreign refuses an empty file
        with mapped:
            return _parse(Cursor(path, mapped, len(MAGIC), len(mapped), size))


def _parse(cursor: Cursor) -> Header:
    version = cursor.scalar(U32, "the version")
    if version & 0xFFFF == 0 and version != 0:
        raise ModelInvalid(
            f"{cursor.path}: a big-endian GGUF file (version {version:#010x}), which llama.cpp reads only on a "
            "big-endian machine",
            hint="gguf-convert-endian FILE little  (from the Python package gguf; it works in place: keep a copy)",
        )
    if version not in (2, GGUF_VERSION):
        raise cursor.invalid(f"GGUF version {version}; versions 2 and {GGUF_VERSION} can be read")
    n_tensors = cursor.scalar(U64, "the number of tensors")
    n_keys = cursor.scalar(U64, "the number of keys")
    for count, most, what in ((n_tensors, MAX_TENSORS, "tensors"), (n_keys, MAX_KEYS, "keys")):
        if count > most:
            raise cursor.invalid(f"damaged: the header says that there are {count} {what}; the limit is {most}")

    metadata: dict[str, Any] = {}
    key_bytes: dict[str, int] = {}
    counted = _Counted()
    alignment = GGUF_DEFAULT_ALIGNMENT
    for index in range(n_keys):
        start = cursor.at
        key = cursor.word(f"key {index + 1} of {n_keys}", longest=MAX_KEY, blanks=True)
        if key in metadata:
            raise cursor.invalid(f"duplicate key {key}")
        type_ = _value_type(cursor, f"the key {key}")
        metadata[key] = _value(cursor, type_, f"the key {key}", counted)
        key_bytes[key] = cursor.at - start
        if key == "general.alignment":
            alignment = _alignment(cursor, type_, metadata[key])

    listed = _listed_tensors(cursor, n_tensors)
    data_offset = cursor.at + (-cursor.at % alignment if n_tensors else 0)
    tensors = _placed(cursor, listed, alignment, data_offset)
    return Header(cursor.path, version, metadata, key_bytes, tensors, alignment, data_offset, cursor.file_size)


def _value_type(cursor: Cursor, what: str) -> GGUFValueType:
    number = cursor.scalar(U32, what)
    try:
        return GGUFValueType(number)
    except ValueError:
        raise cursor.invalid(f"{what}: unknown value type {number}") from None


@dataclass
class _Counted:
    """Elements of all arrays so far: many small arrays cost as much as a few huge ones."""

    kept: int = 0
    strings: int = 0

    def add(self, cursor: Cursor, what: str, *, kept: int, strings: int) -> None:
        self.kept += kept
        self.strings += strings
        if self.kept > MAX_ELEMENTS or self.strings > MAX_STRINGS:
            raise cursor.invalid(
                f"{what}: with it the arrays of the header hold more than {MAX_ELEMENTS} elements, or {MAX_STRINGS} "
                "strings: "
                "no real file has as many"
            )


def _value(cursor: Cursor, type_: GGUFValueType, what: str, counted: _Counted) -> Any:
    if type_ == GGUFValueType.STRING:
        return cursor.string(what)
    if type_ != GGUFValueType.ARRAY:
        return cursor.scalar(SCALARS[type_], what)
    element = _value_type(cursor, what)
    count = cursor.scalar(U64, what)
    if element == GGUFValueType.ARRAY:
        raise cursor.invalid(f"{what}: an array of arrays, which llama.cpp does not read")
    small = count <= SMALL_ARRAY
    cursor.need(count * (U64.size if element == GGUFValueType.STRING else SCALARS[element].size), what)
    counted.add(cursor, what, kept=count if small else 0, strings=count if element == GGUFValueType.STRING else 0)
    if small:
        return cursor.elements(element, count, what)
    start = cursor.at
    cursor.skip(element, count, what)
    return ArrayValue(cursor.path, element.name, count, start, cursor.at - start)


def _alignment(cursor: Cursor, type_: GGUFValueType, value: Any) -> int:
    if type_ != GGUFValueType.UINT32 or value == 0 or value & (value - 1):
        raise cursor.invalid(f"general.alignment is {quoted(value)} ({type_.name}): it must be a power of two (UINT32)")
    alignment: int = value
    return alignment


def _listed_tensors(cursor: Cursor, n_tensors: int) -> dict[str, TensorEntry]:
    found: dict[str, TensorEntry] = {}
    for index in range(n_tensors):
        name = cursor.word(f"tensor {index + 1} of {n_tensors}", longest=MAX_NAME, blanks=False)
        what = f"the tensor {name}"
        if name in found:
            raise cursor.invalid(f"{what} is a duplicate")
        n_dimensions = cursor.scalar(U32, what)
        if n_dimensions > MAX_DIMENSIONS:
            raise cursor.invalid(
                f"{what} has too many dimensions: expected at most {MAX_DIMENSIONS}, found {n_dimensions}"
            )
        shape = tuple(cursor.scalar(U64, what) for _ in range(n_dimensions)) or (1,)
        n_elements = 1
        for extent in shape:
            n_elements *= extent
        if not 0 < n_elements < INT64_MAX or max(shape) > INT64_MAX:
            raise cursor.invalid(
                f"{what} has the shape {shape}: no extent may be 0, and their product must fit 63 bits"
            )
        number = cursor.scalar(U32, what)
        try:
            type_ = GGMLQuantizationType(number)
        except ValueError:
            raise ModelInvalid(
                f"{cursor.path}: {what} is of type number {number}, which this version of the Python package gguf does "
                "not know",
                hint="pip install --upgrade gguf  (if the file was made by a newer llama.cpp; else it is damaged)",
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[type_]
        if shape[0] % block:
            raise cursor.invalid(
                f"{what} of type {type_.name} has rows of {shape[0]}, not a multiple of its block of {block}"
            )
        found[name] = TensorEntry(name, shape, type_.name, cursor.scalar(U64, what), n_elements // block * block_bytes)
    return found


def _placed(
    cursor: Cursor, listed: Mapping[str, TensorEntry], alignment: int, data_offset: int
) -> tuple[TensorEntry, ...]:
    """The tensors, after checking that their data is contiguous, padded to the alignment, and within the file."""
    expected = 0
    for tensor in listed.values():
        if tensor.offset != expected:
            how = "overlaps the tensor before it" if tensor.offset < expected else "leaves a gap"
            raise cursor.invalid(
                f"the data of {tensor.name} {how}: it begins at byte {tensor.offset}, expected {expected}"
            )
        end = data_offset + tensor.offset + tensor.n_bytes
        if end > cursor.file_size:
            last = list(listed.values())[-1]
            total = end if last is tensor else data_offset + last.offset + last.n_bytes
            raise ModelInvalid(
                f"{cursor.path}: truncated: expected {total} bytes, found {cursor.file_size}; "
                f"the data of {tensor.name} is the first that is incomplete",
                hint="copy or download the file again, and compare its size",
            )
        expected += tensor.n_bytes + -tensor.n_bytes % alignment
    return tuple(listed.values())
