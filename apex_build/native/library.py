"""The shared libraries of a build, opened through cffi (ABI mode: nothing is compiled)."""

from __future__ import annotations

from typing import Any

import cffi

from apex_build.errors import BuildMissing
from apex_build.native.toolset import Toolset
from apex_build.places import BUILD_HINT


def open_library(toolset: Toolset, name: str, declarations: str) -> tuple[cffi.FFI, Any]:
    """Open a library by its bare name, with these C declarations. Raises BuildMissing if it is not there or cannot be
    loaded.
    """
    ffi = cffi.FFI()
    ffi.cdef(declarations)
    path = toolset.library(name)
    try:
        return ffi, ffi.dlopen(str(path))
    except OSError as error:
        raise BuildMissing(f"{path} cannot be used: {error}", hint=BUILD_HINT) from None
