"""What can be built: a backend is a set of CMake options and targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

TOOLS = ("llama-imatrix", "llama-quantize", "llama-perplexity", "llama-server", "llama-bench", "llama-gguf-split")

# Upstream can fetch things at configure or build time (web UI, sub-projects): all of that is off.
_COMMON = {
    "BUILD_SHARED_LIBS": "ON",
    "CMAKE_BUILD_TYPE": "Release",
    "CMAKE_BUILD_RPATH_USE_ORIGIN": "ON",  # libraries are found beside the tools, so that the folder can be moved
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
    """`options` are CMake variables, over the ones that all backends share; `targets` what Ninja is asked for."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict, hash=False)
    targets: tuple[str, ...] = TOOLS

    def cmake_options(self, *, native: bool) -> dict[str, str]:
        """All CMake variables. `native`: for this machine's CPU and perhaps no other; else for any of the last ten years or so."""
        return {**_COMMON, "GGML_NATIVE": "ON" if native else "OFF", **self.options}


BACKENDS = {backend.name: backend for backend in (Backend("cpu"),)}
