"""A summary of a model or an imatrix, as data, for `apex inspect`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import LlamaFileType

from apex_build.gguf_model.catalogue import Model, Tensor
from apex_build.gguf_model.coverage import Coverage, TensorCoverage
from apex_build.gguf_model.examine import Examined
from apex_build.gguf_model.imatrix import Imatrix
from apex_build.gguf_model.runnable import trunk_blocks


@dataclass(frozen=True)
class Share:
    """All tensors of one role and type, in the draft head or outside it."""

    draft_head: bool
    role: str
    type: str
    tensors: int
    parameters: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.parameters


@dataclass(frozen=True)
class ModelSummary:
    """A model in figures. `tensor_bytes` is the tensors' data, like llama-quantize's 'model size'; `file_bytes` is
    the files' size.
    """

    path: Path
    files: tuple[Path, ...]
    name: str
    architecture: str
    file_type: str | None
    trunk_layers: int
    trunk_layers_here: int  # fewer in a file with only the draft head
    head_layers: int
    head_tensors: int  # 0 with head_layers > 0: the file promises a head but lacks it
    experts: int
    experts_used: int
    tensors: int
    parameters: int
    tensor_bytes: int
    file_bytes: int
    bits_per_weight: float
    shares: tuple[Share, ...]


@dataclass(frozen=True)
class RoleCoverage:
    """Calibration data of all weights of one role, in the draft head or outside it. `least` and `most` are counts of
    one matrix.
    """

    draft_head: bool
    role: str
    weights: int
    with_data: int
    least: float | None
    most: float | None
    experts: int  # matrices of the weights that have data
    without_tokens: int  # of those
    few_tokens: int


def summarize(model: Model) -> ModelSummary:
    """Sizes by role and type, the largest role first, the draft head's after the trunk's."""
    groups: dict[tuple[bool, str, str], list[Tensor]] = {}
    for tensor in model.tensors:
        groups.setdefault((tensor.draft_head, tensor.role, tensor.type), []).append(tensor)
    shares = [
        Share(*key, len(tensors), sum(t.n_elements for t in tensors), sum(t.n_bytes for t in tensors))
        for key, tensors in groups.items()
    ]
    of_role: dict[tuple[bool, str], int] = {}
    for share in shares:
        of_role[share.draft_head, share.role] = of_role.get((share.draft_head, share.role), 0) + share.bytes
    shares.sort(key=lambda share: (share.draft_head, -of_role[share.draft_head, share.role], share.role, -share.bytes))
    parameters, tensor_bytes = sum(share.parameters for share in shares), sum(share.bytes for share in shares)
    return ModelSummary(
        path=model.path,
        files=model.files,
        name=model.name,
        architecture=model.architecture,
        file_type=file_type_name(model.file_type),
        trunk_layers=model.trunk_layers,
        trunk_layers_here=trunk_blocks(model),
        head_layers=model.head_layers,
        head_tensors=sum(tensor.draft_head for tensor in model.tensors),
        experts=model.n_expert,
        experts_used=model.n_expert_used,
        tensors=len(model.tensors),
        parameters=parameters,
        tensor_bytes=tensor_bytes,
        file_bytes=sum(path.stat().st_size for path in model.files),
        bits_per_weight=8 * tensor_bytes / parameters if parameters else 0.0,
        shares=tuple(shares),
    )


def file_type_name(number: int | None) -> str | None:
    """llama-quantize's name of a general.file_type: Q4_K_M for 15."""
    if number is None:
        return None
    try:
        return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return f"unknown ({number})"


def by_role(coverage: Coverage) -> tuple[RoleCoverage, ...]:
    """Coverage of each role, the draft head's after the trunk's, in the model's order otherwise."""
    groups: dict[tuple[bool, str], list[TensorCoverage]] = {}
    for tensor in coverage.tensors:
        groups.setdefault((tensor.draft_head, tensor.role), []).append(tensor)
    return tuple(_role(*key, tensors) for key, tensors in sorted(groups.items(), key=lambda group: group[0][0]))


def _role(draft_head: bool, role: str, tensors: Iterable[TensorCoverage]) -> RoleCoverage:
    tensors = list(tensors)
    known = [tensor for tensor in tensors if tensor.has_data]
    counts = [count for tensor in known for count in tensor.counts]
    return RoleCoverage(
        draft_head=draft_head,
        role=role,
        weights=len(tensors),
        with_data=len(known),
        least=min(counts, default=None),
        most=max(counts, default=None),
        experts=sum(tensor.experts for tensor in known),
        without_tokens=sum(len(tensor.without_tokens) for tensor in known),
        few_tokens=sum(len(tensor.few_tokens) for tensor in known),
    )


def model_json(summary: ModelSummary) -> dict[str, Any]:
    """For `--json`: names as in ModelSummary."""
    shown = {name: value for name, value in vars(summary).items() if name not in ("path", "files", "shares")}
    shares = [{**vars(share), "bits_per_weight": share.bits_per_weight} for share in summary.shares]
    return {
        "kind": "model",
        "path": str(summary.path),
        "files": [str(path) for path in summary.files],
        **shown,
        "shares": shares,
    }


def tensors_json(model: Model) -> list[dict[str, Any]]:
    return [{**vars(tensor), "shape": list(tensor.shape)} for tensor in model.tensors]


def imatrix_json(imatrix: Imatrix, coverage: Coverage | None, examined: Examined) -> dict[str, Any]:
    """For `--json`. What needs a model (the draft head's state among it) is under 'coverage', None without one."""
    return {
        "kind": "imatrix",
        "path": str(imatrix.path),
        "format": imatrix.format,
        "datasets": list(imatrix.datasets),
        "chunk_count": imatrix.chunk_count,
        "chunk_size": imatrix.chunk_size,
        "tokens": tokens(imatrix),
        "head_tokens": imatrix.head_tokens,
        "head_rows": imatrix.head_rows,
        "entries": len(imatrix.entries),
        "examined": {"low_values": examined.low, "findings": [vars(finding) for finding in examined.findings.values()]},
        "coverage": coverage_json(coverage) if coverage else None,
    }


def coverage_json(coverage: Coverage) -> dict[str, Any]:
    return {
        "model": str(coverage.model.path),
        "weights": len(coverage.tensors),
        "weights_with_data": len(coverage.tensors) - len(coverage.missing),
        "missing": list(coverage.missing),
        "unused": list(coverage.unused),
        "threshold": coverage.threshold,
        "head_calibrated": coverage.head_calibrated,
        "head_weights": len(coverage.head),
        "head_weights_with_data": sum(tensor.has_data for tensor in coverage.head),
        "head_tokens": coverage.head_tokens,
        "experts_incomplete": [
            {
                "tensor": tensor.name,
                "without_tokens": list(tensor.without_tokens),
                "few_tokens": list(tensor.few_tokens),
                "fewest": tensor.fewest,
                "empty": list(tensor.empty),
            }
            for tensor in coverage.partial
        ],
        "disagreeing": [{"tensor": t.name, "tokens": own, "layer": most} for t, own, most in coverage.disagreeing],
        "roles": [vars(role) for role in by_role(coverage)],
    }


def tokens(imatrix: Imatrix) -> int | None:
    """Tokens that the trunk was run over: the most that any weight saw. None for a legacy file, which counts calls."""
    if imatrix.format == "legacy":
        return None
    return round(max(count for entry in imatrix.entries.values() for count in entry.counts))
