"""Ask llama-quantize, without writing anything: its base types, what it quantizes, each tensor's type."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf

from apex_build.errors import PlanMismatch, ShapeUnfit, TemplateFailed, ToolFailed, TypeUnknown
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.fingerprint import Files, files_of
from apex_build.native import output
from apex_build.native.output import Fallback, TensorLine, explain, fallbacks, quantized_size, tensor_lines
from apex_build.native.run import run_tool
from apex_build.native.toolset import Toolset
from apex_build.near import near
from apex_build.places import BUILD_HINT
from apex_build.storage.scratch import scratch_folder

_SECONDS = 600.0
_asked: dict[tuple[Files, Toolset], frozenset[str]] = {}


@dataclass(frozen=True)
class DryRun:
    """What llama-quantize would write."""

    tensors: Mapping[str, TensorLine]
    fallbacks: Mapping[str, Fallback]
    mib: float  # of all tensors, to the two decimals that it prints


def dry_run(model: Model, base_type: str, rules: str, tools: Toolset, *, calibrated: bool = False) -> DryRun:
    """`llama-quantize --dry-run` with these rules. Some base types' mixtures depend on whether there is an imatrix,
    not on its contents: `calibrated` passes an almost empty one.

    Raises TypeUnknown for a base type it does not know, ShapeUnfit, and ToolFailed.
    """
    check_base_type(base_type, tools)
    with scratch_folder("plan") as folder:
        arguments: list[str | Path] = [tools.tool("llama-quantize"), "--dry-run"]
        if rules:
            arguments += ["--tensor-type-file", _written(folder / "rules.txt", rules)]
        if calibrated:
            arguments += ["--imatrix", _empty_imatrix(folder / "imatrix.gguf")]
        lines = _run([*arguments, model.path.absolute(), base_type])
    size = quantized_size(lines)
    tensors = {line.name: line for line in tensor_lines(lines)}
    if size is None or tensors.keys() != {tensor.name for tensor in model.tensors}:
        raise PlanMismatch(
            f"llama-quantize --dry-run listed {len(tensors)} tensors of {model.path}, expected {len(model.tensors)}"
        )
    return DryRun(tensors, {fallback.name: fallback for fallback in fallbacks(lines)}, size[0])


def quantizable_tensors(model: Model, tools: Toolset) -> frozenset[str]:
    """Names of the tensors that llama-quantize converts on request; it copies all others, whatever the rules say.

    The tool is asked once for each model and build: it converts exactly these to an unquantized type; tensors that
    already have that type show in a run with another. (`gguf_model.quantizable` says it of a model
    without a build.)
    """
    key = (files_of(model), tools)
    if key not in _asked:
        _asked[key] = _ask_quantizable(model, tools)
    return _asked[key]


def _ask_quantizable(model: Model, tools: Toolset) -> frozenset[str]:
    found: set[str] = set()
    for target in ("BF16", "F16"):
        run = dry_run(model, target, "", tools)
        found |= {name for name, line in run.tensors.items() if line.target != line.source}
        if all(line.source != target for line in run.tensors.values()):
            break
    return frozenset(found)


def check_base_type(name: str, tools: Toolset) -> int:
    """The number (LLAMA_FTYPE, `general.file_type`) of a base type. Raises TypeUnknown with similar names."""
    known = base_types(tools)
    if name.upper() not in known:
        nearest = near(name, known, n=4) or sorted(known)
        raise TypeUnknown(
            f"'{name}' is not a base type of llama-quantize; it knows: {', '.join(nearest)}",
            hint="for example: --set base_type=Q4_K_M",
        )
    return known[name.upper()]


@functools.lru_cache(maxsize=8)
def base_types(tools: Toolset) -> Mapping[str, int]:
    """llama-quantize's types for a whole file, from its own help: name -> LLAMA_FTYPE."""
    lines: list[str] = []
    with contextlib.suppress(ToolFailed):  # it exits with code 1 after its help
        run_tool([tools.tool("llama-quantize"), "--help"], on_line=lines.append, timeout=_SECONDS)
    types = output.file_types(lines)
    if not types:
        raise ToolFailed(f"{tools.tool('llama-quantize')} --help lists no types", hint=BUILD_HINT)
    return types


def _run(arguments: Sequence[str | Path]) -> Sequence[str]:
    lines: list[str] = []
    try:
        return run_tool(arguments, on_line=lines.append, explain=explain, timeout=_SECONDS).lines
    except ToolFailed:
        if unfit := output.unfit_row(lines):
            name, columns, block, type_name = unfit
            raise ShapeUnfit(
                f"{name} has rows of {columns} values, and type {type_name} needs a multiple of {block}",
                hint="give it another type",
            ) from None
        if pattern := output.refused_pattern(lines):
            raise TemplateFailed(
                f"llama-quantize does not understand a pattern of the rules: {pattern}",
                hint="it reads ECMAScript's regular expressions",
            ) from None
        raise


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def _empty_imatrix(path: Path) -> Path:
    """An imatrix that llama-quantize accepts, with one meaningless entry: a dry run only checks that there is one."""
    import numpy as np

    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    writer.add_tensor("none.in_sum2", np.ones((1, 32), dtype=np.float32))
    writer.add_tensor("none.counts", np.ones((1, 1), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
