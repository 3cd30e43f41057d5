"""Validate, decode and encode tensor data with this build's libggml."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cffi
import gguf
import numpy as np
import numpy.typing as npt

from apex_build.native.library import open_library
from apex_build.native.toolset import Toolset

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# ggml/include/ggml.h
_DECLARATIONS = """
bool   ggml_validate_row_data(int type, const void * data, size_t nbytes);
size_t ggml_quantize_chunk(int type, const float * src, void * dst, int64_t start, int64_t nrows, int64_t n_per_row,
                           const float * imatrix);
bool   ggml_quantize_requires_imatrix(int type);
size_t ggml_row_size(int type, int64_t ne);
"""
_PLAIN = {"F32": "<f4", "F16": "<f2"}


def validator(toolset: Toolset) -> Callable[[str, memoryview], bool]:
    """A function (type name, whole rows of a tensor's data) -> whether all values and block scales are numbers."""
    ffi, lib = open_library(toolset, "ggml-base", _DECLARATIONS)

    def is_valid(type_name: str, data: memoryview) -> bool:
        number = int(gguf.GGMLQuantizationType[type_name])
        return bool(lib.ggml_validate_row_data(number, ffi.from_buffer(data), len(data)))

    return is_valid


@dataclass(frozen=True)
class Codec:
    """Convert a tensor's bytes to rows of numbers, and numbers to bytes as llama-quantize does."""

    ffi: cffi.FFI
    lib: Any

    def decode(self, type_name: str, rows: Bytes, n_columns: int) -> Floats | None:
        """The numbers of whole rows, shape [rows, columns]; None for a type that the library does not decode."""
        if type_name in _PLAIN:
            return np.ascontiguousarray(rows).view(_PLAIN[type_name]).astype(np.float32)
        if type_name == "BF16":
            return (np.ascontiguousarray(rows).view("<u2").astype(np.uint32) << 16).view(np.float32)
        function = self._decoder(type_name)
        if function is None:
            return None
        data = np.ascontiguousarray(rows)
        out = np.empty((len(rows), n_columns), dtype=np.float32)
        function(self._pointer("void *", data), self._pointer("float *", out), out.size)
        return out

    def decodes(self, type_name: str) -> bool:
        return type_name in (*_PLAIN, "BF16") or self._decoder(type_name) is not None

    def encode(self, type_name: str, rows: Floats, weights: Floats | None) -> Bytes:
        """The result of ggml_quantize_chunk for rows that share one row of importance `weights`. It aborts on NaN
        and infinity.
        """
        number = int(gguf.GGMLQuantizationType[type_name])
        if weights is None and self.lib.ggml_quantize_requires_imatrix(number):
            weights = np.ones(rows.shape[1], dtype=np.float32)
        data = np.ascontiguousarray(rows, dtype=np.float32)
        given = None if weights is None else np.ascontiguousarray(weights, dtype=np.float32)
        out = np.zeros((len(rows), self.lib.ggml_row_size(number, rows.shape[1])), dtype=np.uint8)
        importance = self.ffi.NULL if given is None else self._pointer("float *", given)
        source, target = self._pointer("float *", data), self._pointer("void *", out)
        self.lib.ggml_quantize_chunk(number, source, target, 0, len(rows), rows.shape[1], importance)
        return out

    def _decoder(self, type_name: str) -> Any:
        # ggml/src/ggml-quants.h: dequantize_row_q4_K, dequantize_row_iq2_xxs
        kind = type_name.lower()
        name = f"dequantize_row_{kind[:-2]}_K" if kind.endswith("_k") else f"dequantize_row_{kind}"
        try:
            return getattr(self.lib, name)
        except AttributeError:
            pass
        try:
            self.ffi.cdef(f"void {name}(const void * x, float * y, int64_t k);", override=True)
            return getattr(self.lib, name)
        except (AttributeError, cffi.CDefError):
            return None

    def _pointer(self, kind: str, array: npt.NDArray[Any]) -> Any:
        return self.ffi.cast(kind, array.ctypes.data)


def codec(toolset: Toolset) -> Codec:
    return Codec(*open_library(toolset, "ggml-base", _DECLARATIONS))
