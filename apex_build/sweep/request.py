"""A sweep's request, and what follows from it: values, curves and their imatrices, evaluators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from apex_build.errors import DataMissing, EvaluationRefused, ImatrixMismatch, ParameterUnknown
from apex_build.evaluation.run import Inputs, choose
from apex_build.evaluation.services import serving, settings_for
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.imatrix import read_imatrix
from apex_build.gguf_model.mtp_rows import Rows
from apex_build.hookspecs import Evaluator, PolicySpec
from apex_build.native.ggml import Ggml
from apex_build.native.toolset import Toolset
from apex_build.parameters import Value, resolve
from apex_build.sweep.without_head import holds_head, write_without_head

BASELINE_TYPE = "Q8_0"


@dataclass(frozen=True)
class Request:
    """A request. `over`: parameter -> its values; `curves`: with the head's calibration data (True), without
    (False).

    `imatrix_without_head`: where it is not given, `imatrix` without the head's entries. `baseline`: its values where
    they are not Q8_0 (of a parameter that takes a type) or the first of `over` (of any other); there is none with a
    reference in `inputs`.
    """

    model: Model
    policy: PolicySpec
    parameters: Mapping[str, Value]
    over: Mapping[str, Sequence[str]]
    imatrix: Path | None  # None: no type of the sweep needs data
    folder: Path
    tools: Toolset
    evaluators: Mapping[str, Evaluator]
    only: Sequence[str]
    inputs: Inputs
    imatrix_without_head: Path | None = None
    curves: Sequence[bool] | None = None
    baseline: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None
    head_rows: Rows | None = None  # that the draft head was trained on, if not those known of its architecture


def headless_name(request: Request) -> str:
    assert request.imatrix is not None  # nothing is derived of none
    return f"{request.imatrix.name.removesuffix('.gguf')}-without-head.gguf"


def checked(request: Request) -> tuple[Request, dict[str, str]]:
    """The request with its values as the policy writes them, q4_k as Q4_K, and the baseline's values."""
    ggml = Ggml(request.tools)

    def written(name: str, value: str) -> str:
        return str(resolve(request.policy, {**request.parameters, name: value}, ggml)[name])

    over = {}
    for name, values in request.over.items():
        if name in request.parameters:
            raise ParameterUnknown(f"'{name}' is both swept and set", hint=f"leave out --set {name}=...")
        over[name] = tuple(dict.fromkeys(written(name, value) for value in values))
    if odd := [name for name in request.baseline if name not in over]:
        raise ParameterUnknown(f"--baseline {odd[0]}: the sweep is over {', '.join(over)}")
    if "head" in request.policy.needs and not request.model.has_head:
        raise EvaluationRefused(
            f"{request.model.path} has no draft head, and the sweep is by policy '{request.policy.name}', which is "
            "about it",
            hint=f"apex inspect {request.model.path}",
        )
    known = request.policy.parameters
    typed = {name for name in over if name in known and known[name].kind == "type"}
    baseline = {name: BASELINE_TYPE if name in typed else values[0] for name, values in over.items()}
    baseline |= {name: written(name, value) for name, value in request.baseline.items()}
    return replace(request, over=over), baseline


def varied(request: Request, asked: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Combinations to see by what the values change: those asked for, and beside a single one another."""
    if len(asked) > 1:
        return list(asked)
    return [*asked, {name: _another(request.policy, name, value) for name, value in asked[0].items()}]


def _another(policy: PolicySpec, name: str, value: str) -> str:
    parameter = policy.parameters.get(name)
    if parameter is None:
        return value
    return (
        next(one for one in ("F16", BASELINE_TYPE) if one != value)
        if parameter.kind == "type"
        else str(parameter.default)
    )


def evaluators_of(request: Request, *, head_only: bool) -> tuple[Request, list[Evaluator]]:
    """The requested evaluators, or those that declare they are for such a sweep; and the request with the settings
    that they want.
    """
    # before there is a file the model stands in for the baseline: it has the same head and vocabulary
    inputs = replace(request.inputs, reference=request.inputs.reference or request.model)
    if request.only:
        return request, choose(request.evaluators, request.only, request.model, inputs)[0]
    found = serving(request.evaluators, "head" if head_only else "sweep")
    if not found:
        raise EvaluationRefused("no evaluator is meant for such a sweep", hint="name one: --only NAME")
    known = {evaluator.name: evaluator for evaluator, _ in found}
    chosen = choose(known, list(known) if len(known) == 1 else (), request.model, inputs)[0]
    settings = {name: value for pair in found for name, value in settings_for(*pair).items()}
    return replace(request, inputs=replace(request.inputs, settings={**settings, **request.inputs.settings})), chosen


def curves_of(request: Request, *, head_only: bool) -> list[bool]:
    """Raises DataMissing, ImatrixMismatch."""
    both = (True, False) if request.imatrix is not None or request.imatrix_without_head is not None else (False,)
    curves = list(request.curves or (both if head_only else (True,)))
    if True in curves and head_only and request.imatrix is None:
        raise DataMissing(
            f"a curve with data for the draft head of {request.model.path} needs an imatrix: none was given",
            hint=f"apex calibrate {request.model.path}, then --imatrix; or --without-head",
        )
    if True in curves and head_only and not _has_head(request.imatrix, request.model):
        raise DataMissing(
            f"{request.imatrix} has no data for the draft head of {request.model.path}",
            hint=f"apex calibrate {request.model.path}, which runs the draft head too; or --without-head",
        )
    without = request.imatrix_without_head
    if without and _has_head(without, request.model):
        raise ImatrixMismatch(
            f"--imatrix-without-head {without}: it holds data for the draft head of {request.model.path}"
        )
    return curves


def imatrices_of(request: Request, curves: Sequence[bool], scratch: Path) -> tuple[dict[bool, Path | None], bool]:
    """Curve -> imatrix, and whether that without the head was derived."""
    found: dict[bool, Path | None] = {True: request.imatrix, False: request.imatrix_without_head or request.imatrix}
    derived = False in curves and not request.imatrix_without_head and _has_head(request.imatrix, request.model)
    if derived and request.imatrix is not None:
        found[False] = made = scratch / headless_name(request)
        write_without_head(request.imatrix, request.model, made)
    return found, derived


def _has_head(imatrix: Path | None, model: Model) -> bool:
    return imatrix is not None and any(holds_head(name, model) for name in read_imatrix(imatrix).entries)
