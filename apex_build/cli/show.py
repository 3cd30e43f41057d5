"""Output that the verbs share: progress with the time left, tables, sizes."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from apex_build.cli.groups import QUIET, verbosity
from apex_build.cli.layout import lay_out, shorten
from apex_build.printable import HARMFUL, printable
from apex_build.progress import Report, Step

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_EVERY = 10.0  # seconds between lines without a terminal
_BAR = 14  # characters
_NARROWEST = 40


def console() -> Console:
    """For people: stderr, so that stdout holds only what was asked for."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """A remark for people, on stderr; -q leaves it out."""
    if verbosity() != QUIET:
        click.echo(text, err=True)


def kept_apart(folder: Path | None) -> None:
    if folder:
        note(f"measured on the text that was kept apart from calibration: {folder} (--text uses others)")


@contextmanager
def progress() -> Iterator[Report]:
    """A `Report` that draws a bar on a terminal, and prints a line now and then elsewhere; nothing with -q."""
    if verbosity() == QUIET:
        yield _warnings
    elif not sys.stderr.isatty():
        yield _plain()
    else:
        with _bars() as report:
            yield report


def _warnings(step: Step) -> None:
    """With -q: only warnings."""
    if step.said:
        click.echo(f"warning: {printable(step.task)}", err=True)


@contextmanager
def _bars() -> Iterator[Report]:
    """One line for each task; a finished task makes room for the next."""
    from rich.progress import BarColumn, Progress, TaskID, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),  # names of files are in it
        BarColumn(bar_width=_BAR),
        TextColumn("{task.fields[after]}", markup=False),
    )
    clocks: dict[str, Callable[[Step], tuple[float, float | None]]] = {}
    tasks: dict[str, TaskID] = {}
    screen = console()
    with Progress(*columns, console=screen, transient=True) as bars:

        def report(step: Step) -> None:
            if step.said:
                bars.console.print(f"warning: {printable(step.task)}", markup=False)
                return
            if step.task not in tasks:
                for old in tasks.values():
                    bars.remove_task(old)
                tasks.clear()
                tasks[step.task] = bars.add_task("", total=step.total, after="")
            elapsed, left = clocks.setdefault(step.task, _clock())(step)
            after = " ".join(
                part
                for part in (_count(step), _time(elapsed), _time(left) + " left" if left is not None else "")
                if part
            )
            room = max(_NARROWEST, screen.width) - _BAR - len(after) - 3
            text = f"{step.task}: {step.detail}" if step.detail else step.task
            bars.update(
                tasks[step.task],
                completed=step.done,
                total=step.total,
                description=shorten(printable(text), room),
                after=after,
            )

        yield report


def _plain() -> Report:
    clocks: dict[str, Callable[[Step], tuple[float, float | None]]] = {}
    shown: dict[str, float] = {}

    def report(step: Step) -> None:
        if step.said:
            click.echo(f"warning: {step.task}", err=True)
            return
        now = time.monotonic()
        elapsed, left = clocks.setdefault(step.task, _clock())(step)
        finished = step.total is not None and step.done >= step.total
        if now - shown.get(step.task, -_PLAIN_EVERY) < _PLAIN_EVERY and not finished:
            return
        if finished and shown.get(step.task) == float("inf"):
            return
        shown[step.task] = float("inf") if finished else now
        rest = f", {left:.0f} s left" if left is not None and not finished else ""
        detail = f" ({printable(step.detail)})" if step.detail else ""
        click.echo(f"{printable(step.task)}: {_count(step)}{detail} ({elapsed:.0f} s{rest})", err=True)

    return report


def _clock() -> Callable[[Step], tuple[float, float | None]]:
    """Seconds since the first step of a task, and those left: from the step, or by linear extrapolation."""
    began: list[tuple[float, float]] = []  # time, and the work done by then: a resumed run does not start at 0

    def read(step: Step) -> tuple[float, float | None]:
        now = time.monotonic()
        if not began:
            began.append((now, step.done))
        first, before = began[0]
        if step.left is not None:
            return now - first, step.left
        if not step.total or step.done <= before:
            return now - first, None
        return now - first, (now - first) / (step.done - before) * (step.total - step.done)

    return read


def _count(step: Step) -> str:
    if step.unit == "%":
        return f"{step.done:.0f} %"
    total = f"/{step.total:.0f}" if step.total is not None else ""
    return f"{step.done:.0f}{total} {step.unit}".strip()


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(n_bytes: float) -> str:
    """Bytes for a person, in powers of 1000 as model cards write them."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.2f} {unit}"
        n_bytes /= 1000
    raise AssertionError("unreachable")


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[str] = (), err: bool = False
) -> None:
    """Print a table to stdout, or with `err` to stderr. Columns in `right` are aligned right; on a terminal it fits the
    width.
    """
    width = shutil.get_terminal_size().columns if (sys.stderr if err else sys.stdout).isatty() else None
    cells = [[_cell(cell) for cell in row] for row in rows]
    lines = lay_out(columns, cells, [at for at, column in enumerate(columns) if column in right], width)
    click.echo(click.style(printable(title), italic=True), err=err)
    for number, line in enumerate(lines):
        click.echo(click.style(line, bold=True) if not number else line, err=err)
    click.echo(err=err)


def _cell(value: Any) -> str:
    """The value as text, safe for a terminal."""
    return "\n".join(printable(line) for line in str(value).split("\n"))


def as_json(value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    click.echo(HARMFUL.sub(lambda found: json.dumps(found[0])[1:-1], text))  # such characters occur only in strings
