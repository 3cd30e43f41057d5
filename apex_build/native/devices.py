"""The GPUs that a build's tools run a model on by themselves."""

from __future__ import annotations

import functools

from apex_build.errors import ApexError
from apex_build.native import output
from apex_build.native.run import run_tool
from apex_build.native.toolset import Toolset


def gpus_used(tools: Toolset, layers: int | None = None) -> str:
    """Names of the GPUs, such as `NVIDIA H200` or `2 x NVIDIA H200`; empty if the tools use none. `layers`: of the
    model on them, if the user says how many.
    """
    if layers == 0 or tools.manifest.get("backend") != "cuda":
        return ""
    return _listed(tools)


@functools.lru_cache(maxsize=16)
def _listed(tools: Toolset) -> str:
    try:
        lines = run_tool([tools.tool("llama-perplexity"), "--list-devices"], timeout=60).lines
    except ApexError:
        return ""  # whoever asks wants to know how long something takes, and is told by the tool itself what is wrong
    names = [name for line in lines if (name := output.device_listed(line)) is not None]
    counts = {name: names.count(name) for name in names}
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())
