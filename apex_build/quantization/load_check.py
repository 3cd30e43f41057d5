"""Check whether the built tools can load a file, with llama-perplexity, which loads a model without its weights to
compute its memory.

That reads the header and checks what a load checks (architecture, keys, every tensor and its shape, vocabulary, the
graph), and takes 1.5 s for the 71 GB of a 35B-A3B. The tool is stopped there. An older tool continues and loads the
model: it maps the file, and stops because the text is too short. No weight is used in either case.
"""

from __future__ import annotations

import functools
import mmap
from pathlib import Path

from apex_build.errors import LoadFailed, ModelMissing, ToolFailed, ToolKilled
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.runnable import trunk_blocks
from apex_build.gguf_model.soundness import PRE_TOKENIZER, unsound
from apex_build.native.output import explain, loads
from apex_build.native.run import run_tool
from apex_build.native.toolset import Toolset
from apex_build.storage.scratch import scratch_folder

_OPTIONS = (
    "--ctx-size",
    "64",
    "--batch-size",
    "64",
    "--no-warmup",
    "--gpu-layers",
    "0",
    "--no-repack",
    "--threads",
    "1",
)
_SECONDS = 1800.0  # if the file is really loaded, from a slow disk


def doubts(model: Model, tools: Toolset | None) -> list[str]:
    """Why the model cannot be loaded, as far as its header shows; the tools are asked about unknown pre-tokenizers."""
    found = unsound(model)
    pre = model.metadata.get(PRE_TOKENIZER)
    if found or tools is None or not isinstance(pre, str) or _in_library(pre, tools):
        return found
    try:
        check_loads(model.path, tools)
    except LoadFailed as error:
        return [error.message.partition("cannot load it: ")[2] or error.message]
    return []


def _in_library(text: str, tools: Toolset) -> bool:
    """Whether the library holds this constant: a quick yes. Compilers merge and split short ones, so False proves
    nothing.
    """
    with tools.library("llama").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(text.encode() + b"\0") >= 0


class _Loads(Exception):
    """The tool has printed enough."""


def check_input(model: Model, tools: Toolset) -> None:
    """`check_loads` before hours of work on a model, once for each state of the file; its header first."""
    if reasons := unsound(model):
        raise LoadFailed(
            f"{model.path}: llama.cpp cannot load it: {reasons[0]}",
            hint="apex inspect shows what is in a file; --no-load-check skips this check",
        )
    if not trunk_blocks(model):
        return  # only a draft head, which the tools load together with its model
    try:
        stat = model.path.stat()
    except OSError as error:
        raise ModelMissing(f"{model.path}: cannot be read: {error.strerror or error}") from error
    _checked(model.path, stat.st_size, stat.st_mtime_ns, tools)


@functools.lru_cache(maxsize=64)
def _checked(path: Path, _size: int, _mtime: int, tools: Toolset) -> None:
    check_loads(path, tools)


def check_loads(model: Path, tools: Toolset, what: str = "") -> None:
    """Raises LoadFailed with the tool's own words. `what` names the file in the message, if not by its path."""
    name = what or str(model)
    lines: list[str] = []

    def watch(line: str) -> None:
        lines.append(line)
        if loads(line):
            raise _Loads

    with scratch_folder("load") as scratch:
        text = scratch / "text.txt"
        text.write_text("x\n")
        command: list[str | Path] = [
            tools.tool("llama-perplexity"),
            "--model",
            model.absolute(),
            "--file",
            text,
            *_OPTIONS,
        ]
        try:
            run_tool(command, on_line=watch, timeout=_SECONDS, check=True)
        except _Loads:
            return
        except (ToolFailed, ToolKilled) as error:
            said = explain(lines)
            reason = said[0] if said else error.message
            hint = (
                said[1] if said else None
            ) or "apex inspect shows what is in a file; --no-load-check skips this check"
            raise LoadFailed(f"{name}: llama.cpp cannot load it: {reason}", hint=hint) from None
