"""`apex calibrate --dry-run`: the text's parts, the command, and how long all of it would take."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from apex_build.calibration.forecast import Forecast, forecast
from apex_build.calibration.run import Settings
from apex_build.calibration.sets import CalibrationText
from apex_build.cli import show
from apex_build.errors import ToolFailed, ToolKilled
from apex_build.evaluation.pace import duration
from apex_build.evaluation.rows_check import CHUNKS
from apex_build.gguf_model.catalogue import Model
from apex_build.native.toolset import Toolset
from apex_build.printable import printable


def measure(model: Model, text: CalibrationText, tools: Toolset, settings: Settings) -> Forecast | None:
    """None where the model cannot be run here: the rest of the plan can be shown nevertheless."""
    try:
        with show.progress() as report:
            return forecast(model, text, tools, settings, report)
    except (ToolFailed, ToolKilled) as error:
        show.note(f"not measured: {printable(error.message.splitlines()[0])}")
        return None


def show_plan(
    text: CalibrationText, wanted: list[str], out: Path, measured: Forecast | None, checked: bool, json_: bool
) -> None:
    before = 2 * CHUNKS if checked else 0  # of the check of the hidden rows
    if json_:
        parts = [{key: value for key, value in asdict(part).items() if key != "begins"} for part in text.parts]
        show.as_json(
            {
                "text": {"sha256": text.sha256, "bytes": len(text.data), "parts": parts},
                "command": wanted,
                "output": str(out),
                "forecast": _forecast_json(measured, before) if measured else None,
            }
        )
        return
    rows = [
        (part.domain, part.source, part.documents, show.size(part.n_bytes), part.refused or "-") for part in text.parts
    ]
    show.table(
        f"Calibration text, {show.size(len(text.data))}",
        ("domain", "source", "documents", "bytes", "refused"),
        rows,
        right=("documents", "bytes", "refused"),
    )
    click.echo(f"command: {shlex.join(wanted)}")
    click.echo(f"output:  {out}")
    if measured is None:
        return
    click.echo(
        f"measured: {measured.measured} chunks at {measured.chunk:.2f} s, and {measured.start:.0f} s to load the model"
    )
    check = f", and {before} of the check of the hidden rows" if before else ""
    click.echo(f"time:    about {_long(measured, 1, before)} here ({measured.chunks} chunks{check})")
    if several := [f"{_long(measured, number, before)} on {number}" for number in measured.workers[1:]]:
        click.echo(f"         on N machines like this one (--shards N --cluster ADDRESS): {', '.join(several)}")


def _long(measured: Forecast, workers: int, before: int) -> str:
    """The time, and of what takes an hour or more also the hours of all machines, which is what they cost."""
    seconds = measured.seconds(workers, before)
    hours = f" ({workers * seconds / 3600:.1f} machine hours)" if workers > 1 and workers * seconds >= 3600 else ""
    return f"{duration(seconds)}{hours}"


def _forecast_json(measured: Forecast, before: int) -> dict[str, Any]:
    return {
        "chunks": measured.chunks,
        "measured_chunks": measured.measured,
        "seconds_a_chunk": measured.chunk,
        "seconds_to_start": measured.start,
        "seconds_by_workers": {str(number): measured.seconds(number, before) for number in measured.workers},
    }
