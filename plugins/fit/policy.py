"""The policy `fit`: choose a type for each tensor from a measurement and a size."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from apex_build.plugin_api import (
    BudgetUnfit,
    Computed,
    Model,
    ParameterUnknown,
    PolicyTask,
    Tensor,
    padded_bytes,
)

from . import allocate, budget, measurement
from .allocate import Allocation, Item, Option
from .errors import TYPES
from .measurement import Measurement

KLD = "kld.mean"
AGREEMENT = "depth1.agreement.difference"  # points; negative if the draft head loses agreement
# for a head that was not scored: types that cost little on the heads that were (docs/results/draft-head.md)
_CAUTIOUS = {"routed": "Q4_K", "dense": "Q4_K"}
_CAUTIOUS_OTHER = "Q5_K"


@dataclass(frozen=True)
class Choices:
    """The choices: for the trunk, for the draft head, and the bytes of the file that are fixed."""

    trunk: tuple[Item, ...]
    head: tuple[Item, ...]
    fixed: int

    @property
    def smallest(self) -> int:
        return self.fixed + allocate.smallest(self.trunk) + allocate.smallest(self.head)

    @property
    def largest(self) -> int:
        return self.fixed + sum(max(one.n_bytes for one in item.options) for item in (*self.trunk, *self.head))


def compute(task: PolicyTask) -> Computed:
    """Raises ParameterUnknown, MeasurementUnfit, BudgetUnfit."""
    found = measured(task)
    warnings = measurement.check(found, task.model, task.build)
    choices = choices_of(task, found)
    target = target_of(task)
    check_target(target, choices, task.model)
    bound = float(task.parameters["draft_loss"])
    head, trunk = _allocated(choices, target, bound)
    if choices.head and not found.head:
        warnings.append("the draft head was not scored: it gets a cautious mixture of types")
    elif head.loss > bound * (1 + 1e-9):
        warnings.append(
            f"the draft head loses {head.loss:.2f} points of agreement: a loss of {bound:g} does not fit this size"
        )
    types = {**trunk.types, **head.types}
    return Computed(types, tuple(warnings), predicted(found, task, types))


def check_target(target: int, choices: Choices, model: Model) -> None:
    """Raises BudgetUnfit."""
    where = f"{model.path.name}: a file of {budget.shown(target)}"
    if target < choices.smallest:
        raise BudgetUnfit(
            f"{where} is not possible: the smallest has {choices.smallest} bytes ({budget.shown(choices.smallest)})",
            hint=f"ask for {choices.smallest} bytes; or change keep, min or types to allow a smaller file",
        )
    if target > choices.largest:
        raise BudgetUnfit(
            f"{where} is not possible: the largest has {choices.largest} bytes ({budget.shown(choices.largest)})",
            hint=f"ask for {choices.largest} bytes",
        )


def predict(task: PolicyTask, types: Mapping[str, str]) -> Mapping[str, float]:
    """Predict figures for types, whatever chose them. Empty without a measurement of this model."""
    if not task.parameters.get("measurement"):
        return {}
    found = measured(task)
    measurement.check(found, task.model, task.build)
    return predicted(found, task, types)


def measured(task: PolicyTask) -> Measurement:
    path = str(task.parameters["measurement"])
    if not path:
        raise ParameterUnknown(
            f"policy '{task.policy}' needs a measurement of the model",
            hint=f"apex fit {task.model.path} --imatrix FILE writes one; then --set measurement=FILE",
        )
    state = Path(path).stat()
    return _read(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=4)
def _read(path: str, _time: int, _size: int) -> Measurement:
    return measurement.read(Path(path))


def target_of(task: PolicyTask) -> int:
    """Bytes of the file. Raises ParameterUnknown unless exactly one of the two parameters is set."""
    size, bits = str(task.parameters["target_size"]), float(task.parameters["target_bpw"])
    if bool(size) == bool(bits):
        raise ParameterUnknown(
            f"policy '{task.policy}' takes either target_size or target_bpw",
            hint="--set target_size=12.5GiB, or --set target_bpw=2.8",
        )
    return budget.size_of(size) if size else budget.bytes_for(bits, task.model) + task.other_bytes


def choices_of(task: PolicyTask, found: Measurement) -> Choices:
    """Raises ParameterUnknown, TypeUnknown."""
    wanted = budget.types_of(str(task.parameters["types"]), TYPES)
    pairs = budget.pairs_of(str(task.parameters["keep"]), "pattern", task.ggml, also=("keep",))
    patterns = budget.compiled(pairs, task.model)
    least = {
        kind: task.ggml.type_traits(type_name).bits_per_weight
        for kind, type_name in budget.pairs_of(str(task.parameters["min"]), "kind", task.ggml)
    }
    kinds = {budget.HEAD, *(tensor.role for tensor in task.model.tensors)}
    if unknown := least.keys() - kinds:
        raise ParameterUnknown(f"min: no tensor has the role '{min(unknown)}'; roles: {', '.join(sorted(kinds))}")
    trunk: list[Item] = []
    head: list[Item] = []
    fixed = task.other_bytes
    points = _head_points(found)
    for tensor in task.model.tensors:
        if tensor.name not in task.quantizable:
            fixed += padded_bytes(tensor.n_bytes)
            continue
        item = _item(
            tensor, task, found, wanted, budget.kept(tensor, patterns), budget.least_bits(tensor, least), points
        )
        (head if tensor.draft_head else trunk).append(item)
    return Choices(tuple(trunk), tuple(head), fixed)


def predicted(found: Measurement, task: PolicyTask, types: Mapping[str, str]) -> dict[str, float]:
    total, points = 0.0, 0.0
    per_tensor = _head_points(found)
    for tensor in task.model.tensors:
        kind = types.get(tensor.name, tensor.type)
        if kind == tensor.type:
            continue
        if tensor.draft_head:
            points += _of_head(tensor, kind, found, per_tensor)
        else:
            total += found.loss(tensor.name, kind)
    figures = {KLD: found.divergence(total)} if found.sensitivities else {}
    return figures | ({AGREEMENT: -points} if found.head else {})


def _allocated(choices: Choices, target: int, bound: float) -> tuple[Allocation, Allocation]:
    """Give the head the fewest bytes that keep its loss within the bound, but leave room for the smallest trunk."""
    rest = target - choices.fixed
    head = allocate.cheapest(choices.head, bound)
    if head.n_bytes > (most := rest - allocate.smallest(choices.trunk)):
        head = allocate.allocate(choices.head, most)
    trunk = allocate.allocate(choices.trunk, rest - head.n_bytes)
    if trunk.n_bytes == allocate.largest(choices.trunk) and choices.head:  # more than the trunk can use
        head = allocate.allocate(choices.head, rest - trunk.n_bytes)
    return head, trunk


def _item(
    tensor: Tensor,
    task: PolicyTask,
    found: Measurement,
    wanted: tuple[str, ...],
    kept: str | None,
    bits: float,
    points: Mapping[str, float],
) -> Item:
    def option(kind: str) -> Option:
        loss = 0.0
        if kind != tensor.type:
            loss = _of_head(tensor, kind, found, points) if tensor.draft_head else found.loss(tensor.name, kind)
        return Option(kind, padded_bytes(task.n_bytes(tensor, kind)), loss)

    if kept is not None:
        return Item(tensor.name, (option(tensor.type if kept == "keep" else kept),))
    if tensor.draft_head and not found.head:
        cautious = _CAUTIOUS.get(tensor.role, _CAUTIOUS_OTHER)
        there = [one for one in found.errors.get(tensor.name, {}) if one in wanted]
        enough = task.ggml.type_traits(cautious).bits_per_weight
        fitting = [one for one in there if task.ggml.type_traits(one).bits_per_weight >= max(bits, enough)]
        return Item(tensor.name, (option(fitting[0] if fitting else tensor.type),))
    known = tuple(found.errors.get(tensor.name, {}))
    if not tensor.draft_head and tensor.name not in found.sensitivities:
        known = tuple(one for one in known if one == "Q8_0")  # the cost of other types is unknown
    kinds = [
        one
        for one in known
        if one in wanted and one != tensor.type and task.ggml.type_traits(one).bits_per_weight >= bits
    ]
    return Item(tensor.name, tuple(option(one) for one in (*kinds, tensor.type)))


def _head_points(found: Measurement) -> dict[str, float]:
    """Points of agreement per unit of error, for each tensor of the head: its share of its part's points."""
    return {name: part.points / len(part.tensors) for part in found.head for name in part.tensors}


def _of_head(tensor: Tensor, kind: str, found: Measurement, points: Mapping[str, float]) -> float:
    of = found.errors.get(tensor.name, {}).get(kind)
    return points.get(tensor.name, 0.0) * of.error if of else 0.0
