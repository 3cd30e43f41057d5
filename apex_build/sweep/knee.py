"""What a point of a sweep loses against the baseline, and the knee: the smallest whose loss is under a bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apex_build.evaluation.intervals import with_interval
from apex_build.hookspecs import Figure
from apex_build.sweep.loss import loss_of
from apex_build.sweep.rows import Row, curve_name


@dataclass(frozen=True)
class Knee:
    """The `smallest` within the bound by the estimate, and `firm`, the smallest whose whole interval is within it."""

    head_data: bool
    bound: float
    smallest: Row | None
    firm: Row | None


def size_of(row: Row, by_head: bool) -> int:
    """The bytes that matter in a sweep: of the head, or of the whole file."""
    return (row.head_bytes if by_head else row.file_bytes or (row.head_bytes or 0) + (row.trunk_bytes or 0)) or 0


def find_knees(rows: Sequence[Row], score: str, bound: float, *, by_head: bool) -> list[Knee]:
    """One for each curve that has losses. A larger file than the smallest may, by chance, lose more."""
    knees = []
    for head_data in (True, False):
        losses = [(row, loss) for row in rows if row.head_data == head_data and (loss := loss_of(row, score))]
        if not losses:
            continue
        under = [row for row, loss in losses if loss.value < bound]
        firmly = [row for row, loss in losses if loss.high is not None and loss.high < bound]
        knees.append(
            Knee(
                head_data,
                bound,
                *(min(some, key=lambda row: size_of(row, by_head), default=None) for some in (under, firmly)),
            )
        )
    return knees


def knee_text(knee: Knee, score: str, unit: str, *, by_head: bool) -> str:
    """The knee in words, with its interval."""
    what = f"the smallest {'head' if by_head else 'file'}"
    curve = f"{curve_name(knee.head_data)}: " if by_head else ""
    points = "points" if unit == "%" else unit
    if knee.smallest is None:
        return f"{curve}nothing loses less than {knee.bound:g} {points} of {score}"

    def told(row: Row) -> str:
        loss = loss_of(row, score)
        assert loss is not None
        return f"{', '.join(row.values.values())} ({mb(size_of(row, by_head))}, loss {loss.told()})"

    text = f"{curve}{what} that loses less than {knee.bound:g} {points} of {score} is {told(knee.smallest)}"
    if (loss := loss_of(knee.smallest, score)) and loss.high is None:
        return f"{text}; there is too little text for an interval"
    if knee.firm == knee.smallest:
        return f"{text}, and its whole interval is under the bound"
    other = f"{what} whose whole interval is under the bound is {told(knee.firm)}" if knee.firm else "no interval is"
    return f"{text}, but its interval reaches beyond the bound; {other}"


def value_text(figure: Figure) -> str:
    """A figure with its interval, with as many digits as the interval justifies."""
    if figure.value is None:
        return figure.note or "-"
    return with_interval(figure.value, figure.low, figure.high)


def mb(n_bytes: float) -> str:
    """Bytes as MB of 10^6, with enough digits to tell heads apart."""
    return f"{n_bytes / 1e6:.3f} MB" if n_bytes < 1e8 else f"{n_bytes / 1e6:.0f} MB"
