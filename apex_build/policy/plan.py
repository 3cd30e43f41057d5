"""The plan of a quantization: each tensor's type and bytes, as the policy asks and llama-quantize will write."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from apex_build.errors import PlanMismatch, PolicyUnfit, ShapeUnfit
from apex_build.gguf_model.catalogue import Model, Tensor
from apex_build.gguf_model.fused import crossed
from apex_build.gguf_model.imatrix import LeastTokens, least_tokens, read_imatrix
from apex_build.hookspecs import PolicySpec
from apex_build.native.ggml import Ggml
from apex_build.native.toolset import Toolset
from apex_build.parameters import BASE_TYPE, Value, resolve
from apex_build.policy.computed import compute, task_of
from apex_build.policy.dry_run import DryRun, dry_run, quantizable_tensors
from apex_build.policy.lists import TypeList, apply_list
from apex_build.policy.render import Places, Rendered, find, render_each
from apex_build.policy.rules import Rule, apply_rules, fitted, idle_rules, parse_rules, policy_warnings, rules_text
from apex_build.progress import Report, Step, silent
from apex_build.storage.digests import sha256_json

MIXTURE = "mixture"
TYPE_LIST = "tensor_types"  # among a plan's parameters: the digest of a user's list
KEPT = "kept"
# parameters that raise the types of tensors that the calibration text hardly reached
STARVED, STARVED_TOKENS, INHERIT = "starved", "starved_tokens", "inherit"


@dataclass(frozen=True)
class Entry:
    """One tensor of a plan, in the model's order.

    `source` says who decided: the rule's line, 'mixture' (llama-quantize's own choice for the base type), or 'kept' (a
    tensor that it never quantizes). `fallback` is the requested type, if the shape cannot hold it and llama-quantize
    uses `type` instead.
    """

    name: str
    role: str
    layer: int | None
    draft_head: bool
    shape: tuple[int, ...]
    from_type: str
    type: str
    n_bytes: int
    source: str
    fallback: str | None
    needs_data: bool  # llama-quantize refuses the type without calibration data for the tensor

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """What `llama-quantize --tensor-type-file RULES [--imatrix F] MODEL OUT BASE_TYPE` will write.

    `identity` is a sha256 over what determines the output: base type, rules, whether there is an imatrix, and all
    entries.
    """

    policy: str
    parameters: Mapping[str, Value]
    base_type: str
    calibrated: bool  # made for a run with an imatrix
    rules: str  # the text for --tensor-type-file, exactly as llama-quantize reads it
    entries: tuple[Entry, ...]
    identity: str
    warnings: tuple[str, ...] = ()  # from the policy, and about settings without effect
    predicted: Mapping[str, float] = field(default_factory=dict, hash=False)  # figures that a policy expects

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors; the file adds its header and padding (`policy.size`)."""
        return sum(entry.n_bytes for entry in self.entries)

    @property
    def n_elements(self) -> int:
        return sum(entry.n_elements for entry in self.entries)

    @property
    def bits_per_weight(self) -> float:
        return self.n_bytes * 8 / self.n_elements

    @property
    def bytes_by_role(self) -> Mapping[str, int]:
        """Role -> bytes; the draft head's tensors, whatever their role, under 'draft head'."""
        totals: dict[str, int] = {}
        for entry in self.entries:
            role = "draft head" if entry.draft_head else entry.role
            totals[role] = totals.get(role, 0) + entry.n_bytes
        return totals

    @property
    def fallbacks(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.fallback)

    @property
    def needing_data(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.needs_data)


@dataclass(frozen=True)
class Wanted:
    """What to plan. `parameters`: values from the user, as text or typed; the others have their defaults. `imatrix`:
    there is one; a calibrated policy is planned as if there were one.
    """

    parameters: Mapping[str, Value]
    imatrix: bool = False


def make_plan(
    model: Model,
    policy: PolicySpec,
    parameters: Mapping[str, Value],
    tools: Toolset,
    imatrix: Path | None = None,
    types: TypeList | None = None,
) -> Plan:
    """`make_plans` for one. Raises ShapeUnfit too."""
    (plan,) = make_plans(model, policy, [Wanted(parameters, imatrix is not None)], tools, types, imatrix=imatrix)
    if isinstance(plan, ShapeUnfit):
        raise plan
    return plan


def make_plans(
    model: Model,
    policy: PolicySpec,
    wanted: Sequence[Wanted],
    tools: Toolset,
    types: TypeList | None = None,
    report: Report = silent,
    *,
    imatrix: Path | None = None,
) -> list[Plan | ShapeUnfit]:
    """Render the policy for the model and ask llama-quantize what it would write; ShapeUnfit if it would write
    nothing.

    Two child processes for the templates and the patterns of all of them, and a run of the tool for each that differs.
    `types`: a user's list, whose rules come before the policy's. `imatrix`: for those wanted with one.

    Raises ParameterUnknown, TypeUnknown, TemplateFailed, TemplateUnsafe, ToolFailed; PlanMismatch where llama-quantize
    would not do what the rules say.
    """
    ggml = Ggml(tools)
    values = [resolve(policy, one.parameters, ggml) for one in wanted]
    check_suits(policy, model)
    quantizable = quantizable_tensors(model, tools)
    tokens = least_tokens(crossed(read_imatrix(imatrix), model)[0]) if imatrix is not None else None
    predicted: list[Mapping[str, float]] = [{} for _ in wanted]
    if policy.compute is not None:
        tasks = [
            task_of(
                policy,
                each,
                model,
                quantizable,
                ggml,
                calibrated=one.imatrix or policy.calibrated,
                build=tools.identity,
            )
            for each, one in zip(values, wanted, strict=True)
        ]
        computed = [compute(policy, task) for task in tasks]
        rendered, predicted = [lines for lines, _ in computed], [found.predicted for _, found in computed]
    else:
        given = [(each, one.parameters) for each, one in zip(values, wanted, strict=True)]
        rendered = _rendered(policy, given, [one.imatrix for one in wanted], model, quantizable, tokens)
    rules = [parse_rules(one.lines, ggml) for one in rendered]
    every = [*(types.rules if types else ()), *(rule for some in rules for rule in some)]
    places = find((rule.pattern for rule in every), [tensor.name for tensor in model.tensors])
    asked = _Asked(model, policy, quantizable, types, tools, ggml, places)
    plans: list[Plan | ShapeUnfit] = []
    for number, one in enumerate(wanted):
        report(Step("planning", number, len(wanted), "files"))
        try:
            made = asked.plan(values[number], rendered[number], rules[number], one)
            if one.imatrix and tokens and (starved := starved_layers(made, tokens)):
                made = replace(made, warnings=(*made.warnings, starved))
            # with a list of the user's own before it, the file is another one than the policy spoke of
            plans.append(made if types else replace(made, predicted=predicted[number]))
        except ShapeUnfit as error:
            plans.append(error)
    return plans


def _rendered(
    policy: PolicySpec,
    given: Sequence[tuple[Mapping[str, Value], Collection[str]]],
    with_data: Sequence[bool],
    model: Model,
    quantizable: Collection[str],
    tokens: LeastTokens | None,
) -> list[Rendered]:
    """In one child process, or two where some are planned with the imatrix and others without."""
    found: dict[int, Rendered] = {}
    seen = [tokens if one else None for one in with_data]
    for of in {id(one): one for one in seen}.values():
        numbers = [number for number, one in enumerate(seen) if one is of]
        some = render_each(policy, [given[one] for one in numbers], model, quantizable, of)
        found |= zip(numbers, some, strict=True)
    return [found[number] for number in range(len(given))]


def starved_layers(plan: Plan, tokens: LeastTokens) -> str | None:
    """What becomes of routed experts that saw fewer tokens than was asked for, when the text was drawn or here."""
    asked = plan.parameters.get(STARVED_TOKENS) if plan.parameters.get(STARVED, INHERIT) != INHERIT else None
    bound = int(asked) if asked is not None else tokens.goal
    few = [
        entry
        for entry in plan.entries
        if entry.role == "routed" and entry.source != KEPT and tokens.by_name.get(entry.name, 0) < (bound or 0)
    ]
    if not few:
        return None
    layers = sorted({entry.layer for entry in few if entry.layer is not None})
    least = min(few, key=lambda entry: tokens.by_name.get(entry.name, 0))
    types = ", ".join(sorted({entry.type for entry in few}))
    shown = ", ".join(map(str, layers[:8])) + (f" and {len(layers) - 8} more" if len(layers) > 8 else "")
    then = "" if asked is not None or STARVED not in plan.parameters else f"; --set {STARVED}=Q4_K raises them"
    return (
        f"experts of layer{'s' if len(layers) > 1 else ''} {shown} saw fewer than {bound} tokens of the calibration "
        f"text, {tokens.by_name.get(least.name, 0)} the least ({least.name}): their tensors get {types}{then}"
    )


@dataclass
class _Asked:
    """What all plans of one call share; `runs` keeps the tool's answers."""

    model: Model
    policy: PolicySpec
    quantizable: frozenset[str]
    types: TypeList | None
    tools: Toolset
    ggml: Ggml
    places: Mapping[str, Places]
    runs: dict[tuple[str, str, bool], DryRun] = field(default_factory=dict)

    def plan(self, values: dict[str, Value], rendered: Rendered, rules: tuple[Rule, ...], wanted: Wanted) -> Plan:
        model, policy, quantizable, ggml = self.model, self.policy, self.quantizable, self.ggml
        base_type = str(values[BASE_TYPE])
        deciding = apply_rules(rules, model.tensors, quantizable, self.places)
        idle = idle_rules(rules, deciding)
        if self.types is not None:
            rules = (*self.types.rules, *rules)
            deciding |= apply_list(self.types, model.tensors, self.places)[0]
            values[TYPE_LIST] = sha256_json(rules_text(self.types.rules))
        deciding = {name: rule for name, rule in deciding.items() if name in quantizable}
        types = {name: rule.type for name, rule in deciding.items()}
        if policy.fit and (nearest := fitted(deciding, model.tensors, ggml)):
            rules = (*(rule for _, rule in nearest), *rules)
            deciding |= dict(nearest)
        calibrated = wanted.imatrix or policy.calibrated
        run = self._run(base_type, rules_text(rules), calibrated)
        entries = tuple(
            _entry(
                tensor,
                run,
                deciding.get(tensor.name),
                tensor.name in quantizable,
                base_type,
                ggml,
                types.get(tensor.name),
            )
            for tensor in model.tensors
        )
        identity = _identity(base_type, rules, calibrated, entries)
        untouched = [*rendered.idle]
        if BASE_TYPE in wanted.parameters and not any(entry.source == MIXTURE for entry in entries):
            untouched.append(BASE_TYPE)
        no_use = (f"{name}={values[name]} touches no tensor of {model.name}" for name in untouched)
        warnings = (*policy_warnings(rendered.lines), *idle, *no_use)
        plan = Plan(policy.name, values, base_type, calibrated, rules_text(rules), entries, identity, warnings)
        if f"{plan.n_bytes / (1 << 20):.2f}" != f"{run.mib:.2f}":
            raise PlanMismatch(
                f"the plan for {model.path} adds up to {plan.n_bytes} bytes, but llama-quantize says {run.mib:.2f} MiB"
            )
        return plan

    def _run(self, base_type: str, rules: str, calibrated: bool) -> DryRun:
        key = (base_type, rules, calibrated)
        if key not in self.runs:
            self.runs[key] = dry_run(self.model, base_type, rules, self.tools, calibrated=calibrated)
        return self.runs[key]


def check_suits(policy: PolicySpec, model: Model) -> None:
    """Raises PolicyUnfit for a policy about a part that the model lacks."""
    if "head" in policy.needs and not any(tensor.draft_head for tensor in model.tensors):
        raise PolicyUnfit(
            f"policy '{policy.name}' needs a draft head, but {model.path} has none",
            hint=f"--policy {policy.otherwise}" if policy.otherwise else "apex policies lists the others",
        )


def _entry(
    tensor: Tensor,
    run: DryRun,
    rule: Rule | None,
    quantizable: bool,
    base_type: str,
    ggml: Ggml,
    wanted: str | None,
) -> Entry:
    line = run.tensors[tensor.name]
    fallen = run.fallbacks.get(tensor.name)
    if not quantizable:
        expected, source = tensor.type, KEPT
    elif rule:
        expected, source = rule.type, rule.line
    else:
        expected, source = fallen.wanted if fallen else line.target, MIXTURE
    if line.target != (fallen.taken if fallen else expected) or (fallen and fallen.wanted != expected):
        raise PlanMismatch(
            f"{tensor.name}: {rule.where if rule else 'no rule'} says {expected}, but llama-quantize would write "
            f"{line.target}",
            hint=f"rules need a quantized base type, and it is {base_type}: --set base_type=Q8_0"
            if line.target == base_type
            else None,
        )
    kept = line.target == tensor.type
    rows = math.prod(tensor.shape[1:])
    return Entry(
        name=tensor.name,
        role=tensor.role,
        layer=tensor.layer,
        draft_head=tensor.draft_head,
        shape=tensor.shape,
        from_type=tensor.type,
        type=line.target,
        n_bytes=tensor.n_bytes if kept else rows * ggml.row_bytes(line.target, tensor.shape[0]),
        source=source,
        fallback=fallen.wanted if fallen else wanted if quantizable and wanted != line.target else None,
        needs_data=not kept and ggml.needs_imatrix(line.target, tensor.name, base_type),
    )


def _identity(base_type: str, rules: Sequence[Rule], calibrated: bool, entries: Sequence[Entry]) -> str:
    tensors = [[entry.name, entry.shape, entry.from_type, entry.type] for entry in entries]
    return sha256_json(
        {"base_type": base_type, "calibrated": calibrated, "rules": rules_text(rules), "tensors": tensors}
    )
