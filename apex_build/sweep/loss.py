"""What a point of a sweep loses against the baseline."""

from __future__ import annotations

from dataclasses import dataclass

from apex_build.evaluation.intervals import with_interval
from apex_build.hookspecs import Figure
from apex_build.sweep.rows import Row


@dataclass(frozen=True)
class Loss:
    """How much worse a file is than the reference, paired, with its 95 % interval if known. Negative: it is better."""

    value: float
    low: float | None
    high: float | None

    def told(self, digits: int | None = None) -> str:
        """With its interval."""
        return with_interval(self.value, self.low, self.high, digits)


def loss_of(row: Row, score: str) -> Loss | None:
    """From the paired difference that the figure names; None if the figure does not say which direction is better."""
    figure, paired = row.figure(score), paired_of(row, score)
    if figure is None or not figure.better or paired is None or paired.value is None:
        return None
    if figure.better == "lower":
        return Loss(paired.value, paired.low, paired.high)
    low, high = (None if bound is None else 0.0 - bound for bound in (paired.high, paired.low))
    return Loss(0.0 - paired.value, low, high)


def paired_of(row: Row, score: str) -> Figure | None:
    """The figure's paired difference from the reference; itself, if it is that already."""
    figure = row.figure(score)
    return row.figure(figure.paired) if figure and figure.paired else None
