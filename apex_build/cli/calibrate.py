"""`apex calibrate`: an imatrix of the whole model, draft head included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from apex_build.calibration.run import Calibration, Settings, arguments
from apex_build.calibration.sets import known_sets
from apex_build.calibration.until import Goal
from apex_build.cli import show, values
from apex_build.cli.calibrate_dry_run import measure, show_plan
from apex_build.cli.inspect import print_coverage
from apex_build.cli.options import PATH, json_option, plugin_option, tools_option
from apex_build.evaluation.pace import active_parameters, expect, remember, tokens_of
from apex_build.gguf_model.model import read_model
from apex_build.gguf_model.mtp_rows import AUTO, CHOICES, trained_on
from apex_build.gguf_model.summary import imatrix_json
from apex_build.native.devices import gpus_used
from apex_build.native.memory import MEMORY, bytes_of
from apex_build.native.toolset import find_toolset
from apex_build.plugins import load_plugins
from apex_build.printable import printable
from apex_build.stages.calibrate import CalibrateOptions, calibrate, keep_heldout, output_of, text_of
from apex_build.stages.given import Workplace
from apex_build.storage.finding import locate
from apex_build.storage.outputs import write_text

_SHOWN = 8  # starved experts of a layer


def _whole_rows(_context: click.Context, _parameter: click.Parameter, value: int) -> int:
    """llama-imatrix ignores the last rows of a batch if fewer than 16 are left, and its snapshots would be a chunk
    behind.
    """
    if value % 16:
        raise click.BadParameter(
            f"{value} is not a multiple of 16, and llama-imatrix would drop {value % 16} tokens of each chunk"
        )
    return value


@click.command()
@click.argument("model_path", metavar="MODEL", type=PATH)
@click.option(
    "-o", "--output", type=PATH, help="The imatrix to write.  [default: MODEL's name + .imatrix.gguf, beside it]"
)
@click.option(
    "--calibration-set",
    "set_name",
    shell_complete=values.calibration_sets,
    default="default",
    show_default=True,
    help=f"A calibration set ({', '.join(known_sets())}) or TOML file.",
)
@click.option("--domain", "domains", multiple=True, help="Only this domain of the set (may be given several times).")
@click.option("--text", "text_path", type=PATH, help="Your own text file instead of a set.")
@click.option("--chat-template", "template", type=PATH, help="A Jinja chat template instead of the model's own.")
@click.option(
    "--fallback-template",
    "fallback",
    type=PATH,
    help="A Jinja chat template for conversations that the other does not take.  [default: they are left out]",
)
@click.option(
    "--heldout",
    type=PATH,
    metavar="DIR",
    help="Write what the set keeps apart to this folder, for apex evaluate (5 % of the documents, or as the set says).",
)
@click.option("--chunks", type=click.IntRange(min=2), help="Maximum number of chunks.  [default: the whole text]")
@click.option(
    "--context",
    type=click.IntRange(min=32),
    default=512,
    show_default=True,
    callback=_whole_rows,
    help="Tokens of a chunk, a multiple of 16.",
)
@click.option(
    "--mtp/--no-mtp", "head", default=True, show_default=True, help="Run the draft head too, if the model has one."
)
@click.option(
    "--mtp-rows",
    "rows",
    type=click.Choice([AUTO, *CHOICES]),
    default=AUTO,
    show_default=True,
    help="Hidden rows that the draft head reads: before or after the final norm. auto: as its architecture needs.",
)
@click.option(
    "--rows-check/--no-rows-check",
    default=True,
    show_default=True,
    help="With auto, score the head with both kinds of rows first, and stop if the other kind is clearly better.",
)
@click.option(
    "--shards",
    type=click.IntRange(min=1),
    default=1,
    help="Split the text into this many parts, run each, and add them up.",
)
@click.option(
    "--until-experts",
    "until",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Draw text until every routed expert has seen this many tokens, more of what reaches experts with few.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    help="Tokens of text to spend on --until-experts.  [default: all there are]",
)
@click.option(
    "--devices",
    multiple=True,
    metavar="GPUS",
    help="GPUs for one shard, as in CUDA_VISIBLE_DEVICES; repeat it to run shards in parallel.  "
    "[default: each GPU that holds the model]",
)
@click.option(
    "--cluster",
    metavar="ADDRESS",
    help="Make the shards on a Dask cluster: tcp://HOST:8786, or local:N for N processes here.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: llama-imatrix's own]")
@click.option("--gpu-layers", type=int, help="Layers on the GPU.  [default: llama-imatrix's own]")
@click.option("--memory", type=click.FloatRange(min=0, min_open=True), help=MEMORY)
@click.option(
    "--tool-argument",
    "extra",
    multiple=True,
    help="An additional argument for llama-imatrix (may be given several times).",
)
@tools_option
@plugin_option
@click.option("--force", is_flag=True, help="Start over, and replace an existing file.")
@click.option("--write-text", "write_text_to", type=PATH, help="Write the text to this file and stop.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show the text's parts and the command, measure a few chunks, and say how long all would take.",
)
@json_option
def command(
    model_path: Path,
    output: Path | None,
    set_name: str,
    domains: tuple[str, ...],
    text_path: Path | None,
    template: Path | None,
    fallback: Path | None,
    heldout: Path | None,
    chunks: int | None,
    context: int,
    head: bool,
    rows: str,
    rows_check: bool,
    shards: int,
    until: int | None,
    max_tokens: int | None,
    devices: tuple[str, ...],
    cluster: str | None,
    threads: int | None,
    gpu_layers: int | None,
    memory: float | None,
    extra: tuple[str, ...],
    tools_path: Path | None,
    folders: tuple[Path, ...],
    force: bool,
    write_text_to: Path | None,
    dry_run: bool,
    json_: bool,
) -> None:
    """Calibrate MODEL: run it, and its draft head, over a diverse text and write the imatrix.

    The text is made from a calibration set with the model's own chat template. The same command resumes an
    interrupted run.

    \b
    Examples:
      apex calibrate model-F16.gguf
      apex calibrate model-F16.gguf -o imatrix.gguf --calibration-set my-set.toml
      apex calibrate model-F16.gguf --text my-text.txt --chunks 200
      apex calibrate model-F16.gguf --domain code --domain chat --dry-run
      apex calibrate model-F16.gguf --calibration-set my-set.toml --heldout heldout
      apex calibrate model-F16.gguf --shards 4 --devices 0 --devices 1
      apex calibrate model-F16.gguf --shards 16 --cluster tcp://node1:8786
      apex calibrate model-F16.gguf --until-experts 64 --max-tokens 2000000
    """
    plugins = load_plugins(folders)
    model = read_model(model_path, plugins.role_of)
    settings = Settings(context, chunks, head, rows, threads, gpu_layers, extra=extra, memory=bytes_of(memory))
    if devices and shards == 1 and until is None:
        raise click.UsageError("--devices needs --shards: one shard for each set of GPUs")
    if max_tokens is not None and until is None:
        raise click.UsageError("--max-tokens goes with --until-experts; --chunks bounds a run without it")
    if until is not None and chunks is not None:
        raise click.UsageError("--until-experts takes --max-tokens instead of --chunks")
    goal = Goal(until, max_tokens) if until is not None else None
    options = CalibrateOptions(
        set_name,
        domains,
        text_path,
        template,
        settings,
        rows_check,
        shards,
        tuple(devices),
        goal,
        cluster,
        force,
        fallback_template=fallback,
        heldout=heldout,
    )
    if heldout and text_path:
        raise click.UsageError("--heldout is of a calibration set, and --text is used as it is")
    text = text_of(model, options, plugins, find_toolset(tools_path) if tools_path else None)
    for warning in text.warnings:
        click.echo(f"warning: {printable(warning)}", err=True)
    out = output or output_of(model)
    if write_text_to is not None and not dry_run:
        given = find_toolset(tools_path).files() if tools_path else ()
        inputs = (*model.files, *text.files, *plugins.files(), *given)
        text = keep_heldout(text, options, inputs)
        write_text(write_text_to, text.data, inputs, force=force, hint="give another name with --write-text")
        return
    tools = find_toolset(tools_path)
    if dry_run:
        wanted = [*arguments(model, settings, tools), "--file", text.name, "--output", str(out)]
        limit = max_tokens // context if max_tokens else chunks
        checked = rows_check and rows == AUTO and head and model.has_head
        measured = measure(model, text, tools, replace(settings, chunks=limit))
        show_plan(text, wanted if chunks is None else [*wanted, "--chunks", str(chunks)], out, measured, checked, json_)
        return
    if head and not model.has_head and not json_:
        show.note("the model has no draft head: calibrating its trunk")
    with_head, known = head and model.has_head, trained_on(model.architecture)
    if with_head and rows == AUTO and known is None:
        click.echo(
            f"warning: which hidden rows the draft heads of {model.architecture} were trained on is not known: "
            "using the tool's default (--mtp-rows pre or post to choose)",
            err=True,
        )
    tokens = tokens_of(len(text.data)) if chunks is None else min(tokens_of(len(text.data)), chunks * context)
    work = tokens * active_parameters(model)
    gpu = gpus_used(tools, gpu_layers)
    expected = expect("calibrate", work, gpu=gpu)
    show.note(f"about {max(2, round(tokens / context))} chunks of {context} tokens: {expected}")
    try:
        with show.progress() as report:
            place = Workplace(plugins, report, tools)
            done = calibrate(
                model, out, options, place=place, text=text, on_check=lambda found: show.note(found.said())
            )
    except KeyboardInterrupt:
        what = "what is done of it" if shards > 1 else "the last snapshot"
        show.note(f"{what} is kept: the same command resumes from there")
        raise
    covered = done.coverage.imatrix
    if not done.reused and not done.resumed_at and covered.chunk_count and covered.chunk_size:
        work = covered.chunk_count * covered.chunk_size * active_parameters(model)
        remember("calibrate", work, done.seconds, gpu=gpu)
    if json_:
        show.as_json(_json(done))
        return
    _print(done)


def _goal(done: Calibration) -> dict[str, Any] | None:
    """What --until-experts reached, also where that was in an earlier run."""
    goal = locate(done.path).manifest.details.get("goal")
    return goal if isinstance(goal, dict) else None


def _json(done: Calibration) -> dict[str, Any]:
    return {
        "path": str(done.path), "identity": done.identity, "reused": done.reused, "resumed_at": done.resumed_at,
        "seconds": round(done.seconds, 3), "perplexity": done.perplexity,
        "goal": _goal(done),
        "imatrix": imatrix_json(done.coverage.imatrix, done.coverage, done.coverage.examined),
    }  # fmt: skip


def _print_goal(goal: Mapping[str, Any]) -> None:
    drawn = ", ".join(f"{one['domain']} {one['tokens']}" for one in goal["domains"])
    click.echo(f"drawn: {goal['tokens']} tokens in {goal['rounds']} rounds ({drawn})")
    wanted, starved = goal["until_experts"], goal["starved"]
    if goal["reached"]:
        click.echo(
            f"each of the {goal['experts']} routed experts saw at least {wanted} tokens, {goal['fewest']} the least"
        )
        return
    count = sum(layer["count"] for layer in starved)
    click.echo(f"starved: {count} of the {goal['experts']} routed experts saw fewer than {wanted} tokens")
    for layer in starved:
        shown = ", ".join(f"{expert} ({tokens})" for expert, tokens in layer["experts"][:_SHOWN])
        more = f" and {layer['count'] - _SHOWN} more" if layer["count"] > _SHOWN else ""
        click.echo(f"  layer {layer['layer']}: experts (tokens) {shown}{more}")
    click.echo("  apex plan --imatrix shows the types they get; --set starved=Q4_K raises them in the APEX tiers")


def _print(done: Calibration) -> None:
    print_coverage(done.coverage)
    if goal := _goal(done):
        _print_goal(goal)
    if done.resumed_at:
        click.echo("perplexity: unknown for the whole text, since this run was resumed")
    elif done.perplexity is not None:
        click.echo(f"perplexity of the trunk on the text: {done.perplexity:.3f}")
    how = "reused: already made from the same inputs" if done.reused else f"written in {done.seconds:.0f} s"
    resumed = f", resumed after chunk {done.resumed_at}" if done.resumed_at else ""
    click.echo(f"{done.path}: {how}{resumed}")
