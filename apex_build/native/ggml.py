"""Ask this build's libggml about its tensor types, through cffi (ABI mode: nothing is compiled)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import cffi
import gguf

from apex_build.errors import BuildMissing, ShapeUnfit, TypeUnknown
from apex_build.native.library import open_library
from apex_build.native.toolset import Toolset
from apex_build.near import near_hint
from apex_build.places import BUILD_HINT

# From ggml/include/ggml.h
_DECLARATIONS = """
const char * ggml_version(void);
int64_t      ggml_blck_size(int type);
size_t       ggml_type_size(int type);
size_t       ggml_row_size(int type, int64_t ne);
const char * ggml_type_name(int type);
bool         ggml_is_quantized(int type);
bool         ggml_quantize_requires_imatrix(int type);
bool         ggml_validate_row_data(int type, const void * data, size_t nbytes);
"""

# Types that llama-quantize refuses for a tensor without calibration data: tensor_requires_imatrix() in
# src/llama-quant.cpp. It is a static function of the tool, so a build cannot be asked; tests/native/test_ggml.py
# compares this with the tool.
_REFUSED_WITHOUT_IMATRIX = frozenset({"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"})


@dataclass(frozen=True)
class TypeTraits:
    """One tensor type. `type_size` is the bytes of one block of `block_size` values.

    `requires_imatrix`: llama-quantize refuses to write it without data for the tensor (exceptions: see
    `needs_imatrix`). `library_requires_imatrix`: the answer of ggml_quantize_requires_imatrix, a smaller set: the
    quantizers that would abort.
    """

    name: str
    block_size: int
    type_size: int
    quantized: bool
    requires_imatrix: bool
    library_requires_imatrix: bool

    @property
    def bits_per_weight(self) -> float:
        return self.type_size * 8 / self.block_size


class Ggml:
    """The types of one build. Names are upper case as in ggml's enum (`Q4_K`); look-ups ignore case."""

    def __init__(self, toolset: Toolset) -> None:
        self._types = _load(toolset)

    def type_names(self) -> tuple[str, ...]:
        """All types in the order of ggml's enum."""
        return tuple(self._types)

    def type_traits(self, name: str) -> TypeTraits:
        """Raises TypeUnknown, with similar names."""
        traits = self._types.get(name.upper())
        if traits is None:
            writable = [
                one
                for one, traits in self._types.items()
                if one not in ("Q8_1", "Q8_K") and (traits.quantized or "F" in one)
            ]
            hint = near_hint(name, writable, f"known: {', '.join(self._types)}", n=4)
            raise TypeUnknown(f"{name!r} is not a tensor type of this build's ggml", hint=hint)
        return traits

    def row_bytes(self, name: str, ne0: int) -> int:
        """Bytes of a row of `ne0` values. Raises ShapeUnfit if they are not whole blocks."""
        traits = self.type_traits(name)
        if ne0 < 0 or ne0 % traits.block_size:
            raise ShapeUnfit(f"a row of {ne0} values cannot be {traits.name}, whose blocks hold {traits.block_size}")
        return ne0 // traits.block_size * traits.type_size

    def needs_imatrix(self, name: str, tensor: str, file_type: str = "") -> bool:
        """Whether type `name` cannot be written for `tensor` without calibration data, in a file of base type
        `file_type`.

        Follows tensor_requires_imatrix() in src/llama-quant.cpp: it makes an exception of token_embd and output, which
        the library does not (ggml_quantize_chunk aborts); Q2_K is refused in a Q2_K_S file only.
        """
        traits = self.type_traits(name)
        if tensor in ("token_embd.weight", "per_layer_token_embd.weight", "output.weight"):
            return traits.library_requires_imatrix
        return traits.requires_imatrix or (traits.name == "Q2_K" and file_type.upper() == "Q2_K_S")


@functools.lru_cache(maxsize=8)
def _load(toolset: Toolset) -> Mapping[str, TypeTraits]:
    ffi, lib = open_library(toolset, "ggml-base", _DECLARATIONS)
    types = {}
    try:
        for number in _type_numbers(ffi, lib, toolset.manifest.get("ggml_type_count")):
            block_size, type_size = int(lib.ggml_blck_size(number)), int(lib.ggml_type_size(number))
            if not block_size or not type_size:
                continue  # a number of a removed type
            name = ffi.string(lib.ggml_type_name(number)).decode().upper()
            needed = bool(lib.ggml_quantize_requires_imatrix(number))
            quantized = bool(lib.ggml_is_quantized(number))
            types[name] = TypeTraits(
                name, block_size, type_size, quantized, needed or name in _REFUSED_WITHOUT_IMATRIX, needed
            )
    except AttributeError as error:
        raise BuildMissing(f"{toolset.library('ggml-base')} cannot be used: {error}", hint=BUILD_HINT) from None
    return MappingProxyType(types)


def _type_numbers(ffi: cffi.FFI, lib: Any, type_count: int | None) -> range:
    """The enum's numbers. ggml does not export GGML_TYPE_COUNT and reads past its table when asked for more.

    So this uses the count that `apex build` took from the header; for other builds, the newest type of gguf-py that
    the library accepts.
    """
    if type_count is not None:
        return range(type_count)
    for known in sorted((int(number) for number in gguf.GGMLQuantizationType), reverse=True):
        if lib.ggml_validate_row_data(known, ffi.NULL, 0):
            return range(known + 1)
    return range(0)
