"""What each step from checkpoint to running file needs on a machine: memory, disk, and whether it fits. Nothing is run.

Memory is what a tool allocates, and besides it the model's file: that is mapped, so without room for all of it parts
are read from the disk again and again, which works but is slow. What a context takes comes from llama.cpp itself
(native/footprint.py); the rest is derived from the tools' source, and compared with real runs in
tests/stages/test_needs.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from apex_build.calibration.disk import COPIES, imatrix_bytes
from apex_build.evaluation.reference import logits_bytes
from apex_build.gguf_model.catalogue import Model
from apex_build.native.footprint import Footprint, footprint
from apex_build.native.toolset import Toolset
from apex_build.policy.plan import Plan
from apex_build.stages.given import Workplace
from apex_build.stages.machines import Machine

CONTEXT = 512  # tokens of a chunk, in calibration and evaluation
_TOGETHER = 2048  # tokens that llama-perplexity computes at once, in sequences of a chunk
_LIBRARIES = 10 << 20  # mapped, beside the model
_CONVERTER = 390 << 20  # Python with its libraries for tensors
_QUANTIZER = 4 << 20  # it reads no vocabulary
_GRAPH = 13 << 20  # a second context's graph and scheduler
_A_TOKEN = 3.5  # bytes of text
_LOGIT = 4  # bytes


@dataclass(frozen=True)
class Need:
    """What a step needs, in bytes. `own`: memory; `mapped`: the model's file and libraries, in memory if there is
    room; `disk`: what it writes. `fits`: whether it can be done; `advice`: what to do if it cannot, or is slow.
    """

    step: str
    own: int
    mapped: int
    disk: int
    fits: bool
    advice: tuple[str, ...] = ()

    @property
    def memory(self) -> int:
        return self.own + self.mapped


def needs(plan: Plan, model: Model, place: Workplace, machine: Machine, *, context: int) -> tuple[Need, ...]:
    """Conversion of `model`, then calibration, quantization, evaluation, and the finished file with `context` tokens.

    Disk is counted from step to step: what an earlier one wrote is still there. Raises ToolFailed, ToolKilled if
    llama.cpp cannot load the model.
    """
    found: list[Need] = []
    written = 0 if machine.here else _bytes(model)
    for step in (
        _convert(model),
        _calibrate(model, place.tools),
        _quantize(plan, model),
        _evaluate(model, place),
        _run(plan, model, place.tools, context),
    ):
        found.append(_judged(step, plan, model, machine, written))
        written += step.disk if step.step != "convert" else 0  # counted above
    return tuple(found)


def _judged(need: Need, plan: Plan, model: Model, machine: Machine, written: int) -> Need:
    problems = [*_memory_problems(need, plan, model, machine)]
    before = _bytes(model) if need.step == "convert" else written  # of a conversion the checkpoint, about as large
    no_room = need.disk > 0 and before + need.disk > machine.disk
    if no_room:
        problems.append(_DISK[need.step])
    fits = not no_room and need.own <= machine.usable
    return Need(need.step, need.own, need.mapped, need.disk, fits, tuple(problems))


def _memory_problems(need: Need, plan: Plan, model: Model, machine: Machine) -> Iterator[str]:
    if need.own > machine.usable:
        yield _OWN[need.step]
    elif need.memory > machine.usable and need.step in _MAPPED:
        yield f"slow: the file is read from the disk again and again; faster: {_MAPPED[need.step]}"
    if machine.gpu and not machine.shared and need.step in ("calibrate", "evaluate", "run"):
        layers = model.trunk_layers + model.head_layers + 1
        weights = need.mapped - _LIBRARIES
        room = machine.gpu - need.own
        if room < weights:
            fit = max(0, math.floor(layers * room / weights))
            yield f"--gpu-layers {fit}: the GPU has no room for all {layers}"


_OWN = {
    "convert": "convert where there is more memory",
    "calibrate": "a smaller --context",
    "quantize": "quantize where there is more memory: each tensor is held as F32",
    "evaluate": "a smaller --set EVALUATOR.context",
    "run": "a shorter context, or a KV cache of Q8_0",
}
_MAPPED = {  # llama-quantize reads each tensor once
    "calibrate": "calibrate a Q8_0 file of the same model (--policy uniform --set type=Q8_0)",
    "evaluate": "evaluate with the Q8_0 file as --reference",
    "run": "a policy with fewer bytes",
}
_DISK = {
    "convert": "no room for checkpoint and file: convert from one disk to another",
    "calibrate": "no room for the imatrix with its copies: -o on another disk",
    "quantize": "no room for the file: -o on another disk",
    "evaluate": "no room for the reference's probabilities: another APEX_CACHE_DIR, or --set EVALUATOR.chunks=N",
}


def _convert(model: Model) -> Need:
    """The converter holds one tensor of the checkpoint at a time, as F32, twice; gate and up may be one there."""
    return Need("convert", _CONVERTER + 16 * _largest(model), 0, _bytes(model), True)


def _calibrate(model: Model, tools: Toolset) -> Need:
    taken = _footprint(model, tools, CONTEXT, CONTEXT)
    sums = imatrix_bytes(model)
    own = taken.n_bytes + _head(model, taken) + CONTEXT * _vocabulary(model) * _LOGIT + sums
    return Need("calibrate", own, _bytes(model) + _LIBRARIES, COPIES * sums, True)


def _quantize(plan: Plan, model: Model) -> Need:
    """llama-quantize holds a tensor as F32, a work buffer of the same size, and the result (src/llama-quant.cpp)."""
    written = max(entry.n_bytes for entry in plan.entries)
    own = _QUANTIZER + 8 * _largest(model) + written + imatrix_bytes(model)
    return Need("quantize", own, _bytes(model) + _LIBRARIES, plan.n_bytes, True)


def _evaluate(model: Model, place: Workplace) -> Need:
    """Evaluation against the model itself as reference, which is the larger file; on the default texts."""
    taken = _footprint(model, place.tools, _TOGETHER, _TOGETHER, _TOGETHER // CONTEXT)
    scored = _TOGETHER // 2 * _vocabulary(model) * _LOGIT + CONTEXT * _vocabulary(model) * 2
    chunks = int(sum(path.stat().st_size for path in place.texts((), model).values()) / _A_TOKEN / CONTEXT)
    disk = logits_bytes(chunks, CONTEXT, _vocabulary(model))
    return Need("evaluate", taken.n_bytes + scored, _bytes(model) + _LIBRARIES, disk, True)


def _run(plan: Plan, model: Model, tools: Toolset, context: int) -> Need:
    taken = _footprint(model, tools, context, CONTEXT)
    return Need("run", taken.n_bytes + _head(model, taken), plan.n_bytes + _LIBRARIES, 0, True)


def _head(model: Model, taken: Footprint) -> int:
    """The draft head's context: KV cache for its blocks, buffers like the trunk's, the trunk's rows that it reads."""
    if not model.has_head:
        return 0
    cache = taken.kv_cache * max(1, model.head_layers) // max(1, taken.kv_layers)
    outputs = CONTEXT * (_vocabulary(model) + 2 * int(model.metadata.get(f"{model.architecture}.embedding_length", 0)))
    return _GRAPH + cache + taken.compute_buffers + outputs * _LOGIT


def _footprint(model: Model, tools: Toolset, context: int, batch: int, sequences: int = 1) -> Footprint:
    return footprint(
        tools, model.path, context=context, vocabulary=_vocabulary(model), batch=batch, sequences=sequences
    )


def _vocabulary(model: Model) -> int:
    return len(model.metadata.get("tokenizer.ggml.tokens", ()))


def _bytes(model: Model) -> int:
    return sum(tensor.n_bytes for tensor in model.tensors)


def _largest(model: Model) -> int:
    return max(math.prod(tensor.shape) for tensor in model.tensors)
