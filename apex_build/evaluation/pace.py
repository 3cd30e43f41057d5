"""Estimate how long work will take: from earlier work of its kind on this machine, kept in the cache, or roughly
guessed.
"""

from __future__ import annotations

import contextlib
import json
import platform
from dataclasses import dataclass

from apex_build.gguf_model.catalogue import Model
from apex_build.places import cache_root
from apex_build.storage.json_files import write_json
from apex_build.system import cpus

# A guess if nothing was measured: operations a second of one core, two for each parameter and token.
_PER_CORE = 1.5e10
# the same for large models: the matrices of a small model are too small to keep a core busy
_PER_CORE_LARGE = 6e10
_PER_GPU = 1e13  # of one data centre GPU with small batches: docs/results/gpu.md
_LARGE = 1e8  # active parameters
_OF_LARGE = " of large models"
GENERATED = 6.0  # writing a token takes about as long as reading this many in a batch, on a CPU
_CHARACTERS = 3.5  # bytes of text in a token, about


@dataclass(frozen=True)
class Estimate:
    seconds: float
    measured: bool  # from earlier work of the kind, not guessed

    def __str__(self) -> str:
        return f"about {duration(self.seconds)}{'' if self.measured else ', roughly guessed'}"


def active_parameters(model: Model) -> float:
    """Parameters that a token is multiplied with: only active experts, without the embedding table."""
    share = model.n_expert_used / model.n_expert if model.n_expert and model.n_expert_used else 1.0
    sizes = ((tensor.n_elements, tensor.name) for tensor in model.tensors if not tensor.name.startswith("token_embd"))
    return sum(size * (share if "_exps" in name else 1.0) for size, name in sizes)


def tokens_of(n_bytes: float) -> float:
    return n_bytes / _CHARACTERS


def work_of(core_seconds: float) -> float:
    """Work other than running tokens through a model, in the same unit: what a core does in this time by our guess."""
    return core_seconds * _PER_CORE / 2


def of_size(kind: str, parameters: float) -> str:
    """The kind of work, separate for large models: times of small ones do not predict theirs."""
    return f"{kind}{_OF_LARGE}" if parameters >= _LARGE else kind


def expect(kind: str, work: float, *, gpu: str = "") -> Estimate:
    """For `work` in tokens times active parameters. `gpu`: what the work runs on, if not on the CPU."""
    known = _known().get(_key(kind, gpu))
    if isinstance(known, (int, float)) and known > 0:
        return Estimate(work * known, True)
    cores = (_PER_CORE_LARGE if kind.endswith(_OF_LARGE) else _PER_CORE) * cpus()
    return Estimate(work * 2 / (max(_PER_GPU, cores) if gpu else cores), False)


def remember(kind: str, work: float, seconds: float, *, gpu: str = "") -> None:
    """Record the time for each unit, for estimates of later work of the kind. Failing to record it is not an error."""
    if work <= 0 or seconds < 1:  # mostly the time to start the program
        return
    known = _known()
    before = known.get(_key(kind, gpu))
    now = seconds / work
    known[_key(kind, gpu)] = (
        (before + now) / 2 if isinstance(before, (int, float)) and before / 4 < now < before * 4 else now
    )
    with contextlib.suppress(OSError):
        path = cache_root() / "pace.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, known)


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min"""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours < 10 else f"{hours} h"


def _key(kind: str, gpu: str) -> str:
    return f"{kind} on {platform.node()}, {gpu or f'{cpus()} CPUs'}"


def _known() -> dict[str, object]:
    try:
        found = json.loads((cache_root() / "pace.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
