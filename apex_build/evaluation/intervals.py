"""95 % intervals for figures over text or prompts, part of the plugin API.

Neighbours are correlated: positions of one chunk of a text, tokens of one answer. Treated as independent they give
intervals that are about half as wide as they should be. So everything here works on clusters, and treats those as
independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
FloatsLike = Sequence[float] | npt.NDArray[np.floating] | npt.NDArray[np.integer] | npt.NDArray[np.bool_]
LabelsLike = Sequence[int] | npt.NDArray[np.integer]

LEAST_CLUSTERS = 8  # with fewer, the scatter between clusters is too uncertain for a valid interval
NORMAL = NormalDist().inv_cdf(0.975)  # 1.96: half a 95 % interval, in standard errors


class Estimate(NamedTuple):
    """A value and its 95 % interval; `low` and `high` are None if there are too few clusters for one."""

    value: float
    low: float | None
    high: float | None

    def times(self, factor: float) -> Estimate:
        """The same in another unit: `times(100)` for per cent."""
        low, high = (None if bound is None else bound * factor for bound in self[1:])
        return Estimate(self.value * factor, low, high)

    def within(self, least: float, most: float = math.inf) -> Estimate:
        """The interval clipped to possible values: no share is above 100 %."""
        low, high = (None if bound is None else min(max(bound, least), most) for bound in self[1:])
        return Estimate(self.value, low, high)

    def exp(self) -> Estimate:
        """The exponential: a perplexity from a mean of negative log-likelihoods."""
        low, high = (None if bound is None else math.exp(bound) for bound in self[1:])
        return Estimate(math.exp(self.value), low, high)


def clustered_mean(values: FloatsLike, clusters: LabelsLike, strata: LabelsLike | None = None) -> Estimate:
    """The mean of `values`, each of which belongs to a cluster, and each cluster to a stratum (label -> label, all of
    one length).

    The cluster-robust 'sandwich' for a mean: with e_g = sum over cluster g of (value - mean), n values, G clusters and
    S strata,

        Var = 1/n^2  sum over strata s of  G_s/(G_s - 1)  sum over g in s of (e_g - mean of e in s)^2

    and t of G - S degrees of freedom (Cameron and Miller, 'A Practitioner's Guide to Cluster-Robust Inference', 2015,
    II.B and VI; strata: Cochran, 'Sampling Techniques', 1977, 5.9 and 6.11). Strata are what was chosen and not drawn,
    such as the domains of the texts: their differences do not add to the uncertainty.
    """
    each = np.asarray(values, dtype=np.float64)
    label = np.asarray(clusters, dtype=np.int64)
    stratum = np.zeros_like(label) if strata is None else np.asarray(strata, dtype=np.int64)
    pairs, member = np.unique(np.stack([stratum, label]), axis=1, return_inverse=True)
    member = member.reshape(-1)
    n = pairs.shape[1]
    return clustered_ratio(np.bincount(member, each, n), np.bincount(member, minlength=n), pairs[0])


def clustered_ratio(over: FloatsLike, under: FloatsLike, strata: LabelsLike | None = None) -> Estimate:
    """Sum of `over` / sum of `under`, one of each for every cluster: what `clustered_mean` is for sums that are given.

    Linearized (Cochran 1977, 2.11): e_g = over_g - ratio * under_g takes the place of the cluster's sum of residuals.
    """
    numerator, denominator, groups = _by_stratum(over, under, strata)
    ratio = float(numerator.sum() / denominator.sum())
    if not _enough(groups):
        return Estimate(ratio, None, None)
    residual = numerator - ratio * denominator
    variance = sum(len(group) * float(residual[group].var(ddof=1)) for group in groups) / float(denominator.sum()) ** 2
    half = student(len(numerator) - len(groups)) * math.sqrt(variance)
    return Estimate(ratio, ratio - half, ratio + half)


def ratio_interval(
    over: FloatsLike, under: FloatsLike, strata: LabelsLike | None = None, *, seed: int = 0, repeats: int = 4000
) -> Estimate:
    """Sum of `over` / sum of `under`, one of each for every cluster, with a bootstrap interval: clusters resampled
    within each stratum.

    For ratios that a cluster or two can sway: accepted over drafted tokens of some dozens of prompts. The percentile
    interval with its levels widened for the number of clusters, so that it is at least as wide as one from Student's t
    (Hesterberg, 'What Teachers Should Know About the Bootstrap', 2015, 3.2). The same numbers always give the same
    interval.
    """
    numerator, denominator, groups = _by_stratum(over, under, strata)
    ratio = float(numerator.sum() / denominator.sum())
    if not _enough(groups):
        return Estimate(ratio, None, None)
    random = np.random.default_rng(seed)
    sums = np.zeros((2, repeats))
    for group in groups:
        drawn = random.multinomial(len(group), np.full(len(group), 1 / len(group)), size=repeats)
        sums += np.stack([drawn @ numerator[group], drawn @ denominator[group]])
    ratios = sums[0][sums[1] > 0] / sums[1][sums[1] > 0]
    freedom = len(numerator) - len(groups)
    level = NormalDist().cdf(-math.sqrt(len(numerator) / freedom) * student(freedom))
    low, high = np.quantile(ratios, [level, 1 - level])
    return Estimate(ratio, float(low), float(high))


def share_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's interval for a share of independent cases, `successes` of `n`: it holds for few cases, and for none or
    all of them.

    Wilson, 'Probable Inference, the Law of Succession, and Statistical Inference', 1927.
    """
    if n == 0:
        return 0.0, 1.0
    share, square = successes / n, NORMAL**2
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = NORMAL / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    # rounding must not leave the share outside
    return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))


def student(freedom: int) -> float:
    """97.5 % quantile of Student's t, to 0.001 from 6 degrees of freedom up (Abramowitz and Stegun, 1964, 26.7.5)."""
    x, v = NORMAL, float(freedom)
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + sum(term / v**power for power, term in enumerate(terms, 1))


def _by_stratum(over: FloatsLike, under: FloatsLike, strata: LabelsLike | None) -> tuple[Floats, Floats, list[Labels]]:
    numerator, denominator = np.asarray(over, dtype=np.float64), np.asarray(under, dtype=np.float64)
    label = np.zeros(len(numerator), dtype=np.int64) if strata is None else np.asarray(strata, dtype=np.int64)
    return numerator, denominator, [np.flatnonzero(label == one) for one in np.unique(label)]


def _enough(groups: Sequence[Labels]) -> bool:
    return sum(len(group) for group in groups) - len(groups) >= LEAST_CLUSTERS - 1 and min(map(len, groups)) > 1


def with_interval(value: float, low: float | None, high: float | None, digits: int | None = None) -> str:
    """`1.234 [1.201, 1.267]`, to as many decimals as the interval bears, or to `digits`."""
    if low is None or high is None:
        return f"{value:.6g}" if digits is None else f"{value:.{digits}f}"
    if digits is None:
        digits = 2
        while digits < 6 and 0 < high - low < 10**-digits * 10:
            digits += 1
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
