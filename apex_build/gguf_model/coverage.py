"""What calibration data an imatrix holds for a model: tensors without data, experts that saw few tokens, the draft head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from apex_build.errors import ImatrixMismatch
from apex_build.gguf_model.catalogue import Model, Tensor
from apex_build.gguf_model.imatrix import Entry, Imatrix
from apex_build.gguf_model.quantizable import quantizable

FEW = 0.01  # of the even share: an expert that saw less has hardly any data
# looked up by token, never multiplied with: no run can record inputs for it
_ROWS_ONLY = "nextn.embed_tokens.weight"
_HARDLY_ANY = 0.1  # of the model's weights; an imatrix of the same model has all that were run


@dataclass(frozen=True)
class TensorCoverage:
    """The data of one weight. `counts` is as Entry has it, empty without data; experts are numbered from 0."""

    name: str
    role: str
    layer: int
    draft_head: bool
    experts: int  # matrices of the tensor, 1 for a dense weight
    counts: tuple[float, ...]
    without_tokens: tuple[int, ...]  # experts
    few_tokens: tuple[int, ...]  # experts with some, but less than the threshold

    @property
    def has_data(self) -> bool:
        return bool(self.counts) and len(self.without_tokens) < self.experts


@dataclass(frozen=True)
class Coverage:
    """An imatrix seen against a model: each weight that llama-quantize would look up data for, in the model's order."""

    imatrix: Imatrix
    model: Model
    tensors: tuple[TensorCoverage, ...]
    unused: tuple[str, ...]  # entries that belong to no weight of the model
    threshold: float  # of the even share

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.tensors if not tensor.has_data)

    @property
    def partial(self) -> tuple[TensorCoverage, ...]:
        """Tensors with data, but with experts that have none or little."""
        return tuple(tensor for tensor in self.tensors if tensor.has_data and (tensor.without_tokens or tensor.few_tokens))

    @property
    def head(self) -> tuple[TensorCoverage, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.draft_head)

    @property
    def head_calibrated(self) -> bool | None:
        """Whether every weight of the draft head has data; None for a model without a head."""
        return all(tensor.has_data for tensor in self.head) if self.head else None

    @property
    def head_tokens(self) -> int | None:
        """Tokens that the head was run over: as the tool said, else the most that one of its dense weights saw (GGUF only)."""
        if self.imatrix.head_tokens is not None or self.imatrix.format == "legacy":
            return self.imatrix.head_tokens
        dense = [max(tensor.counts) for tensor in self.head if tensor.experts == 1 and tensor.counts]
        return round(max(dense)) if dense else None


def coverage(imatrix: Imatrix, model: Model, threshold: float = FEW) -> Coverage:
    """Compare an imatrix with the model it was made of; `threshold` is the part of the even share below which tokens are few.

    Sizes are judged as llama-quantize does: the values must be row length x matrices. Raises ImatrixMismatch for an imatrix of
    another model.
    """
    weights = [tensor for tensor in model.tensors if wants_data(tensor)]
    covered = tuple(_covered(tensor, imatrix, threshold) for tensor in weights)
    unused = tuple(sorted(set(imatrix.entries) - {tensor.name for tensor in model.tensors}))
    matched = sum(bool(tensor.counts) for tensor in covered)
    # a file of the head alone uses few of the whole model's entries, but has one for each of its weights
    if weights and (matched < _HARDLY_ANY * len(weights) or len(unused) > matched) and matched < len(weights):
        example = f", {unused[0]} among them" if unused else ""
        raise ImatrixMismatch(
            f"{imatrix.path} belongs to another model: {matched} of the {len(weights)} weights of {model.path} have an entry, "
            f"and {len(unused)} of its {len(imatrix.entries)} entries are of tensors that the model lacks{example}",
            hint=f"apex calibrate {model.path}",
        )
    return Coverage(imatrix, model, covered, unused, threshold)


def wants_data(tensor: Tensor) -> bool:
    """Whether llama-imatrix can record data for this tensor and llama-quantize would use it: the matrices of the blocks."""
    return tensor.layer is not None and quantizable(tensor.name, tensor.shape) and not tensor.name.endswith(_ROWS_ONLY)


def _covered(tensor: Tensor, imatrix: Imatrix, threshold: float) -> TensorCoverage:
    experts = tensor.shape[2] if len(tensor.shape) > 2 else 1
    entry = imatrix.entries.get(tensor.name)
    if entry is not None:
        _fits(tensor, entry, experts, imatrix)
    counts = entry.counts if entry else ()
    without: tuple[int, ...] = ()
    few: tuple[int, ...] = ()
    if entry and imatrix.format == "legacy":
        without = tuple(_left_out(entry, experts))
    elif entry:
        least = threshold * sum(counts) / len(counts)
        without = tuple(expert for expert, count in enumerate(counts) if count == 0)
        few = tuple(expert for expert, count in enumerate(counts) if 0 < count < least)
        if len(counts) < experts and without:  # one count stands for all matrices
            without = tuple(range(experts))
    assert tensor.layer is not None  # wants_data
    return TensorCoverage(tensor.name, tensor.role, tensor.layer, tensor.draft_head, experts, counts, without, few)


def _fits(tensor: Tensor, entry: Entry, experts: int, imatrix: Imatrix) -> None:
    expected = tensor.shape[0] * experts
    if entry.n_values != expected or len(entry.counts) not in (1, experts):
        matrices = f"{experts} matrices of rows of" if experts > 1 else "rows of"
        raise ImatrixMismatch(
            f"{imatrix.path} belongs to another model: {tensor.name} has {matrices} {tensor.shape[0]}, expected {expected} values, "
            f"found {entry.n_values} with {len(entry.counts)} counts",
            hint="apex calibrate MODEL  makes an imatrix of this model",
        )


def _left_out(entry: Entry, experts: int) -> Iterator[int]:
    """Experts without tokens in a legacy file: llama-imatrix wrote 1 x calls for each of their values."""
    for expert, values in enumerate(entry.values().reshape(experts, -1)):
        if experts > 1 and (values == entry.counts[0]).all():
            yield expert
