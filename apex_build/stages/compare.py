"""Stage plan, for several policies: the files that each would make from a model, side by side, with predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from apex_build.errors import ParameterUnknown
from apex_build.gguf_model.catalogue import Model
from apex_build.hookspecs import PolicySpec
from apex_build.native.ggml import Ggml
from apex_build.near import nearby
from apex_build.parameters import BASE_TYPE, Value, resolve
from apex_build.policy.computed import predict, task_of
from apex_build.policy.dry_run import quantizable_tensors
from apex_build.policy.plan import Plan, make_plan
from apex_build.stages.given import ModelFile, Workplace, workplace


@dataclass(frozen=True)
class ComparedPlan:
    """`predicted`: figures, by whichever policy says something of any types."""

    plan: Plan
    predicted: Mapping[str, float] = field(hash=False)


@dataclass(frozen=True)
class Difference:
    """A tensor that does not have the same type in all plans; `types` in the plans' order."""

    name: str
    role: str
    draft_head: bool
    types: tuple[str, ...]


@dataclass(frozen=True)
class Compared:
    model: Model
    plans: tuple[ComparedPlan, ...]
    differences: tuple[Difference, ...]


def compare(
    model: ModelFile, policies: Sequence[str], parameters: Mapping[str, Value], *, place: Workplace | None = None
) -> Compared:
    """Each parameter goes to the policies that have it. Raises PolicyUnknown, ParameterUnknown if none has it, and
    what planning one of them raises.
    """
    place = place or workplace()
    known = place.plugins.policies()
    chosen = [place.plugins.policy(name) for name in dict.fromkeys(policies)]
    predictors = [one for one in known.values() if one.predict is not None]
    _check_parameters(parameters, [*chosen, *predictors])
    found = place.model(model)
    plans = [make_plan(found, one, _own(one, parameters), place.tools) for one in chosen]
    compared = tuple(ComparedPlan(plan, _predicted(plan, found, predictors, parameters, place)) for plan in plans)
    rows = zip(*(plan.entries for plan in plans), strict=True)
    differences = tuple(
        Difference(row[0].name, row[0].role, row[0].draft_head, tuple(entry.type for entry in row))
        for row in rows
        if len({entry.type for entry in row}) > 1
    )
    return Compared(found, compared, differences)


def _own(policy: PolicySpec, parameters: Mapping[str, Value]) -> dict[str, Value]:
    return {name: value for name, value in parameters.items() if name in (*policy.parameters, BASE_TYPE)}


def _check_parameters(parameters: Mapping[str, Value], policies: Sequence[PolicySpec]) -> None:
    names = {BASE_TYPE, *(name for policy in policies for name in policy.parameters)}
    for name in parameters:
        if name not in names:
            raise ParameterUnknown(f"none of the policies has a parameter '{name}'{nearby(name, names)}")


def _predicted(
    plan: Plan, model: Model, predictors: Sequence[PolicySpec], parameters: Mapping[str, Value], place: Workplace
) -> Mapping[str, float]:
    figures = dict(plan.predicted)
    ggml, names = Ggml(place.tools), quantizable_tensors(model, place.tools)
    types = {entry.name: entry.type for entry in plan.entries}
    for policy in predictors:
        values = resolve(policy, _own(policy, parameters), ggml)
        task = task_of(policy, values, model, names, ggml, calibrated=True, build=place.tools.identity)
        figures = {**predict(policy, task, types), **figures}
    return figures
