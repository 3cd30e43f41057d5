"""Read numbers, strings and arrays from untrusted bytes: every length is checked before it is used."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGUFValueType

from apex_build.errors import ModelInvalid

MAX_STRING = 16 << 20  # bytes of one string; the longest real ones are chat templates, under 100 kB

I32 = struct.Struct("<i")
U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")
SCALARS = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: U32,
    GGUFValueType.INT32: I32,
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.BOOL: struct.Struct("<?"),
    GGUFValueType.UINT64: U64,
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
}


@dataclass
class Cursor:
    """A position in a file's first bytes, `data`, of which those before `limit` may be read.

    Its methods advance over what they read and raise ModelInvalid; `what` is the noun for the message.
    """

    path: Path
    data: bytes | mmap.mmap
    at: int
    limit: int
    file_size: int

    def invalid(self, what: str) -> ModelInvalid:
        return ModelInvalid(f"{self.path}: {what}")

    def need(self, n_bytes: int, what: str) -> None:
        """Raise unless this many bytes are left."""
        left = self.limit - self.at
        if n_bytes <= left:
            return
        if self.limit < self.file_size:
            raise self.invalid(f"{what}: {n_bytes} bytes at byte {self.at}: implausibly long for a header")
        raise ModelInvalid(
            f"{self.path}: truncated or damaged: it ends inside {what}: expected {n_bytes} bytes at byte {self.at}, "
            f"found {left}",
            hint="copy or download the file again, and compare its size",
        )

    def scalar(self, form: struct.Struct, what: str) -> Any:
        self.need(form.size, what)
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value

    def raw(self, length: int, what: str, *, longest: int = MAX_STRING) -> bytes:
        if not 0 <= length <= longest:
            raise self.invalid(f"{what}: string too long: expected at most {longest} bytes, found {length}")
        self.need(length, what)
        self.at += length
        return bytes(self.data[self.at - length : self.at])

    def string(self, what: str) -> str:
        return self.raw(self.scalar(U64, what), what).decode("utf-8", errors="replace")

    def word(self, what: str, *, longest: int, blanks: bool) -> str:
        """A string that is a name: UTF-8, not empty, printable. It will be used in terminals and patterns."""
        raw = self.raw(self.scalar(U64, what), what, longest=longest)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.invalid(f"the name of {what} is not UTF-8: {quoted(raw)}") from None
        if not text or not text.isprintable() or (" " in text and not blanks):
            raise self.invalid(f"the name of {what} is empty, or holds blanks or control characters: {quoted(text)}")
        return text

    def elements(self, type_: GGUFValueType, count: int, what: str) -> tuple[Any, ...]:
        """The elements of an array of strings or scalars."""
        if type_ == GGUFValueType.STRING:
            return tuple(self.string(what) for _ in range(count))
        form = SCALARS[type_]
        self.need(count * form.size, what)
        start, self.at = self.at, self.at + count * form.size
        return struct.unpack_from(f"<{count}{form.format[-1]}", self.data, start)

    def skip(self, type_: GGUFValueType, count: int, what: str) -> None:
        """Skip an array. Vocabularies take most of the time, so this loop does only the necessary checks."""
        if type_ != GGUFValueType.STRING:
            self.need(count * SCALARS[type_].size, what)
            self.at += count * SCALARS[type_].size
            return
        data, at, last, unpack = self.data, self.at, self.limit - U64.size, U64.unpack_from
        for index in range(count):
            if at > last:
                self.at = min(at, self.limit)
                self.need(at - self.at + U64.size, f"{what}, string {index} of {count}")
            (length,) = unpack(data, at)
            at += U64.size + length
        self.at = min(at, self.limit)
        self.need(at - self.at, f"{what}, its last string")
        self.at = at


def quoted(value: Any) -> str:
    """A value from a file for a message: control characters escaped, at most a line long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
