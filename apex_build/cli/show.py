"""What the verbs share for showing things: a progress line with an ETA, tables, sizes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from apex_build.native.lines import HARMFUL
from apex_build.progress import Report, Step

_PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal to redraw


def console() -> Console:
    """For people: stderr, so that stdout holds only what was asked for."""
    return Console(stderr=True, highlight=False)


@contextmanager
def progress() -> Iterator[Report]:
    """A `Report` that draws bars with an ETA on a terminal, and prints a line now and then elsewhere."""
    if not sys.stderr.isatty():
        yield _plain()
        return
    columns = (
        TextColumn("{task.description}", markup=False),  # names of files are in it
        BarColumn(),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(step: Step) -> None:
            if step.said:
                bars.console.print(Text(f"warning: {step.task}"))
                return
            if step.task not in tasks:
                tasks[step.task] = bars.add_task(step.task, total=step.total, count="")
            bars.update(tasks[step.task], completed=step.done, total=step.total, count=_count(step))

        yield report


def _plain() -> Report:
    began: dict[str, tuple[float, float]] = {}  # time, and what was done by then: a resumed run does not begin at 0
    shown: dict[str, float] = {}

    def report(step: Step) -> None:
        if step.said:
            click.echo(f"warning: {step.task}", err=True)
            return
        now = time.monotonic()
        first, before = began.setdefault(step.task, (now, step.done))
        finished = step.total is not None and step.done >= step.total
        if now - shown.get(step.task, -_PLAIN_EVERY) < _PLAIN_EVERY and not finished:
            return
        if finished and shown.get(step.task) == float("inf"):
            return
        shown[step.task] = float("inf") if finished else now
        left = ""
        if step.total and step.done > before and not finished:
            left = f", {(now - first) / (step.done - before) * (step.total - step.done):.0f} s left"
        click.echo(f"{step.task}: {_count(step)} ({now - first:.0f} s{left})", err=True)

    return report


def _count(step: Step) -> str:
    total = f"/{step.total:.0f}" if step.total is not None else ""
    return f"{step.done:.0f}{total} {step.unit}".strip()


def size(n_bytes: float) -> str:
    """Bytes for a person, in powers of 1000 as model cards write them."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.2f} {unit}"
        n_bytes /= 1000
    raise AssertionError("unreachable")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[str] = ()) -> None:
    """Print a table to stdout; columns named in `right` are aligned right."""
    out = Table(title=Text(title, style="italic"), title_justify="left", header_style="bold")
    for column in columns:
        out.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        out.add_row(*(Text(str(cell)) for cell in row))  # never as markup: names come from files
    width = None if sys.stdout.isatty() else 160
    Console(highlight=False, width=width).print(out)


def as_json(value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    click.echo(HARMFUL.sub(lambda found: json.dumps(found[0])[1:-1], text))  # such characters stand in strings alone
