"""The backends that can be built: sets of CMake options and targets."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

TOOLS = (
    "llama-imatrix",
    "llama-quantize",
    "llama-perplexity",
    "llama-server",
    "llama-bench",
    "llama-gguf-split",
    "llama-fit-params",
)

# Upstream can fetch things at configure or build time (web UI, sub-projects): all of that is off.
_COMMON = {
    "BUILD_SHARED_LIBS": "ON",
    "CMAKE_BUILD_TYPE": "Release",
    # Libraries are found beside the tools, so that the folder can be moved. CMake's own path for the build folder
    # ends with an empty element, which means the current folder when the tool runs.
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH": "$ORIGIN",
    "FETCHCONTENT_FULLY_DISCONNECTED": "ON",
    "GGML_CCACHE": "OFF",  # we set the compiler's launcher ourselves
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_LLGUIDANCE": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
}


@dataclass(frozen=True)
class Backend:
    """`options` are CMake variables, in addition to the shared ones; `targets` are passed to Ninja."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict, hash=False)
    targets: tuple[str, ...] = TOOLS

    def cmake_options(self, *, native: bool) -> dict[str, str]:
        """All CMake variables. `native`: for this machine's CPU, and perhaps no other; else for CPUs of the last ten
        years or so.
        """
        return {**_COMMON, "GGML_NATIVE": "ON" if native else "OFF", **self.options}


BACKENDS = {backend.name: backend for backend in (Backend("cpu"),)}  # those without parameters

# docs/build.md has the reason for each
_CUDA = {
    "GGML_BACKEND_DL": "ON",
    "GGML_CUDA": "ON",
    "GGML_CUDA_COMPRESSION_MODE": "size",
    "GGML_CUDA_CUB_3DOT2": "OFF",  # would be fetched
    "GGML_CUDA_FA": "ON",
    "GGML_CUDA_GRAPHS": "ON",
    "GGML_CUDA_NCCL": "OFF",
    "GGML_CUDA_NO_VMM": "OFF",
}
# Flags that a compiler must accept to build all of ggml's CPU backends (ggml/src/CMakeLists.txt): x86_64 GCC 11,
# aarch64 GCC 14. A DGX Spark comes with GCC 13.
_NEWEST_CPUS = {
    "x86_64": ("-mavx512bf16", "-mavxvnni", "-mamx-tile", "-mamx-int8"),
    "aarch64": ("-march=armv9.2-a+dotprod+fp16+sve+i8mm+sve2+sme",),
}
_ARM = "armv8.2-a+dotprod+fp16"  # any 64-bit ARM machine with a GPU that CUDA 13 knows


def cuda_backend(
    architectures: Sequence[str],
    machine: str,
    accepts: Callable[[str], bool],
    *,
    all_kv_types: bool = False,
    targets: Sequence[str] = TOOLS,
) -> Backend:
    """CUDA for these architectures (121a-real), as a library that the tools load at run time, with CPU backends beside
    it.

    There is one for each CPU generation of `machine` (x86_64, aarch64), and the right one is loaded; only one if the
    compiler does not accept all flags. `all_kv_types`: flash attention for every pair of K and V types, not only for
    equal pairs of f16, bf16, q8_0 and q4_0.
    """
    cpus = {"GGML_CPU_ALL_VARIANTS": "ON"}
    if not all(accepts(flag) for flag in _NEWEST_CPUS.get(machine, ("not known",))):
        cpus = {"GGML_CPU_ALL_VARIANTS": "OFF"} | ({"GGML_CPU_ARM_ARCH": _ARM} if machine == "aarch64" else {})
    own = {
        "CMAKE_CUDA_ARCHITECTURES": ";".join(architectures),
        "GGML_CUDA_FA_ALL_QUANTS": "ON" if all_kv_types else "OFF",
    }
    return Backend("cuda", {**_CUDA, **cpus, **own}, tuple(targets))


def with_ptx(architectures: Sequence[str]) -> tuple[str, ...]:
    """Add PTX, which the driver of any other GPU compiles when the backend is loaded.

    Of the newest architecture below 120, since llama.cpp's CMakeLists.txt turns 12x into 12xa, whose PTX runs on
    nothing newer.
    """
    numbers = (int(found[0]) for name in architectures if (found := re.match(r"\d+", name)))
    newest = max((number for number in numbers if number < 120), default=90)
    return tuple(dict.fromkeys((*architectures, f"{newest}-virtual")))
