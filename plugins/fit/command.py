"""The verb `fit`: measure whatever has not been measured yet, allocate types, quantize, verify, score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from apex_build.plugin_api import (
    ParameterUnknown,
    as_json,
    check_place,
    note,
    parse_settings,
    progress,
    table,
    workplace,
)

from . import budget, errors, measure
from .data import CHECKED, Asked, Done, Made, Row
from .run import fit, preview

_PATH = click.Path(path_type=Path, readable=False)


@click.command("fit")
@click.argument("model_path", metavar="MODEL", type=_PATH)
@click.option("--imatrix", type=_PATH, required=True, help="Calibration data, as written by apex calibrate.")
@click.option(
    "--text", "texts", metavar="FILE", type=_PATH, multiple=True,
    help="Text that MODEL was not calibrated on: the probes use one half, the check the other.  "
    "[default: built in]",
)  # fmt: skip
@click.option("--target-size", metavar="SIZE", help="Size of the whole file, such as 12.5GiB.")
@click.option("--target-bpw", type=click.FloatRange(min=0, min_open=True), help="Average bits per weight.")
@click.option("--gpu", metavar="NAME", help="Fill the memory of this GPU, leaving room for --context tokens.")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    default=8192,
    show_default=True,
    help="Context length for --gpu, in tokens.",
)
@click.option("--curve", metavar="SIZE,SIZE,...", help="Plot divergence against these sizes instead of writing a file.")
@click.option("-o", "--output", "out", type=_PATH, help="The file to write; with --curve, the plot.")
@click.option(
    "--measurement", "at", metavar="FILE", type=_PATH,
    help="Read the measurement from FILE, or write it there.  A measurement of another model with the same tensor "
    "shapes is used as it is; one of MODEL with other settings is replaced with --force.  "
    "[default: beside the output]",
)  # fmt: skip
@click.option(
    "--types", default="", metavar="TYPES", help="Use only these types (Q4_K,Q3_K), or all but these (-IQ3_S)."
)
@click.option("--keep", multiple=True, metavar="PATTERN=TYPE",
              help="Give matching tensors this type, or `keep` to leave them as they are.")  # fmt: skip
@click.option("--min", "least", multiple=True, metavar="ROLE=TYPE", help="Use at least as many bits for this role.")
@click.option(
    "--draft-loss", type=click.FloatRange(min=0), default=0.5, show_default=True,
    help="Points of agreement that the draft head may lose.",
)  # fmt: skip
@click.option(
    "--head-score/--no-head-score", default=True, show_default=True,
    help="Measure what each type costs the draft head; otherwise it gets a cautious mixture of types.",
)  # fmt: skip
@click.option("--chunks", type=click.IntRange(min=2), default=measure.CHUNKS, show_default=True,
              help="Chunks of each text to score every probe on.")  # fmt: skip
@click.option("--probe-budget", type=click.IntRange(min=0), default=0, show_default=True,
              help="Extra chunks to evaluate, in total, for probes whose cost is lost in noise.")  # fmt: skip
@click.option("--check-chunks", type=click.IntRange(min=1), default=CHECKED, show_default=True,
              help="Chunks of each text to score the result on.")  # fmt: skip
@click.option("--sample", type=click.IntRange(min=1), default=errors.SAMPLE, show_default=True,
              help="Weights of each tensor to measure the errors on.")  # fmt: skip
@click.option("--refine", type=click.IntRange(min=0), default=0, show_default=True,
              help="Try this many exchanges of bits between two tensors, and keep those that help.")  # fmt: skip
@click.option(
    "--tiers/--no-tiers", "beside", default=True, show_default=True, help="Score the tiers beside the result."
)
@click.option(
    "--set",
    "tiers",
    metavar="NAME=VALUE",
    multiple=True,
    help="Set a parameter of the policies that the result is compared with (edge=1).",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@click.option("--tools", "tools_path", type=_PATH, help="Folder of the native tools.  [default: those in use]")
@click.option("--plugin", "folders", multiple=True, type=_PATH, help="Load a plugin from this folder.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--dry-run", is_flag=True, help="Check everything, say how long it will take, and measure nothing.")
@click.option("--json", "json_", is_flag=True, help="Print JSON.")
def command(
    model_path: Path,
    imatrix: Path,
    texts: tuple[Path, ...],
    target_size: str | None,
    target_bpw: float | None,
    gpu: str | None,
    context: int,
    curve: str | None,
    out: Path | None,
    at: Path | None,
    types: str,
    keep: tuple[str, ...],
    least: tuple[str, ...],
    draft_loss: float,
    head_score: bool,
    chunks: int,
    probe_budget: int,
    check_chunks: int,
    sample: int,
    refine: int,
    beside: bool,
    tiers: tuple[str, ...],
    threads: int | None,
    tools_path: Path | None,
    folders: tuple[Path, ...],
    force: bool,
    dry_run: bool,
    json_: bool,
) -> None:
    """Write the best quantization of MODEL that fits a size, measured on MODEL itself.

    Measures the error of each type on each tensor, and how much the divergence of the whole model depends on each part;
    then gives each tensor the type that keeps the divergence smallest, writes the file, and scores it on text that no
    probe used. Measurements are kept: an interrupted run resumes, and another size takes seconds.

    \b
    Examples:
      apex fit model-F16.gguf --imatrix model.imatrix.gguf --text held-out.txt --target-size 12.5GiB -o model-fit.gguf
      apex fit model-F16.gguf --imatrix model.imatrix.gguf --gpu rtx5090 --context 32768 -o model-fit.gguf
      apex fit model-F16.gguf --imatrix model.imatrix.gguf --curve 10GiB,11GiB,12GiB -o curve.svg
      apex fit model-F16.gguf --imatrix model.imatrix.gguf --target-bpw 2.8 -o model-fit.gguf --dry-run
    """
    sizes = [one for one in (target_size, target_bpw, gpu, curve) if one is not None]
    if len(sizes) != 1:
        raise click.UsageError("give one of --target-size, --target-bpw, --gpu and --curve")
    if out is None and not dry_run:
        raise click.UsageError("give the file to write: -o FILE")
    if out is not None:
        check_place(out)
    asked = Asked(
        imatrix=imatrix,
        texts=texts,
        out=out,
        measurement=at,
        size=budget.size_of(target_size) if target_size else None,
        bits=target_bpw,
        gpu=gpu,
        context=context,
        curve=tuple(budget.size_of(one) for one in curve.split(",") if one.strip()) if curve else (),
        settings={
            "types": types,
            "keep": ",".join(keep),
            "min": ",".join(least),
            "draft_loss": draft_loss,
        },
        beside=beside,
        tiers=parse_settings(tiers),
        chunks=chunks,
        probe_budget=probe_budget,
        check_chunks=check_chunks,
        sample=sample,
        refine=refine,
        head_score=head_score,
        threads=threads,
        force=force,
    )
    if curve and not asked.curve:
        raise ParameterUnknown("--curve takes sizes separated by commas", hint="--curve 10GiB,11GiB")
    with progress() as report:
        place = workplace(tools_path, folders, report=report)
        before = preview(model_path, asked, place)
        if not json_:
            for line in before.lines():
                note(line)
        if dry_run:
            if json_:
                as_json(before.json())
            return
        done = fit(before, asked, place)
    if json_:
        as_json(_json(done))
    else:
        _print(done)


def _json(done: Done) -> dict[str, Any]:
    return {
        "measurement": str(done.measurement),
        "rows": [row.json() for row in done.rows],
        "tiers": [row.json() for row in done.tiers],
        "plot": [str(path) for path in done.plots],
        "file": done.made.json() if done.made else None,
        "warnings": list(done.warnings),
    }


def _print(done: Done) -> None:
    for text in done.warnings:
        click.echo(f"warning: {text}", err=True)
    columns = ("file", "target", "bytes", "bpw", "KLD predicted", "KLD measured", "95 %")
    rows = [_cells(row) for row in (*done.rows, *done.tiers)]
    table("Fit", columns, rows, right=columns[1:])
    if done.made is not None:
        _print_file(done.made)
    for path in (*done.plots, done.measurement):
        click.echo(f"written: {path}")


def _print_file(made: Made) -> None:
    click.echo(f"{made.path}: {made.n_bytes} bytes, {'reused' if made.reused else 'written and verified'}")
    for line in made.lines:
        click.echo(line)


def _cells(row: Row) -> tuple[str, ...]:
    interval = f"[{row.low:.4f}, {row.high:.4f}]" if row.low is not None and row.high is not None else ""
    return (
        row.name,
        str(row.target or ""),
        str(row.n_bytes),
        f"{row.bits:.3f}",
        _number(row.predicted),
        _number(row.measured),
        interval,
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
