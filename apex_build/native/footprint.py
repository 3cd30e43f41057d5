"""What llama.cpp allocates besides a model's weights: KV cache, recurrent state, compute buffers.

This asks llama-fit-params: it sets up a model and a context without allocating or reading weights, so it takes a
second for a model of any size, and no formula of ours has to follow the architectures. It computes for this machine's
devices; buffers of another GPU may differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from apex_build.errors import ToolFailed
from apex_build.native import output
from apex_build.native.run import run_tool
from apex_build.native.toolset import Toolset

# A tool's own pages: libraries, and the vocabulary with its merges (measured: 18 MiB at 2,048 tokens, 94 at 248,320)
_BASE = 18 << 20
_A_TOKEN = 320
_TIMEOUT = 300.0
_DEBUG = "5"  # llama.cpp's level for the sizes of single buffers


@dataclass(frozen=True)
class Footprint:
    """Bytes besides the weights, for `sequences` of `context` tokens together. `base`: what the tool itself takes.

    `kv_layers`: number of layers with a KV cache.
    """

    context: int
    sequences: int
    batch: int
    kv_cache: int
    kv_layers: int
    recurrent_state: int
    compute_buffers: int
    base: int

    @property
    def n_bytes(self) -> int:
        return self.kv_cache + self.recurrent_state + self.compute_buffers + self.base


def footprint(
    tools: Toolset, model: Path, *, context: int, vocabulary: int, batch: int = 512, sequences: int = 1
) -> Footprint:
    """The footprint of `model`, any GGUF file with its shapes (types do not matter), in a context of `context` tokens
    in total.

    `batch`: tokens computed at once. Raises ToolFailed or ToolKilled, with the tool's words, for a model that
    this llama.cpp cannot load; ToolFailed if its output lacks the sizes.
    """
    program = tools.tool("llama-fit-params")
    command: list[str | Path] = [program, "--model", model, "--ctx-size", str(context), "--batch-size", str(batch)]
    command += ["--ubatch-size", str(min(batch, 512)), "--parallel", str(sequences)]
    command += ["--fit-print", "on", "-lv", _DEBUG]
    found = output.allocations(run_tool(command, explain=output.explain, timeout=_TIMEOUT).lines)
    if not found.compute_buffers:
        raise ToolFailed(f"{model}: {program.name} did not report how much memory it would allocate")
    return Footprint(
        context,
        sequences,
        batch,
        found.kv_cache,
        found.kv_layers,
        found.recurrent_state,
        found.compute_buffers,
        _BASE + _A_TOKEN * vocabulary,
    )
