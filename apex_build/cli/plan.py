"""`apex plan`: what a policy would make of a model."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from apex_build.cli import show
from apex_build.cli.head_rows import mtp_rows_option, rows_of
from apex_build.gguf_model.coverage import Coverage, coverage
from apex_build.gguf_model.imatrix import read_imatrix
from apex_build.gguf_model.model import read_model
from apex_build.native.toolset import find_toolset
from apex_build.outputs import check_apart, check_place, check_text_free, whole_file
from apex_build.plugins import load_plugins
from apex_build.policy.parameters import parse_settings
from apex_build.policy.plan import KEPT, MIXTURE, Entry, Plan, make_plan
from apex_build.policy.render import template_files
from apex_build.quantization.preflight import check_head_rows

_PATH = click.Path(path_type=Path)
_ANOTHER = "give another name with --tensor-types"


@click.command()
@click.argument("model_path", metavar="MODEL", type=_PATH)
@click.option("--policy", "policy_name", metavar="NAME", required=True, help="A policy: apex policies lists them.")
@click.option(
    "--set", "settings", metavar="NAME=VALUE", multiple=True, help="A parameter of the policy (may be given several times)."
)
@click.option("--imatrix", type=_PATH, help="Check that it has data for the types that need it.")
@mtp_rows_option
@click.option("--tensor-types", type=_PATH, help="Write the rules to this file, for llama-quantize --tensor-type-file.")
@click.option("--force", is_flag=True, help="--tensor-types: replace an existing file.")
@click.option("--tensors/--summary", default=False, help="List every tensor, or (the default) totals by role, type and layers.")
@click.option(
    "--tools", "tools_path", type=_PATH, help="Folder of the native tools.  [default: the build marked * by apex build --list]"
)
@click.option("--plugin", "folders", multiple=True, type=_PATH, help="Load a plugin from this folder.")
@click.option("--json", "json_", is_flag=True, help="Print JSON, every tensor in it.")
def command(
    model_path: Path,
    policy_name: str,
    settings: tuple[str, ...],
    imatrix: Path | None,
    mtp_rows: str,
    tensor_types: Path | None,
    force: bool,
    tensors: bool,
    tools_path: Path | None,
    folders: tuple[Path, ...],
    json_: bool,
) -> None:
    """Show the type and size that a policy gives each tensor of MODEL. Nothing is quantized.

    The types are those that llama-quantize itself answers in a dry run, so the total is that of the file's tensors;
    apex quantize --dry-run tells the size of the whole file.

    \b
    Examples:
      apex plan model-F16.gguf --policy i-nano
      apex plan model-F16.gguf --policy i-nano --set draft_head=IQ2_XXS --tensors
      apex plan model-F16.gguf --policy i-mini --set draft_head.routed=IQ2_XXS --set draft_head.other=Q4_K --imatrix imatrix.gguf
      apex plan model-F16.gguf --policy quality --tensor-types types.txt
      apex plan model-F16.gguf --policy mine --plugin my-plugin/ --json | jq .bytes
    """
    plugins = load_plugins(folders)
    policy = plugins.policy(policy_name)
    model = read_model(model_path, plugins.role_of)
    tools = find_toolset(tools_path)
    if tensor_types is not None:
        check_place(tensor_types, _ANOTHER)
        given = (*model.files, *([imatrix] if imatrix else []), *plugins.files(), *template_files(policy), *tools.files())
        check_apart([tensor_types], given, _ANOTHER)
    covered = coverage(read_imatrix(imatrix), model) if imatrix is not None else None
    plan = make_plan(model, policy, parse_settings(settings), tools, imatrix)
    said = check_head_rows(plan.entries, model, covered, rows_of(mtp_rows)) if covered is not None else []
    if tensor_types is not None:
        rules = plan.rules.encode()
        check_text_free(tensor_types, rules, force=force)
        with whole_file(tensor_types) as part:
            part.write_bytes(rules)
    if json_:
        show.as_json(_json(plan, covered))
        return
    _print(plan, covered, tensors=tensors)
    for warning in said:
        click.echo(f"warning: {warning}", err=True)


def _json(plan: Plan, covered: Coverage | None) -> dict[str, Any]:
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
        "needing_data": [entry.name for entry in plan.needing_data],
        "without_data": _without_data(plan, covered) if covered else None,
        "tensors": [asdict(entry) for entry in plan.entries],
    }


def _print(plan: Plan, covered: Coverage | None, *, tensors: bool) -> None:
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
        groups.append(("draft head" if head else "trunk", role, type_name, layers, len(own), show.size(n_bytes), f"{bits:.2f}"))
    columns = ("part", "role", "type", "layers", "tensors", "bytes", "bits per weight")
    show.table(f"Plan: {plan.policy}, base type {plan.base_type}", columns, groups, right=columns[4:])
    head = plan.bytes_by_role.get("draft head", 0)
    of_head = f", {show.size(head)} of them the draft head's" if head else ""
    click.echo(f"tensors: {plan.n_bytes} bytes ({show.size(plan.n_bytes)}), {plan.bits_per_weight:.3f} bits per weight{of_head}")
    _warn(plan, covered)


def _warn(plan: Plan, covered: Coverage | None) -> None:
    for entry in plan.fallbacks:
        click.echo(
            f"warning: {entry.name} has rows of {entry.shape[0]}: {entry.fallback} does not fit, {entry.type} is taken", err=True
        )
    if covered is None:
        if plan.needing_data:
            in_head = sum(entry.draft_head for entry in plan.needing_data)
            of_head = f", {in_head} of them in the draft head" if in_head else ""
            click.echo(
                f"note: {len(plan.needing_data)} tensors get types that need calibration data{of_head}: quantize with --imatrix",
                err=True,
            )
        return
    if missing := _without_data(plan, covered):
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        click.echo(
            f"warning: {covered.imatrix.path} has no data for {shown}: llama-quantize refuses the types planned for them", err=True
        )
        click.echo(f"try:     apex calibrate {covered.model.path}", err=True)


def _without_data(plan: Plan, covered: Coverage) -> list[str]:
    missing = set(covered.missing)
    return [entry.name for entry in plan.needing_data if entry.name in missing]


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
