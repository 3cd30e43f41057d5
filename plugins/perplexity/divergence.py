"""KL divergence of a model from its reference, as llama-perplexity --kl-divergence prints it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from apex_build.plugin_api import (
    NORMAL,
    Estimate,
    EvaluationRefused,
    Figure,
    Task,
    VocabularyMismatch,
    check_context,
    clustered_ratio,
    divergence_rows,
    divergence_statistic,
    reference_logits,
    run_over_chunks,
    scored_positions,
    total_chunks,
    vocabulary_differs,
)

Floats = npt.NDArray[np.float64]

_LEAST = 100  # positions: with fewer the tool prints no statistics
_HALF = 5e-6  # the rows are rounded to five decimals


@dataclass(frozen=True, eq=False)
class Divergence:
    """Of one text. Sums of each chunk over its positions; the mean and error of a whole text are as printed, to six
    decimals.
    """

    positions: int  # of a chunk
    kld: Floats
    same_top: Floats
    mean_kld: tuple[float, float]  # with its standard error, taking positions as independent
    median: float
    p99_9: float
    maximum: float

    @property
    def n(self) -> int:
        return len(self.kld) * self.positions


def kld(task: Task) -> list[Figure]:
    """Figures over all texts, and for each. Overall quantiles cannot be computed from each text's and are left out."""
    check_context(task)
    assert task.reference is not None
    found: list[Divergence] = []
    for domain, text in task.texts.items():
        logits = reference_logits(task, domain)
        arguments: list[str | Path] = [
            "-c",
            str(task.number("context")),
            "--kl-divergence",
            "--kl-divergence-base",
            logits,
        ]
        what = f"{task.model.path.name} on {domain or text.name}"
        found.append(run_over_chunks(task, task.model.path, text, arguments, what, lambda lines: _read(lines, task)))
    figures = _figures(found, "")
    if len(found) > 1:
        for domain, one in zip(task.texts, found, strict=True):
            figures += _figures([one], domain)
    return figures


def read_divergence(lines: Sequence[str]) -> Divergence | None:
    """What the tool printed; None if a part of it is missing."""
    plan = total_chunks(lines)
    rows = divergence_rows(lines)
    if plan is None or [row[0] for row in rows] != list(range(1, plan[0] + 1)):
        return None
    table, positions = np.array(rows), scored_positions(plan[1])
    divergence, same_top = (np.diff(table[:, 0] * table[:, column], prepend=0.0) * positions for column in (5, 9))
    mean_kld, median, p99_9, maximum, last = (
        divergence_statistic(lines, name)
        for name in ("Mean KLD", "Median KLD", "99.9% KLD", "Maximum KLD", "Same top p")
    )
    if not (mean_kld and median and p99_9 and maximum and last):
        return None
    exact = np.round(same_top / 100)  # a count: the share's three decimals tell it for 100,000 positions
    return Divergence(positions, divergence, exact, mean_kld, median[0], p99_9[0], maximum[0])


def _read(lines: Sequence[str], task: Task) -> Divergence | None:
    assert task.reference is not None
    if vocabulary_differs(lines):
        raise VocabularyMismatch(
            f"{task.reference.path} cannot be the reference of {task.model.path}: another vocabulary"
        )
    plan = total_chunks(lines)
    if plan is not None and 0 < (n := plan[0] * scored_positions(plan[1])) < _LEAST:
        raise EvaluationRefused(
            f"kld: {plan[0]} chunks of {plan[1]} tokens are {n} scored positions, expected at least {_LEAST}",
            hint="give more text, or more chunks",
        )
    return read_divergence(lines)


def _figures(parts: Sequence[Divergence], domain: str) -> list[Figure]:
    n = sum(part.n for part in parts)
    mean = _mean(parts)
    text = np.repeat(np.arange(len(parts)), [len(part.kld) for part in parts])
    chunk = np.concatenate([np.full(len(part.kld), float(part.positions)) for part in parts])
    same = clustered_ratio(np.concatenate([part.same_top for part in parts]), chunk, text).within(0.0, 1.0).times(100)
    figures = [
        Figure("kld.mean", *mean.within(0.0), "nats", n, domain, label="mean divergence from the reference", plot=True)
    ]
    if len(parts) == 1:
        figures.append(Figure("kld.median", parts[0].median, None, None, "nats", n, domain))
        figures.append(Figure("kld.p99_9", parts[0].p99_9, None, None, "nats", n, domain))
    figures.append(Figure("kld.max", max(part.maximum for part in parts), None, None, "nats", n, domain))
    # each is a difference from the reference already
    figures = [replace(figure, better="lower", paired=figure.name) for figure in figures]
    label = "same first choice as the reference"
    figures.append(Figure("top1.agreement", *same, "%", n, domain, better="higher", label=label))
    return [figure if _finite(figure) else _without_value(figure) for figure in figures]


def _mean(parts: Sequence[Divergence]) -> Estimate:
    """Of all positions; the interval from the scatter of the chunks.

    The rows' rounding adds to that scatter, and where files are near to the reference it is all of it: what it adds on
    average is taken off, and the interval is never narrower than the tool's own standard error gives, which takes
    positions as independent.
    """
    n = sum(part.n for part in parts)
    printed = [part.mean_kld for part in parts]
    value = sum(part.n * mean for part, (mean, _) in zip(parts, printed, strict=True)) / n
    sums = np.concatenate([part.kld for part in parts])
    chunk = np.concatenate([np.full(len(part.kld), float(part.positions)) for part in parts])
    scatter = clustered_ratio(sums, chunk, np.repeat(np.arange(len(parts)), [len(part.kld) for part in parts]))
    if scatter.high is None:
        return Estimate(value, None, None)
    numbers = [np.arange(1, len(part.kld) + 1) for part in parts]
    # each sum is the difference of two rounded ones, whose errors are even over +- _HALF * positions * chunks so far
    rounding = sum(
        part.positions**2 * _HALF**2 / 3 * (k**2 + (k - 1) ** 2).sum() for part, k in zip(parts, numbers, strict=True)
    )
    own = sum((part.n * error) ** 2 for part, (_, error) in zip(parts, printed, strict=True) if math.isfinite(error))
    square = (scatter.high - scatter.value) ** 2 - NORMAL**2 * rounding / n**2
    half = math.sqrt(max(square, NORMAL**2 * own / n**2))
    return Estimate(value, value - half, value + half)


def _finite(figure: Figure) -> bool:
    return all(number is None or math.isfinite(number) for number in (figure.value, figure.low, figure.high))


def _without_value(figure: Figure) -> Figure:
    return replace(figure, value=None, low=None, high=None, note="the tool's figure is not a finite number")
