"""`apex demo`: all steps once on a small model: build, calibrate, quantize, verify, and count accepted drafts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from apex_build.cli import show
from apex_build.cli.check import print_checked
from apex_build.cli.options import json_option
from apex_build.cli.serving import command_line
from apex_build.stages.demo import Row, demo

_COLUMNS = ("file", "bytes", "bits per weight", "trunk types", "head types", "head calibrated", "drafts accepted")


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default="demo",
    show_default=True,
    help="Folder for the results.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: the tools' own choice]")
@json_option
def command(output: Path, threads: int | None, json_: bool) -> None:
    """Build the tools, calibrate the shipped test model with its draft head, quantize it twice, and compare.

    The model comes only with a checkout of the project. With an installed package, try apex calibrate and apex
    quantize on your own model.

    The second file has its draft head's experts at IQ3_XXS, which llama-quantize refuses without calibration data of
    the head. It is checked at the end: does it write text, are its drafts accepted? Existing results are reused.

    \b
    Examples:
      apex demo
      apex demo -o somewhere/else --json
    """
    with show.progress() as report:
        done = demo(output, threads=threads, report=report)
    rows, verdict = done.rows, done.verdict
    if json_:
        show.as_json([{**asdict(row), "path": str(row.path)} for row in rows])
        verdict.refuse()
        return
    show.table(
        "The test model (six layers: edge=1 near=1 attention_edge=1), its draft head calibrated",
        _COLUMNS,
        [_cells(row) for row in rows],
        right=("bytes", "bits per weight"),
    )
    print_checked(verdict)
    verdict.refuse()
    click.echo(f"to run the last one: {command_line(rows[-1].path, done.model, done.tools)}")


def _cells(row: Row) -> list[str]:
    drafted, accepted = (int(row.acceptance["all"][name] or 0) for name in ("drafted", "accepted"))
    head = "-" if row.head_with_data is None else f"{row.head_with_data} of {row.head_weights} weights"
    rate = f"{accepted / drafted:.1%} ({accepted} of {drafted})" if drafted else "nothing drafted"
    types = [", ".join(row.trunk_types), ", ".join(row.head_types)]
    return [row.file, str(row.bytes), f"{row.bits_per_weight:.3f}", *types, head, rate]
