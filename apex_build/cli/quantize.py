"""`apex quantize`: files with the types of one or several policies, checked before they are put in place."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from apex_build.cli import show, values
from apex_build.cli.check import as_json, print_checked
from apex_build.cli.groups import QUIET, verbosity
from apex_build.cli.options import PATH, json_option, mtp_rows_option, plugin_option, rows_of, tools_option
from apex_build.cli.plan import check_policy, tell_of_list
from apex_build.cli.serving import command_line
from apex_build.evaluation.check import Checked
from apex_build.evaluation.task import ToolOptions
from apex_build.gguf_model.metadata import parse_meta
from apex_build.gguf_model.runnable import trunk_blocks
from apex_build.native.memory import MEMORY, bytes_of
from apex_build.parameters import AUTO, parse_settings
from apex_build.policy.remarks import left_to_base_type
from apex_build.quantization.naming import TEMPLATE
from apex_build.quantization.preflight import Allowed
from apex_build.quantization.run import Job, arguments
from apex_build.stages.check import CheckOptions, check
from apex_build.stages.given import Workplace, workplace
from apex_build.stages.quantize import QuantizedFile, QuantizeOptions, plan_files, write_file
from apex_build.sweep.auto import Choice, Question, known_choice, measure


@click.command()
@click.argument("model_path", metavar="MODEL", type=PATH)
@click.option(
    "--policy",
    "names",
    metavar="NAME",
    shell_complete=values.policies,
    multiple=True,
    help="A policy (may be given several times).",
)
@click.option(
    "--set",
    "settings",
    metavar="NAME=VALUE",
    multiple=True,
    help="A parameter of the policies (may be given several times).",
)
@click.option(
    "--tensor-types", type=PATH, metavar="FILE", help="A list of regex=type, before the policy's rules or alone."
)
@click.option("--imatrix", type=PATH, help="Calibration data: apex calibrate makes it.")
@click.option(
    "-o",
    "--output",
    type=PATH,
    help="The file to write, or a folder for files named by --name.  [default: MODEL's folder]",
)
@click.option(
    "--name", metavar="TEMPLATE", help=f"Names files: {{model}}, {{tag}}, {{type}}, {{policy}}.  [default: {TEMPLATE}]"
)
@click.option("--split-size", metavar="SIZE", help="Write shards of at most SIZE, such as 40G.")
@click.option(
    "--meta", metavar="KEY=VALUE", multiple=True, help="Metadata: name, license, quantized_by, base_model=ORG/NAME, ..."
)
@click.option(
    "--allow-uncalibrated",
    is_flag=True,
    help="Quantize tensors that the imatrix has no data for, where the type allows.",
)
@click.option(
    "--allow-fallback",
    is_flag=True,
    help="Let llama-quantize take another type where a shape cannot hold the planned one.",
)
@mtp_rows_option
@click.option("--allow-requantize", is_flag=True, help="Start from a file that is already quantized.")
@click.option(
    "--load-check/--no-load-check",
    default=True,
    show_default=True,
    help="Check that llama.cpp can load MODEL, and the new file before it is put in place; no weights are read.",
)
@click.option(
    "--text",
    "texts",
    metavar="FILE",
    type=PATH,
    multiple=True,
    help="What draft_head=auto measures on.  [default: built in]",
)
@click.option("--gpu-layers", type=int, help="Layers on the GPU when measuring or checking.  [default: all that fit]")
@click.option(
    "--check/--no-check", "check_", default=False, help="Load each file in llama-server: does its draft head work?"
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.option("--memory", type=click.FloatRange(min=0, min_open=True), help=MEMORY)
@tools_option
@plugin_option
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--dry-run", is_flag=True, help="Check everything, show sizes and commands, write nothing.")
@json_option
def command(
    model_path: Path,
    names: tuple[str, ...],
    settings: tuple[str, ...],
    tensor_types: Path | None,
    imatrix: Path | None,
    output: Path | None,
    name: str | None,
    split_size: str | None,
    meta: tuple[str, ...],
    allow_uncalibrated: bool,
    allow_fallback: bool,
    mtp_rows: str,
    allow_requantize: bool,
    load_check: bool,
    texts: tuple[Path, ...],
    gpu_layers: int | None,
    check_: bool,
    threads: int | None,
    memory: float | None,
    tools_path: Path | None,
    folders: tuple[Path, ...],
    force: bool,
    dry_run: bool,
    json_: bool,
) -> None:
    """Quantize MODEL by a policy with llama-quantize, verify the file, and put it in place.

    Problems are reported before anything is written: missing calibration data, shapes, disk. The file's metadata
    (apex.*) says how it was made, OUTPUT.json in full; OUTPUT.log has llama-quantize's output.

    With draft_head=auto (the -mtp policies have it), the smallest mixture for the draft head that loses little on this
    model is measured first: a few minutes, once for each model, imatrix and policy.

    \b
    Examples:
      apex quantize model-F16.gguf --policy i-nano --imatrix model-F16.imatrix.gguf -o model-i-nano.gguf
      apex quantize model-F16.gguf --policy i-nano --set draft_head=IQ2_XXS \\
          --imatrix model-F16.imatrix.gguf -o small.gguf
      apex quantize model-F16.gguf --policy i-nano --set draft_head=auto --imatrix model-F16.imatrix.gguf --check
      apex quantize model-F16.gguf --policy quality --policy balanced --policy compact -o models/
      apex quantize model-F16.gguf --policy i-nano --imatrix model-F16.imatrix.gguf \\
          --meta quantized_by=me --name '{model}-{type}'
      apex quantize model-F16.gguf --tensor-types recipe.txt --set base_type=Q4_K_M --imatrix model-F16.imatrix.gguf
      apex quantize model-F16.gguf --policy i-quality --imatrix model-F16.imatrix.gguf --split-size 40G
      apex quantize model-F16.gguf --policy compact --dry-run
    """
    for policy in names or (None,):
        check_policy(policy, tensor_types)
    if name and output is not None and not output.is_dir():
        raise click.UsageError(f"--name names a file in a folder, but -o {output} is already a file name")
    place = workplace(tools_path, folders)
    options = QuantizeOptions(
        policies=names,
        parameters=dict(parse_settings(settings)),
        imatrix=imatrix,
        tensor_types=tensor_types,
        name=name,
        split_size=split_size,
        metadata=parse_meta(meta),
        allowed=Allowed(allow_uncalibrated, allow_fallback, allow_requantize, rows_of(mtp_rows)),
        load_check=load_check,
        texts=texts,
        gpu_layers=gpu_layers,
        threads=threads,
        memory=bytes_of(memory),
        force=force,
    )
    files = plan_files(model_path, output, options, place=place, measuring=known_choice if dry_run else _measured)
    if (types := files[0].job.types) is not None:
        tell_of_list(types, files[0].job.plan, files[0].job.model)
    if dry_run:
        if json_:
            show.as_json([_job_json(one.job) for one in files])
        else:
            for one in files:
                _show(one.job)
                _show_head(one.job, one.choice)
        return
    done = []
    for planned in files:
        for warning in planned.job.warnings:
            click.echo(f"warning: {warning}", err=True)
        with show.progress() as report:
            done.append(write_file(planned, options, place=replace(place, report=report)))
        if not json_:
            _print(done[-1])
    verdicts = [_checked(one.path, place, options) for one in done] if check_ else []
    if json_:
        shown = [_json(one) for one in done]
        for row, verdict in zip(shown, verdicts, strict=False):
            row["check"] = as_json(verdict)
        show.as_json(shown)
    for verdict in verdicts:
        if not json_:
            print_checked(verdict)
        verdict.refuse()


def _measured(question: Question) -> Choice:
    show.note(f"measuring draft heads for {question.policy.name} on {question.model.path.name} ...")
    choice = measure(question, progress=show.progress)
    rows = [
        [one.value, str(one.head_bytes), one.agreement.told(2), one.tokens.told(2), "yes" if one.fits else "no"]
        for one in choice.candidates
    ]
    title = (
        f"Draft heads against {question.policy.parameters[choice.parameter].measured[0]}, {choice.positions} positions"
    )
    columns = (
        "head",
        "bytes",
        "loss of agreement, points",
        "loss of tokens a step, %",
        f"within {choice.bound:g} points",
    )
    if verbosity() != QUIET:
        show.table(title, columns, rows, right=columns[1:4], err=True)
    show.note(f"{choice.parameter}: {choice.value}{', as measured before' if choice.reused else ''}")
    return choice


def _checked(path: Path, place: Workplace, options: QuantizeOptions) -> Checked:
    with show.progress() as report:
        how = CheckOptions(threads=options.threads, tools=ToolOptions(options.gpu_layers, memory=options.memory))
        return check(path, how, place=replace(place, report=report))


def _show_head(job: Job, choice: Choice | None) -> None:
    """The draft head's types, and its loss if known."""
    head = [entry for entry in job.plan.entries if entry.draft_head and entry.type != entry.from_type]
    if not any(entry.draft_head for entry in job.plan.entries):
        return
    types = (
        ", ".join(dict.fromkeys(entry.type for entry in sorted(head, key=lambda entry: -entry.n_bytes))) or "as it was"
    )
    if choice:
        click.echo(f"draft head: {types}; {choice.text}")
    else:
        could = [name for name, parameter in job.policy.parameters.items() if parameter.measured]
        auto = [f" ({name}={AUTO} measures it)" for name in could if str(job.plan.parameters.get(name)) != AUTO]
        click.echo(f"draft head: {types}; its loss was not measured on this model{auto[0] if auto else ''}")


def _show(job: Job) -> None:
    for warning in job.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(
        f"{job.out}: {job.n_bytes} bytes ({show.size(job.n_bytes)}), {job.plan.bits_per_weight:.3f} bits per weight"
    )
    _print_left(job)
    click.echo(f"command: {shlex.join(arguments(job, Path('RULES'), job.out))}")


def _print_left(job: Job) -> None:
    if left := left_to_base_type(job.plan):
        click.echo(left)


def _job_json(job: Job) -> dict[str, Any]:
    return {
        "path": str(job.out), "policy": job.plan.policy, "bytes": job.n_bytes, "tensor_bytes": job.plan.n_bytes,
        "bits_per_weight": job.plan.bits_per_weight, "warnings": list(job.warnings),
    }  # fmt: skip


def _json(one: QuantizedFile) -> dict[str, Any]:
    done = one.done
    return {
        "path": str(done.path), "policy": done.plan.policy, "bytes": done.n_bytes, "tensor_bytes": done.plan.n_bytes,
        "bits_per_weight": done.plan.bits_per_weight, "seconds": round(done.seconds, 3), "reused": done.reused,
        "warnings": list(done.warnings), "run": command_line(done.path, one.job.model, one.job.tools),
        "draft_head": asdict(one.choice) if one.choice else None,
    }  # fmt: skip


def _print(one: QuantizedFile) -> None:
    done, job = one.done, one.job
    how = (
        "reused: already made from the same inputs" if done.reused else f"written and verified in {done.seconds:.1f} s"
    )
    size = f"{done.n_bytes} bytes, {done.plan.bits_per_weight:.3f} bits per weight"
    click.echo(f"{done.path}: {size}; {how}")
    _print_left(job)
    _show_head(job, one.choice)
    if trunk_blocks(job.model):
        click.echo(f"run it: {command_line(done.path, job.model, job.tools)}")
