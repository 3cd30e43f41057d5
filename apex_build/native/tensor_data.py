"""Checking tensor data with this build's libggml."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cffi
import gguf

from apex_build.errors import BuildMissing
from apex_build.native.toolset import Toolset
from apex_build.places import BUILD_HINT

_DECLARATIONS = "bool ggml_validate_row_data(int type, const void * data, size_t nbytes);"  # ggml/include/ggml.h


def validator(toolset: Toolset) -> Callable[[str, memoryview], bool]:
    """A function (type name, whole rows of a tensor's data) -> whether every value and every block's scale is a number."""
    ffi = cffi.FFI()
    ffi.cdef(_DECLARATIONS)
    library = toolset.library("ggml-base")
    try:
        lib: Any = ffi.dlopen(str(library))
    except OSError as error:
        raise BuildMissing(f"{library} cannot be used: {error}", hint=BUILD_HINT) from None

    def is_valid(type_name: str, data: memoryview) -> bool:
        number = int(gguf.GGMLQuantizationType[type_name])
        return bool(lib.ggml_validate_row_data(number, ffi.from_buffer(data), len(data)))

    return is_valid
