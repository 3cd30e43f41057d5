"""What calibration data an imatrix holds for a model: tensors without data, experts that saw few tokens, the draft
head.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from apex_build.errors import ImatrixMismatch
from apex_build.gguf_model.catalogue import Model, Tensor
from apex_build.gguf_model.examine import Examined, examine
from apex_build.gguf_model.imatrix import Entry, Imatrix
from apex_build.gguf_model.quantizable import quantizable

FEW = 0.01  # of an even share: an expert that saw less has hardly any data
# looked up by token, or added: never a matrix product, so no run can record inputs for it
_NO_INPUT = ("nextn.embed_tokens.weight", "_compressor_ape.weight")
# deepseek4: one matrix in the file, loaded as one for each group of heads, and the imatrix has data for each
_LOADED_AS_SEVERAL = "attn_output_a.weight"
# picks tokens for sparse attention; llama.cpp's graphs of draft heads attend to all of them
_NOT_IN_HEADS = ".indexer."
# of the tokens that most of a layer's weights saw: llama-imatrix drops a batch's last rows at some of them, never so
# many
_AGREE = 0.98
# of these a run records as many rows as tokens
_ALL_TOKENS = ("routed", "shared", "dense", "attention", "ssm", "nextn")
_FEWER_ROWS = re.compile(r"indexer|compressor|vis_|_chexps")
_HARDLY_ANY = 0.1  # of the model's weights; an imatrix of the same model has all that were run


@dataclass(frozen=True)
class TensorCoverage:
    """The data of one weight. `counts` as in Entry, empty without data; experts are numbered from 0."""

    name: str
    role: str
    layer: int
    draft_head: bool
    experts: int  # matrices of the tensor, 1 for a dense weight
    counts: tuple[float, ...]
    without_tokens: tuple[int, ...]  # experts
    few_tokens: tuple[int, ...]  # experts with some, but less than the threshold
    empty: tuple[int, ...] = ()  # experts with a token count, but only zero sums

    @property
    def has_data(self) -> bool:
        return bool(self.counts) and len({*self.without_tokens, *self.empty}) < self.experts

    @property
    def fewest(self) -> float:
        """The fewest tokens of an expert, among those that saw some."""
        return min((count for count in self.counts if count), default=0.0)


@dataclass(frozen=True)
class Coverage:
    """An imatrix compared with a model: each weight that llama-quantize looks up data for, in the model's order."""

    imatrix: Imatrix
    model: Model
    tensors: tuple[TensorCoverage, ...]
    unused: tuple[str, ...]  # entries that belong to no weight of the model
    threshold: float  # of the even share
    examined: Examined

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.tensors if not tensor.has_data)

    def has_data(self, name: str) -> bool:
        """Whether llama-quantize finds data for a tensor, even one that no run records, such as token_embd."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor.has_data
        entry, finding = self.imatrix.entries.get(name), self.examined.findings.get(name)
        return entry is not None and not (finding and len(finding.empty) == finding.matrices) and any(entry.counts)

    @property
    def disagreeing(self) -> tuple[tuple[TensorCoverage, float, float], ...]:
        """Weights that saw far fewer tokens than others in their layer, with both counts."""
        if self.imatrix.format == "legacy":  # it counts calls
            return ()
        layers: dict[int, list[tuple[TensorCoverage, float]]] = {}
        for tensor in self.tensors:
            if tensor.has_data and tensor.role in _ALL_TOKENS and not self._of_other_rows(tensor.name):
                layers.setdefault(tensor.layer, []).append((tensor, self._tokens(tensor)))
        return tuple(
            (tensor, tokens, most)
            for seen in layers.values()
            for most in (max(tokens for _, tokens in seen),)
            for tensor, tokens in seen
            if tokens < _AGREE * most
        )

    def _of_other_rows(self, name: str) -> bool:
        streams = self.imatrix.head_rows == "streams" and ".nextn." in name  # several rows a token
        return streams or _FEWER_ROWS.search(name) is not None

    def _tokens(self, tensor: TensorCoverage) -> float:
        routed = tensor.role == "routed" and tensor.experts > 1 and len(tensor.counts) == tensor.experts
        return sum(tensor.counts) / max(1, self.model.n_expert_used) if routed else max(tensor.counts)

    @property
    def partial(self) -> tuple[TensorCoverage, ...]:
        """Tensors with data, but with experts that have little or none."""
        return tuple(
            tensor
            for tensor in self.tensors
            if tensor.has_data and (tensor.without_tokens or tensor.few_tokens or tensor.empty)
        )

    @property
    def head(self) -> tuple[TensorCoverage, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.draft_head)

    @property
    def head_calibrated(self) -> bool | None:
        """Whether every weight of the draft head has data; None for a model without a head."""
        return all(tensor.has_data for tensor in self.head) if self.head else None

    @property
    def head_tokens(self) -> int | None:
        """Tokens that the head was run over: as recorded by the tool, else the most that one of its dense weights
        saw (GGUF only).
        """
        if self.imatrix.head_tokens is not None or self.imatrix.format == "legacy":
            return self.imatrix.head_tokens
        dense = [max(tensor.counts) for tensor in self.head if tensor.experts == 1 and tensor.counts]
        return round(max(dense)) if dense else None


def coverage(imatrix: Imatrix, model: Model, threshold: float = FEW) -> Coverage:
    """Compare an imatrix with the model it was made of; `threshold`: below this part of an even share an expert has
    few tokens.

    Sizes are checked as in llama-quantize: the values must be row length x matrices. Raises ImatrixMismatch for an
    imatrix of another model.
    """
    weights = [tensor for tensor in model.tensors if wants_data(tensor)]
    examined = examine(imatrix, matrices_of(model))
    covered = tuple(_covered(tensor, imatrix, examined, threshold) for tensor in weights)
    unused = tuple(sorted(set(imatrix.entries) - {tensor.name for tensor in model.tensors}))
    matched = sum(bool(tensor.counts) for tensor in covered)
    # a file of the head alone uses few of the whole model's entries, but has one for each of its weights
    if weights and (matched < _HARDLY_ANY * len(weights) or len(unused) > matched) and matched < len(weights):
        example = f", {unused[0]} among them" if unused else ""
        raise ImatrixMismatch(
            f"{imatrix.path} belongs to another model: {matched} of the {len(weights)} weights of {model.path} have an "
            "entry, "
            f"and {len(unused)} of its {len(imatrix.entries)} entries are of tensors that the model lacks{example}",
            hint=f"apex calibrate {model.path}",
        )
    return Coverage(imatrix, model, covered, unused, threshold, examined)


def matrices_of(model: Model) -> Mapping[str, int]:
    """The number of matrices of tensors that hold several: experts, or heads."""
    return {tensor.name: tensor.shape[2] for tensor in model.tensors if len(tensor.shape) > 2}


def disagreements(covered: Coverage) -> list[str]:
    """A message about weights that saw fewer tokens than their layer."""
    found = covered.disagreeing
    if not found:
        return []
    tensor, tokens, most = min(found, key=lambda item: item[1] / item[2])
    others = f" (and {len(found) - 1} other weights saw fewer than their layer)" if len(found) > 1 else ""
    return [
        f"{tensor.name} saw {tokens:.0f} tokens, other weights of its layer {most:.0f}{others}: was the imatrix put "
        "together?"
    ]


def wants_data(tensor: Tensor) -> bool:
    """Whether llama-imatrix can record data for this tensor and llama-quantize would use it: the matrices of the
    blocks.
    """
    unused = tensor.draft_head and _NOT_IN_HEADS in tensor.name
    return can_have_data(tensor.name, tensor.shape, tensor.layer) and not unused


def can_have_data(name: str, shape: Sequence[int], layer: int | None) -> bool:
    return layer is not None and quantizable(name, shape) and not name.endswith(_NO_INPUT)


def _covered(tensor: Tensor, imatrix: Imatrix, examined: Examined, threshold: float) -> TensorCoverage:
    entry = imatrix.entries.get(tensor.name)
    experts = tensor.shape[2] if len(tensor.shape) > 2 else _loaded_as(tensor, entry)
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
        if len(counts) < experts and without:  # one count for all matrices
            without = tuple(range(experts))
    assert tensor.layer is not None  # wants_data
    finding = examined.findings.get(tensor.name)
    return TensorCoverage(
        tensor.name,
        tensor.role,
        tensor.layer,
        tensor.draft_head,
        experts,
        counts,
        without,
        few,
        finding.empty if finding else (),
    )


def _loaded_as(tensor: Tensor, entry: Entry | None) -> int:
    """How many matrices llama.cpp makes from one in the file."""
    count, rest = divmod(entry.n_values, tensor.shape[0]) if entry else (1, 0)
    several = tensor.name.endswith(_LOADED_AS_SEVERAL) and count > 0 and not rest and tensor.shape[1] % count == 0
    return count if several else 1


def _fits(tensor: Tensor, entry: Entry, experts: int, imatrix: Imatrix) -> None:
    expected = tensor.shape[0] * experts
    if entry.n_values != expected or len(entry.counts) not in (1, experts):
        matrices = f"{experts} matrices of rows of" if experts > 1 else "rows of"
        raise ImatrixMismatch(
            f"{imatrix.path} belongs to another model: {tensor.name} has {matrices} {tensor.shape[0]}, expected "
            f"{expected} values, "
            f"found {entry.n_values} with {len(entry.counts)} counts",
            hint="apex calibrate MODEL  makes an imatrix of this model",
        )


def _left_out(entry: Entry, experts: int) -> Iterator[int]:
    """Experts without tokens in a legacy file: llama-imatrix wrote 1 x calls for each of their values."""
    for expert, values in enumerate(entry.values().reshape(experts, -1)):
        if experts > 1 and (values == entry.counts[0]).all():
            yield expert
