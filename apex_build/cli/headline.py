"""The table of an evaluation: one line for each file, with its size and each evaluator's main figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from apex_build.cli import show
from apex_build.evaluation.run import Result
from apex_build.gguf_model.catalogue import Model
from apex_build.hookspecs import Evaluator, Figure


def print_headline(results: Sequence[Result]) -> None:
    models = {result.work.task.model.path: result.work.task.model for result in results}
    labels = labels_of(list(models))
    columns: dict[str, dict[Path, Figure]] = {}
    failed: dict[str, set[Path]] = {}
    for result in results:
        for title, figure in _figures(result.work.evaluator, result.figures).items():
            columns.setdefault(title, {})[result.work.task.model.path] = figure
        if result.error is not None:
            failed.setdefault(result.work.evaluator.name, set()).add(result.work.task.model.path)
    names = [title + _unit(title, figures) for title, figures in columns.items()]
    rows = []
    for path, model in models.items():
        cells = [value_of(figures.get(path), unit=not _unit(title, figures)) for title, figures in columns.items()]
        rows.append(
            [labels[path], show.size(sum(file.stat().st_size for file in model.files)), f"{_bits(model):.2f}", *cells]
        )
    show.table("Results", ("file", "size", "bpw", *names), rows, right=("size", "bpw", *names))


def labels_of(paths: Sequence[Path]) -> dict[Path, str]:
    """Names to show: files of the same name are distinguished by their folders."""
    return {path: path.name if sum(one.name == path.name for one in paths) == 1 else str(path) for path in paths}


def value_of(figure: Figure | None, *, unit: bool = True) -> str:
    """The value alone, for a table: with as many digits as its interval justifies."""
    if figure is None:
        return ""
    if figure.value is None:
        return "-"
    text = f"{figure.value:.{_digits(figure, 1, 5, of_interval=5, of_value=100)}f}"
    return f"{text} {figure.unit}".rstrip() if unit else text


def figure_text(figure: Figure | None) -> str:
    """Value, interval, unit and note: one digit more than in a table, so that the interval can be read."""
    if figure is None:
        return ""
    if figure.value is None:
        return figure.note or "-"
    digits = _digits(figure, 2, 6, of_interval=10, of_value=1000)
    text = f"{figure.value:.{digits}f}"
    if figure.low is not None and figure.high is not None:
        text += f" [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"
    return f"{text} {figure.unit}".rstrip() + (f" ({figure.note})" if figure.note else "")


def _digits(figure: Figure, least: int, most: int, *, of_interval: int, of_value: int) -> int:
    """Decimals for which the interval, or without one the value, is at least that many units; none for a count."""
    value = abs(figure.value or 0.0)
    if value == int(value) and figure.low is None:
        return 0
    size, units = value, of_value
    if figure.low is not None and figure.high is not None:
        size, units = figure.high - figure.low, of_interval
    digits = least
    while digits < most and 0 < size < 10**-digits * units:
        digits += 1
    return digits


def _figures(evaluator: Evaluator, figures: Sequence[Figure]) -> dict[str, Figure]:
    """Heading -> figure over all texts or prompts, as the evaluator asks; its first figure if it asks for none."""
    whole = [figure for figure in figures if not figure.domain] or list(figures)
    found: dict[str, Figure] = {}
    for pattern, title in evaluator.headline:
        figure = next((figure for figure in whole if fnmatchcase(figure.name, pattern)), None)
        if figure is not None:
            found.setdefault(title, figure)
    return found or ({evaluator.name: whole[0]} if whole else {})


def _unit(title: str, figures: Mapping[Path, Figure]) -> str:
    """' (nats)' for the heading; per cent, and units that differ between figures, are shown with the value."""
    units = {figure.unit for figure in figures.values()}
    return f" ({unit})" if len(units) == 1 and (unit := next(iter(units))) not in ("", "%", "B") else ""


def _bits(model: Model) -> float:
    return (
        sum(tensor.n_bytes for tensor in model.tensors) * 8 / (sum(tensor.n_elements for tensor in model.tensors) or 1)
    )
