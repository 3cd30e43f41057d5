"""Stage plan: what a policy would do to a model. Nothing is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from apex_build.errors import PolicyUnknown
from apex_build.evaluation.built_in import built_in_texts
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.coverage import Coverage, coverage
from apex_build.gguf_model.fused import crossed
from apex_build.gguf_model.imatrix import read_imatrix
from apex_build.gguf_model.mtp_rows import Rows
from apex_build.hookspecs import PolicySpec
from apex_build.native.ggml import Ggml
from apex_build.parameters import Value
from apex_build.plugins import Plugins
from apex_build.policy.lists import TypeList, own_types, read_list
from apex_build.policy.plan import Plan, make_plan
from apex_build.policy.render import template_files
from apex_build.quantization.preflight import check_head_rows
from apex_build.stages.given import ModelFile, Workplace, workplace
from apex_build.storage.outputs import check_apart, check_place, write_text
from apex_build.sweep.auto import Question, known_choice, parameter_at_auto

_ANOTHER = "give another name with --write-rules"


@dataclass(frozen=True)
class PlanOptions:
    """`policy`: a name, or None with a list of types alone (`tensor_types`). `rules`: a file to write the rules to.

    `imatrix`: check that it has data for the types that need it; `head_rows`: hidden rows that the draft head was
    trained on, if not those known for its architecture.
    """

    policy: str | None = None
    parameters: Mapping[str, Value] = field(default_factory=dict, hash=False)
    imatrix: Path | None = None
    tensor_types: Path | None = None
    head_rows: Rows | None = None
    rules: Path | None = None
    force: bool = False  # replace an existing `rules`


@dataclass(frozen=True)
class Planned:
    """`covered`: of the imatrix, where one was given; `warnings` about its draft head; `measured`: what became of
    'auto'.
    """

    plan: Plan
    model: Model
    types: TypeList | None
    covered: Coverage | None
    warnings: tuple[str, ...] = ()
    measured: str | None = None


def policy_of(plugins: Plugins, name: str | None, tensor_types: Path | None) -> PolicySpec:
    """The policy by name, or the policy for a list of types if only that is given. Raises PolicyUnknown."""
    if name is None and tensor_types is None:
        raise PolicyUnknown("no policy and no list of types was given", hint="apex policies lists the policies")
    return plugins.policy(name) if name is not None else own_types()


def plan(model: ModelFile, options: PlanOptions, *, place: Workplace | None = None) -> Planned:
    """The type and size of every tensor, as llama-quantize answers in a dry run.

    Raises PolicyUnknown, ParameterUnknown, TypeUnknown, TemplateFailed, PlanMismatch, ImatrixInvalid, ImatrixMismatch,
    OutputUnwritable.
    """
    place = place or workplace()
    plugins = place.plugins
    policy = policy_of(plugins, options.policy, options.tensor_types)
    found = place.model(model)
    tools = place.tools
    given = [path for path in (options.imatrix, options.tensor_types) if path]
    inputs = (*found.files, *given, *plugins.files(), *template_files(policy), *tools.files())
    if options.rules is not None:
        check_place(options.rules, _ANOTHER)
        check_apart([options.rules], inputs, _ANOTHER)
    types = read_list(options.tensor_types, Ggml(tools)) if options.tensor_types else None
    covered = coverage(crossed(read_imatrix(options.imatrix), found)[0], found) if options.imatrix is not None else None
    parameters = dict(options.parameters)
    measured = _measured(policy, parameters, found, options, place)
    made = make_plan(found, policy, parameters, tools, options.imatrix, types)
    warnings = check_head_rows(made.entries, found, covered, options.head_rows) if covered is not None else []
    if options.rules is not None:
        write_text(options.rules, made.rules.encode(), inputs, force=options.force, hint=_ANOTHER)
    return Planned(made, found, types, covered, tuple(warnings), measured)


def _measured(
    policy: PolicySpec, parameters: dict[str, Value], model: Model, options: PlanOptions, place: Workplace
) -> str | None:
    """Replace 'auto' by an earlier measurement, and note that, or that there is none."""
    name = parameter_at_auto(policy, parameters)
    if name is None or not model.has_head:
        return None
    if options.imatrix is not None:
        texts = built_in_texts(model, place.plugins.calibration_sources())
        evaluators = place.plugins.evaluators()
        choice = known_choice(
            Question(
                model, policy, parameters, options.imatrix, place.tools, evaluators, texts, head_rows=options.head_rows
            )
        )
        if choice:
            parameters[name] = choice.value
            return f"{name}=auto is {choice.value}, as measured: {choice.text}"
    return f"{name}=auto was not measured on this model: the plan takes a cautious mixture; apex quantize measures"
