"""`apex quantize`: files with the types of one or several policies, checked before they are put in place."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from apex_build.cli import show, values
from apex_build.cli.check import as_json, checked, print_checked
from apex_build.cli.evaluate import texts_by_domain
from apex_build.cli.groups import QUIET, verbosity
from apex_build.cli.options import PATH, json_option, mtp_rows_option, plugin_option, rows_of, tools_option
from apex_build.cli.plan import policy_of, tell_of_list
from apex_build.cli.serving import command_line
from apex_build.errors import OutputUnwritable
from apex_build.evaluation.built_in import built_in_texts
from apex_build.evaluation.check import Checked
from apex_build.evaluation.task import ToolOptions
from apex_build.gguf_model.metadata import Setting, parse_meta, who_quantizes
from apex_build.gguf_model.model import read_model
from apex_build.gguf_model.runnable import trunk_blocks
from apex_build.hookspecs import PolicySpec
from apex_build.native.ggml import Ggml
from apex_build.native.memory import MEMORY, bytes_of
from apex_build.native.toolset import Toolset, find_toolset
from apex_build.parameters import AUTO, Value, parse_settings
from apex_build.plugins import Plugins, load_plugins
from apex_build.policy.lists import read_list
from apex_build.policy.remarks import left_to_base_type
from apex_build.progress import Report
from apex_build.quantization.load_check import check_input
from apex_build.quantization.naming import TEMPLATE
from apex_build.quantization.preflight import Allowed
from apex_build.quantization.provenance import identity
from apex_build.quantization.run import Job, Quantized, arguments, check_outputs, prepare, run
from apex_build.quantization.split import parse_size, recorded_shards, shards_of, split
from apex_build.storage.outputs import check_apart, check_room, with_manifest_and_log
from apex_build.sweep.auto import Choice, Question, known_choice, measure, parameter_at_auto


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
    "--set", "settings", metavar="NAME=VALUE", multiple=True, help="A parameter of the policies (may be given several times)."
)
@click.option("--tensor-types", type=PATH, metavar="FILE", help="A list of regex=type, before the policy's rules or alone.")
@click.option("--imatrix", type=PATH, help="Calibration data: apex calibrate makes it.")
@click.option(
    "-o",
    "--output",
    type=PATH,
    help="The file to write, or a folder for files named by --name.  [default: MODEL's folder]",
)
@click.option("--name", metavar="TEMPLATE", help=f"Names files: {{model}}, {{tag}}, {{type}}, {{policy}}.  [default: {TEMPLATE}]")
@click.option("--split-size", metavar="SIZE", help="Write shards of at most SIZE, such as 40G.")
@click.option("--meta", metavar="KEY=VALUE", multiple=True, help="Metadata: name, license, quantized_by, base_model=ORG/NAME, ...")
@click.option(
    "--allow-uncalibrated", is_flag=True, help="Quantize tensors that the imatrix has no data for, where the type allows."
)
@click.option(
    "--allow-fallback", is_flag=True, help="Let llama-quantize take another type where a shape cannot hold the planned one."
)
@mtp_rows_option
@click.option("--allow-requantize", is_flag=True, help="Start from a file that is quantized already.")
@click.option(
    "--load-check/--no-load-check",
    default=True,
    show_default=True,
    help="See that llama.cpp can load MODEL, and the file before it is put in place; no weights are read for it.",
)
@click.option(
    "--text", "texts", metavar="FILE", type=PATH, multiple=True, help="What draft_head=auto measures on.  [default: built in]"
)
@click.option("--gpu-layers", type=int, help="Layers on the GPU when measuring or checking.  [default: all that fit]")
@click.option("--check/--no-check", "check_", default=False, help="Load each file in llama-server: does its draft head work?")
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

    What can be refused is refused before anything is written: missing calibration data, shapes, disk. The file says in its metadata
    (apex.*) how it was made; OUTPUT.json says it in full, OUTPUT.log is what llama-quantize printed.

    With draft_head=auto (the -mtp policies have it), the smallest mixture for the draft head that loses little on this model is
    measured first: some minutes, once for a model, imatrix and policy.

    \b
    Examples:
      apex quantize model-F16.gguf --policy i-nano --imatrix model-F16.imatrix.gguf -o model-i-nano.gguf
      apex quantize model-F16.gguf --policy i-nano --set draft_head=IQ2_XXS --imatrix model-F16.imatrix.gguf -o small.gguf
      apex quantize model-F16.gguf --policy i-nano --set draft_head=auto --imatrix model-F16.imatrix.gguf --check
      apex quantize model-F16.gguf --policy quality --policy balanced --policy compact -o models/
      apex quantize model-F16.gguf --policy i-nano --imatrix model-F16.imatrix.gguf --meta quantized_by=me --name '{model}-{type}'
      apex quantize model-F16.gguf --tensor-types recipe.txt --set base_type=Q4_K_M --imatrix model-F16.imatrix.gguf
      apex quantize model-F16.gguf --policy i-quality --imatrix model-F16.imatrix.gguf --split-size 40G
      apex quantize model-F16.gguf --policy compact --dry-run
    """
    plugins = load_plugins(folders)
    policies = [policy_of(plugins, name, tensor_types) for name in dict.fromkeys(names or (None,))]
    model = read_model(model_path, plugins.role_of)
    tools = find_toolset(tools_path)
    types = read_list(tensor_types, Ggml(tools)) if tensor_types else None
    allowed = Allowed(allow_uncalibrated, allow_fallback, allow_requantize, rows_of(mtp_rows))
    if len(policies) > 1 and output is not None and not output.is_dir():
        raise OutputUnwritable(
            f"{output}: with several policies the output is a folder", hint=f"mkdir -p {shlex.quote(str(output))}"
        )
    if name and output is not None and not output.is_dir():
        raise click.UsageError(f"--name makes a name in a folder, and -o {output} is one already")
    metadata = who_quantizes(parse_meta(meta))
    parameters: dict[str, Value] = dict(parse_settings(settings))

    def planned(policy: PolicySpec, choice: Choice | None = None) -> Job:
        named = output is None or output.is_dir()
        return prepare(
            model,
            policy,
            {**parameters, **({choice.parameter: choice.value} if choice else {})},
            tools,
            output or model.path.parent,
            imatrix=imatrix,
            allowed=allowed,
            metadata=(*metadata, Setting("apex.draft_loss", "STRING", choice.text)) if choice else metadata,
            name=(name or TEMPLATE) if named else None,
            types=types,
        )

    options = ToolOptions(gpu_layers, memory=bytes_of(memory))
    jobs = [planned(policy) for policy in policies]
    if types is not None:
        tell_of_list(types, jobs[0].plan, model)
    if split_size is not None:
        parse_size(split_size)
    check_outputs(jobs, force=force)
    check_apart([path for job in jobs for path in with_manifest_and_log(job.out)], plugins.files())
    if load_check:
        check_input(model, tools)
    choices: list[Choice | None] = []
    for number, policy in enumerate(policies):
        choices.append(None)
        if parameter_at_auto(policy, parameters):
            given = texts_by_domain(texts) if texts else built_in_texts(model, plugins.calibration_sources())
            question = Question(
                model,
                policy,
                parameters,
                imatrix,
                tools,
                plugins.evaluators(),
                given,
                options,
                threads,
                head_rows=rows_of(mtp_rows),
            )
            choices[-1] = known_choice(question) if dry_run else _measured(question)
            jobs[number] = planned(policy, choices[-1])
    check_outputs(jobs, force=force)  # once more: what was measured is a part of the name
    if dry_run:
        if json_:
            show.as_json([_job_json(job) for job in jobs])
        else:
            for job, choice in zip(jobs, choices, strict=True):
                _show(job)
                _show_head(job, choice)
        return
    done = []
    for job, choice in zip(jobs, choices, strict=True):
        for warning in job.warnings:
            click.echo(f"warning: {warning}", err=True)
        with show.progress() as report:
            job = replace(job, memory=options.memory)
            done.append(_made(job, split_size, force=force, threads=threads, load_check=load_check, report=report))
        if not json_:
            _print(done[-1], job, choice)
    verdicts = [_checked(one.path, plugins, tools, threads, options) for one in done] if check_ else []
    if json_:
        shown = [_json(*one) for one in zip(done, jobs, choices, strict=True)]
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
    title = f"Draft heads against {question.policy.parameters[choice.parameter].measured[0]}, {choice.positions} positions"
    columns = ("head", "bytes", "loss of agreement, points", "loss of tokens a step, %", f"within {choice.bound:g} points")
    if verbosity() != QUIET:
        show.table(title, columns, rows, right=columns[1:4], err=True)
    show.note(f"{choice.parameter}: {choice.value}{', as measured before' if choice.reused else ''}")
    return choice


def _checked(path: Path, plugins: Plugins, tools: Toolset, threads: int | None, options: ToolOptions) -> Checked:
    with show.progress() as report:
        model = read_model(path, plugins.role_of)
        return checked(model, plugins, tools, threads=threads, options=options, report=report)


def _show_head(job: Job, choice: Choice | None) -> None:
    """What the draft head is, and what is known of its loss."""
    head = [entry for entry in job.plan.entries if entry.draft_head and entry.type != entry.from_type]
    if not any(entry.draft_head for entry in job.plan.entries):
        return
    types = ", ".join(dict.fromkeys(entry.type for entry in sorted(head, key=lambda entry: -entry.n_bytes))) or "as it was"
    if choice:
        click.echo(f"draft head: {types}; {choice.text}")
    else:
        could = [name for name, parameter in job.policy.parameters.items() if parameter.measured]
        auto = [f" ({name}={AUTO} measures it)" for name in could if str(job.plan.parameters.get(name)) != AUTO]
        click.echo(f"draft head: {types}; its loss was not measured on this model{auto[0] if auto else ''}")


def _made(job: Job, split_size: str | None, *, force: bool, threads: int | None, load_check: bool, report: Report) -> Quantized:
    """The file, or the first of its shards."""
    if split_size and not force and (shards := recorded_shards(job.out, identity(job.keys), split_size)):
        return Quantized(shards[0], job.plan, job.n_bytes, 0.0, job.warnings, True)
    if split_size and not force and (there := shards_of(job.out)):
        raise OutputUnwritable(f"{there[0]} exists and was made from something else", hint="another name, or --force")
    done = run(job, force=force, threads=threads, load_check=load_check, report=report)
    if split_size is None:
        return done
    check_room(job.out.parent, job.n_bytes, f"shards of {job.out.name}, beside it until they are verified,")
    return replace(done, path=split(job.out, split_size, job.tools, force=force, report=report)[0])


def _show(job: Job) -> None:
    for warning in job.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(f"{job.out}: {job.n_bytes} bytes ({show.size(job.n_bytes)}), {job.plan.bits_per_weight:.3f} bits per weight")
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


def _json(done: Quantized, job: Job, choice: Choice | None) -> dict[str, Any]:
    return {
        "path": str(done.path), "policy": done.plan.policy, "bytes": done.n_bytes, "tensor_bytes": done.plan.n_bytes,
        "bits_per_weight": done.plan.bits_per_weight, "seconds": round(done.seconds, 3), "reused": done.reused,
        "warnings": list(done.warnings), "run": command_line(done.path, job.model, job.tools),
        "draft_head": asdict(choice) if choice else None,
    }  # fmt: skip


def _print(done: Quantized, job: Job, choice: Choice | None) -> None:
    how = "reused: already made from the same inputs" if done.reused else f"written and verified in {done.seconds:.1f} s"
    size = f"{done.n_bytes} bytes, {done.plan.bits_per_weight:.3f} bits per weight"
    click.echo(f"{done.path}: {size}; {how}")
    _print_left(job)
    _show_head(job, choice)
    if trunk_blocks(job.model):
        click.echo(f"run it: {command_line(done.path, job.model, job.tools)}")
