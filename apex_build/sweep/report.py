"""What a sweep shows: for each score a table, a plot and the knees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apex_build.errors import EvaluationRefused
from apex_build.report import plot
from apex_build.report.plot import Chart, Mark, Series
from apex_build.storage.outputs import remove_parts, whole_file
from apex_build.sweep.knee import Knee, find_knees, knee_text, size_of
from apex_build.sweep.loss import loss_of, paired_of
from apex_build.sweep.rows import TABLE, Row, curve_name
from apex_build.sweep.table import Table, markdown, sweep_table

DEFAULT_BOUND = 0.5  # points


@dataclass(frozen=True)
class Summary:
    """The report for one score. `chart` is None while nothing was measured."""

    score: str
    table: Table
    knees: tuple[str, ...]
    chart: Chart | None


def default_score(rows: Sequence[Row]) -> str:
    """The figure that the evaluators want shown first, else their first one."""
    found = [
        figure for row in rows for figures in row.figures.values() for figure in figures if figure.value is not None
    ]
    shown = next((figure for figure in found if figure.plot), found[0] if found else None)
    return shown.name if shown else "score"


def check_scores(rows: Sequence[Row], scores: Sequence[str]) -> None:
    """Raises EvaluationRefused for a score that measured rows do not have."""
    names = list(dict.fromkeys(figure.name for row in rows for figures in row.figures.values() for figure in figures))
    for score in scores:
        if names and score not in names:
            raise EvaluationRefused(
                f"--score {score}: no evaluator of this run reports it. There are: {', '.join(names)}"
            )


def report_sweep(
    rows: Sequence[Row],
    score: str,
    model: str,
    *,
    by_head: bool,
    bound: float | None = None,
    reference: str = "",
    counted: str = "",
    about: str = "",
) -> Summary:
    """`by_head`: the bytes that count are those of the draft head. `bound` None: half a point for a score in per cent,
    and no knee for other units. `reference` names the file that losses are taken against, if that is not a point;
    `counted` what n counts; `about` is the chart's subtitle: the trunk's type, the tools.
    """
    figures = [figure for row in rows if (figure := row.figure(score)) and figure.value is not None]
    unit = next((figure.unit for figure in figures), "")
    if bound is None and unit == "%":
        bound = DEFAULT_BOUND
    knees = find_knees(rows, score, bound, by_head=by_head) if bound is not None else []
    counts = {figure.n for figure in figures if figure.n}
    n = f", n = {' to '.join(f'{count:,}' for count in sorted({min(counts), max(counts)}))} {counted}" if counts else ""
    title = f"{model}: {score}{n}".rstrip()
    table = sweep_table(rows, score, title, by_head=by_head, reference=reference)
    words = [knee_text(knee, score, unit, by_head=by_head) for knee in knees]
    if figures and bound is not None and not figures[0].better:
        words.append(f"no knee of {score}: the evaluator does not say whether lower or higher is better")
    label = next((figure.label for figure in figures if figure.label), score)
    heading = f"{model}: {label}{n}".rstrip() + (f"\n{about}" if about else "")
    return Summary(
        score, table, tuple(words), _chart(rows, score, label, heading, unit, knees, by_head) if figures else None
    )


def write_report(folder: Path, reports: Sequence[Summary]) -> list[Path]:
    """table.md, and where matplotlib is there sweep.png and .svg, of a further score sweep-SCORE.png. Returns what
    was written.
    """
    text = "\n".join(markdown(one.table) + "".join(f"- {line}\n" for line in one.knees) for one in reports)
    remove_parts(folder / TABLE)
    with whole_file(folder / TABLE) as part:
        part.write_text(text, encoding="utf-8")
    written = [folder / TABLE]
    if plot.available():
        for number, one in enumerate(reports):
            stem = "sweep" if number == 0 else f"sweep-{one.score}"
            if one.chart:
                outs = [folder / f"{stem}.png", folder / f"{stem}.svg"]
                for out in outs:
                    remove_parts(out)
                plot.draw(one.chart, *outs)
                written += outs
    return written


def _chart(
    rows: Sequence[Row], score: str, label: str, title: str, unit: str, knees: Sequence[Knee], by_head: bool
) -> Chart:
    smallest = {knee.smallest.identity for knee in knees if knee.smallest}
    series = []
    for head_data in (True, False):
        marks = []
        for row in rows:
            figure = row.figure(score)
            y = figure.value if figure else None
            if row.head_data != head_data or not size_of(row, by_head) or (y is None and not row.refused):
                continue
            interval = (
                (figure.low, figure.high) if figure and figure.low is not None and figure.high is not None else None
            )
            values = ", ".join(row.values.values())
            inner = _paired_interval(row, score, y)
            marks.append(Mark(size_of(row, by_head) / 1e6, y, values, None, interval, row.identity in smallest, inner))
        if marks:
            joined = len(next(iter(rows)).values) == 1
            series.append(Series(curve_name(head_data) if by_head else "files", tuple(marks), joined))
    baseline = next((row for row in rows if row.baseline), None)
    figure = baseline.figure(score) if baseline else None
    lines = []
    bound = knees[0].bound if knees else None
    if baseline and figure and figure.value is not None and bound is not None and loss_of(baseline, score):
        sign, word = (1, "plus") if figure.better == "lower" else (-1, "less")
        of = ", ".join(baseline.values.values())
        lines = [(figure.value + sign * bound, f"{of} {word} {bound:g} {'points' if unit == '%' else unit}".rstrip())]
    return Chart(
        title=title,
        x_label=f"bytes of the {'draft head' if by_head else 'file'} (MB)",
        y_label=f"{label}{f' ({unit})' if unit else ''}, 95 % intervals",
        series=tuple(series),
        lines=tuple(lines),
        inner="of the difference from the baseline" if baseline else "of the difference from the reference",
        ring=f"smallest with a paired loss under {bound:g}" if bound is not None else "",
    )


def _paired_interval(row: Row, score: str, value: float | None) -> tuple[float, float] | None:
    """The interval of the paired difference, placed around the score."""
    paired = paired_of(row, score)
    if paired is row.figure(score):  # it is the score itself
        return None
    if (
        value is None
        or row.baseline
        or paired is None
        or paired.value is None
        or paired.low is None
        or paired.high is None
    ):
        return None
    return value + paired.low - paired.value, value + paired.high - paired.value
