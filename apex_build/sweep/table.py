"""The table of a sweep: a row for each combination of values, the curves side by side; for the terminal and as
Markdown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apex_build.sweep.knee import mb, size_of, value_text
from apex_build.sweep.loss import Loss, loss_of, paired_of
from apex_build.sweep.rows import Row, curve_name


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[str, ...]  # columns to be aligned right
    notes: tuple[str, ...] = ()


def sweep_table(rows: Sequence[Row], score: str, title: str, *, by_head: bool, reference: str = "") -> Table:
    """`rows` of all curves; a point that is not measured says why. `reference` names the file that losses are taken
    against.
    """
    curves = [curve for curve in (True, False) if any(row.head_data == curve for row in rows)]
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    unit = next((figure.unit for row in rows if (figure := row.figure(score))), "")
    size = "head" if by_head else "file"
    columns = [*names, size]
    paired = any((found := paired_of(row, score)) and found.name != score for row in rows)
    for curve in curves:
        of_curve = f", {curve_name(curve)}" if len(curves) > 1 else ""
        columns.append(f"{score}{of_curve}" + (f" ({unit})" if unit else ""))
        if paired:
            columns.append(f"loss{of_curve}")
    body, uncalibrated = [], False
    for values in dict.fromkeys(tuple(row.values.items()) for row in rows):
        of = {row.head_data: row for row in rows if tuple(row.values.items()) == values}
        cells = [value for _, value in values]
        cells.append(next((mb(size_of(row, by_head)) for row in of.values() if size_of(row, by_head)), ""))
        for curve in curves:
            row = of.get(curve)
            marks = "*" if row and row.uncalibrated else ""
            uncalibrated |= bool(marks)
            cells.append(_score(row, score) + marks)
            if paired:
                loss = loss_of(row, score) if row else None
                cells.append("baseline" if row and row.baseline else _loss(loss))
        body.append(tuple(cells))
    notes = []
    against = next((row.name for row in rows if row.baseline), reference)
    if against:
        notes.append(f"compared with {against}, on the same positions; intervals are of 95 %")
    if uncalibrated:
        notes.append("*: quantized without calibration data for the head, as llama-quantize does silently")
    for curve in curves:
        if refused := [row for row in rows if row.refused and row.head_data == curve]:
            which = "; ".join(", ".join(row.values.values()) for row in refused)
            notes.append(f"refused, {curve_name(curve)}: {which}. Of the first: {refused[0].refused}")
    notes += [f"failed, {row.name}: {name}: {reason}" for row in rows for name, reason in row.failed.items()]
    return Table(title, tuple(columns), tuple(body), tuple(columns[len(names) :]), tuple(notes))


def markdown(table: Table) -> str:
    """A GitHub table with its notes."""
    line = [
        f"| {' | '.join(map(_cell, table.columns))} |",
        f"|{'|'.join('---:' if c in table.right else '---' for c in table.columns)}|",
    ]
    line += [f"| {' | '.join(map(_cell, row))} |" for row in table.rows]
    return (
        "\n".join([f"**{_cell(table.title)}**", "", *line, "", *(f"- {note}" for note in map(_cell, table.notes))])
        + "\n"
    )


def _score(row: Row | None, score: str) -> str:
    if row is None:
        return ""
    if row.refused:
        return "refused"
    if row.failed:
        return "failed"
    figure = row.figure(score)
    return value_text(figure) if figure else "-"


def _loss(loss: Loss | None) -> str:
    return loss.told() if loss else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("*", "\\*")
