"""`apex plan`: what a policy would do to a model."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from apex_build.cli import plan_needs, show, values
from apex_build.cli.compare import as_json as compare_as_json
from apex_build.cli.compare import print_compared
from apex_build.cli.options import SIZE, mtp_rows_option, plugin_option, rows_of, tools_option
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.coverage import Coverage
from apex_build.native.ggml import Ggml
from apex_build.parameters import parse_settings
from apex_build.policy.lists import TypeList, apply_list, own_types
from apex_build.policy.plan import KEPT, MIXTURE, Entry, Plan
from apex_build.policy.remarks import left_to_base_type, remarks
from apex_build.stages.compare import compare
from apex_build.stages.given import workplace
from apex_build.stages.needs import needs
from apex_build.stages.plan import PlanOptions
from apex_build.stages.plan import plan as make_plan

_PATH = click.Path(path_type=Path)
_ANOTHER = "give another name with --write-rules"


@click.command()
@click.argument("model_path", metavar="MODEL", type=_PATH)
@click.option(
    "--policy",
    "policy_name",
    metavar="NAME",
    shell_complete=values.policies,
    help="A policy: apex policies lists them.",
)
@click.option(
    "--set",
    "settings",
    metavar="NAME=VALUE",
    multiple=True,
    help="A parameter of the policy (may be given several times).",
)
@click.option(
    "--compare",
    "compared",
    metavar="NAME,NAME,...",
    help="Compare several policies: bytes, bits, tensors that differ, and predictions.",
)
@click.option("--imatrix", type=_PATH, help="Check that it has data for the types that need data.")
@mtp_rows_option
@click.option(
    "--tensor-types", type=_PATH, metavar="FILE", help="A list of regex=type, before the policy's rules or alone."
)
@click.option(
    "--write-rules", type=_PATH, metavar="FILE", help="Write the rules, for llama-quantize --tensor-type-file."
)
@click.option("--force", is_flag=True, help="--write-rules: replace an existing file.")
@click.option(
    "--tensors/--summary", default=False, help="List every tensor, or (the default) totals by role, type and layers."
)
@click.option(
    "--hardware",
    metavar="GPU|here",
    help="Show what each step needs on a machine with this GPU, or on this one ('here'), and whether it fits.",
)
@click.option("--memory", type=SIZE, metavar="SIZE", help="--hardware: its memory.  [default: this machine's]")
@click.option("--disk", type=SIZE, metavar="SIZE", help="--hardware: its free disk.  [default: this machine's]")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    default=32768,
    show_default=True,
    help="--hardware: tokens of context for running the finished file.",
)
@tools_option
@plugin_option
@click.option("--json", "json_", is_flag=True, help="Print JSON, every tensor in it.")
def command(
    model_path: Path,
    policy_name: str | None,
    settings: tuple[str, ...],
    compared: str | None,
    imatrix: Path | None,
    mtp_rows: str,
    tensor_types: Path | None,
    write_rules: Path | None,
    force: bool,
    tensors: bool,
    hardware: str | None,
    memory: int | None,
    disk: int | None,
    context: int,
    tools_path: Path | None,
    folders: tuple[Path, ...],
    json_: bool,
) -> None:
    """Show the type and size that a policy gives each tensor of MODEL. Nothing is quantized.

    The types are llama-quantize's own answer in a dry run, so the total is exact for the file's tensors;
    apex quantize --dry-run tells the size of the whole file.

    \b
    Examples:
      apex plan model-F16.gguf --policy i-nano
      apex plan model-F16.gguf --policy i-nano --set draft_head=IQ2_XXS --tensors
      apex plan model-F16.gguf --policy i-mini --set draft_head.routed=IQ2_XXS --set draft_head.other=Q4_K \\
          --imatrix imatrix.gguf
      apex plan model-F16.gguf --policy quality --write-rules rules.txt
      apex plan model-F16.gguf --tensor-types recipe.txt --set base_type=Q4_K_M
      apex plan model-F16.gguf --compare i-mini,i-nano,i-micro
      apex plan model-F16.gguf --policy mine --plugin my-plugin/ --json | jq .bytes
      apex plan model-F16.gguf --policy i-mini --hardware dgx-spark --context 65536
      apex plan model-F16.gguf --policy i-mini --memory 122GiB --disk 500GiB
    """
    if compared is not None:
        if policy_name or tensor_types or write_rules:
            raise click.UsageError("--compare goes without --policy, --tensor-types and --write-rules")
        names = [name.strip() for name in compared.split(",") if name.strip()]
        found = compare(model_path, names, parse_settings(settings), place=workplace(tools_path, folders))
        if json_:
            show.as_json(compare_as_json(found))
        else:
            print_compared(found, tensors=tensors)
        return
    check_policy(policy_name, tensor_types)
    place = workplace(tools_path, folders)
    rows, given = rows_of(mtp_rows), parse_settings(settings)
    options = PlanOptions(policy_name, dict(given), imatrix, tensor_types, rows, write_rules, force)
    done = make_plan(model_path, options, place=place)
    plan, covered, ggml = done.plan, done.covered, Ggml(place.tools)
    asked = plan_needs.machine_of(hardware, memory, disk, model_path.parent, place.plugins)
    needed = needs(plan, done.model, place, asked, context=context) if asked else ()
    if done.types is not None:
        tell_of_list(done.types, plan, done.model)
    if json_:
        hardware_json = {"hardware": plan_needs.as_json(asked, needed, context)} if asked else {}
        show.as_json({**_json(plan, covered, ggml), **hardware_json})
        return
    _print(plan, covered, ggml, tensors=tensors)
    if asked:
        plan_needs.show_needs(asked, needed, context)
    for warning in done.warnings:
        click.echo(f"warning: {warning}", err=True)
    if done.measured:
        show.note(f"note: {done.measured}")


def check_policy(name: str | None, tensor_types: Path | None) -> None:
    """Raises UsageError if there is neither a policy nor a list of types."""
    if name is None and tensor_types is None:
        raise click.UsageError(
            "give a policy (apex policies lists them), or a list of types: --policy NAME, --tensor-types FILE"
        )


def tell_of_list(types: TypeList, plan: Plan, model: Model) -> None:
    """Report, on stderr, rules of a list that match no tensor, and tensors that the list does not cover."""
    deciding, idle = apply_list(types, model.tensors)
    if idle:
        shown = ", ".join(f"{rule.line} (line {rule.where.rpartition(':')[2]})" for rule in idle[:3])
        more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
        count = f"{len(idle)} of the {len(types.rules)} rules of {types.path}"
        show.note(f"note: {count} match no tensor of the model: {shown}{more}")
    left = [entry for entry in plan.entries if entry.source != KEPT and entry.name not in deciding]
    if left:
        share = sum(entry.n_bytes for entry in left) / plan.n_bytes
        by = f"the base type, {plan.base_type}" if plan.policy == own_types().name else f"policy '{plan.policy}'"
        show.note(f"note: {len(left)} tensors, {share:.1%} of the bytes, are not in {types.path}: {by} decides")


def _json(plan: Plan, covered: Coverage | None, ggml: Ggml) -> dict[str, Any]:
    return {
        "policy": plan.policy,
        "parameters": dict(plan.parameters),
        "base_type": plan.base_type,
        "calibrated": plan.calibrated,
        "identity": plan.identity,
        "bytes": plan.n_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "bytes_by_role": dict(plan.bytes_by_role),
        "fallbacks": [entry.name for entry in plan.fallbacks],
        "warnings": [*plan.warnings, *remarks(plan, ggml)],
        "left_to_base_type": [entry.name for entry in plan.entries if entry.source == MIXTURE],
        "needing_data": [entry.name for entry in plan.needing_data],
        "without_data": _without_data(plan, covered) if covered else None,
        "predicted": dict(plan.predicted),
        "tensors": [asdict(entry) for entry in plan.entries],
    }


def _print(plan: Plan, covered: Coverage | None, ggml: Ggml, *, tensors: bool) -> None:
    if tensors:
        rows = [
            (e.name, e.role, "head" if e.draft_head else "", e.from_type, _type(e), show.size(e.n_bytes), _source(e))
            for e in plan.entries
        ]
        show.table("Tensors", ("name", "role", "part", "from", "to", "bytes", "decided by"), rows, right=("bytes",))
    groups = []
    ordered = sorted(plan.entries, key=lambda e: (e.draft_head, e.role, -e.n_bytes * 8 / e.n_elements, _type(e)))
    for (head, role, type_name), group in groupby(ordered, key=lambda e: (e.draft_head, e.role, _type(e))):
        own = list(group)
        n_bytes = sum(e.n_bytes for e in own)
        bits = n_bytes * 8 / sum(e.n_elements for e in own)
        layers = _ranges({e.layer for e in own if e.layer is not None})
        groups.append(
            ("draft head" if head else "trunk", role, type_name, layers, len(own), show.size(n_bytes), f"{bits:.2f}")
        )
    columns = ("part", "role", "type", "layers", "tensors", "bytes", "bits per weight")
    show.table(f"Plan: {plan.policy}, base type {plan.base_type}", columns, groups, right=columns[4:])
    head = plan.bytes_by_role.get("draft head", 0)
    of_head = f", {show.size(head)} of them the draft head's" if head else ""
    click.echo(
        f"tensors: {plan.n_bytes} bytes ({show.size(plan.n_bytes)}), {plan.bits_per_weight:.3f} bits per "
        f"weight{of_head}"
    )
    if plan.predicted:
        click.echo(f"predicted: {', '.join(f'{name} {value:.4f}' for name, value in plan.predicted.items())}")
    if left := left_to_base_type(plan):
        click.echo(left)
    _warn(plan, covered, ggml)


def _warn(plan: Plan, covered: Coverage | None, ggml: Ggml) -> None:
    for line in (*plan.warnings, *remarks(plan, ggml)):
        click.echo(f"warning: {line}", err=True)
    if covered is None:
        if plan.needing_data:
            in_head = sum(entry.draft_head for entry in plan.needing_data)
            of_head = f", {in_head} of them in the draft head" if in_head else ""
            show.note(
                f"note: {len(plan.needing_data)} tensors get types that need calibration data{of_head}: quantize with "
                "--imatrix"
            )
        return
    if missing := _without_data(plan, covered):
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        click.echo(
            f"warning: {covered.imatrix.path} has no data for {shown}: llama-quantize refuses the types planned for "
            "them",
            err=True,
        )
        click.echo(f"try:     apex calibrate {covered.model.path}", err=True)


def _without_data(plan: Plan, covered: Coverage) -> list[str]:
    return [entry.name for entry in plan.needing_data if not covered.has_data(entry.name)]


def _type(entry: Entry) -> str:
    return f"{entry.type} (for {entry.fallback})" if entry.fallback else entry.type


def _source(entry: Entry) -> str:
    return entry.source if entry.source in (KEPT, MIXTURE) else "rule"


def _ranges(numbers: set[int]) -> str:
    """0-4, 35-39"""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
