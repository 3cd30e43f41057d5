"""What a point of a sweep loses against the baseline."""

from __future__ import annotations

from dataclasses import dataclass

from apex_build.sweep.rows import Row

# a figure whose dotted name has one of these words is better when it is lower
_LOWER = frozenset({"kld", "ppl", "perplexity", "mean_kld", "divergence"})
DIFFERENCE = ".difference"  # what evaluators add to the name of a figure for its paired difference from the reference


@dataclass(frozen=True)
class Loss:
    """What a file is worse by than the reference, paired, with its 95 % interval if that is known. Negative: it is better."""

    value: float
    low: float | None
    high: float | None


def lower_is_better(score: str) -> bool:
    return any(word in _LOWER for word in score.split("."))


def loss_of(row: Row, score: str) -> Loss | None:
    """From the paired difference that goes with the score. The trunk's divergence from the reference is a loss already."""
    figure = row.figure(score + DIFFERENCE) or (row.figure(score) if score.startswith("kld.") else None)
    if figure is None or figure.value is None:
        return None
    if lower_is_better(score):
        return Loss(figure.value, figure.low, figure.high)
    low, high = (None if bound is None else 0.0 - bound for bound in (figure.high, figure.low))
    return Loss(0.0 - figure.value, low, high)


def value_of(loss: Loss) -> str:
    """With its interval, to two digits."""
    if loss.low is None or loss.high is None:
        return f"{loss.value:.2f}"
    return f"{loss.value:.2f} [{loss.low:.2f}, {loss.high:.2f}]"
