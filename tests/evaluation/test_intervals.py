"""Intervals: known values, and simulations of their coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from apex_build.evaluation.intervals import (
    Estimate,
    clustered_mean,
    clustered_ratio,
    ratio_interval,
    share_interval,
    student,
)


@pytest.mark.parametrize(
    ("freedom", "value"), [(6, 2.44691), (7, 2.36462), (9, 2.26216), (20, 2.08596), (100, 1.98397), (10**6, 1.95997)]
)
def test_quantiles_of_students_t(freedom: int, value: float) -> None:
    assert student(freedom) == pytest.approx(value, abs=1e-3)


def test_with_one_member_each_it_is_the_interval_of_a_mean() -> None:
    mean, low, high = clustered_mean(range(1, 11), range(10))
    assert mean == 5.5
    assert low is not None and high is not None
    assert high - mean == pytest.approx(2.26216 * 3.02765 / np.sqrt(10), rel=1e-4) and mean - low == pytest.approx(
        high - mean
    )


def test_with_clusters_of_one_size_it_is_that_of_their_means() -> None:
    random = np.random.default_rng(1)
    values = random.normal(size=(12, 7)) + random.normal(size=(12, 1))
    order = random.permutation(84)
    found = clustered_mean(values.reshape(-1)[order], np.repeat(np.arange(12), 7)[order])
    expected = clustered_mean(values.mean(axis=1), range(12))
    assert found == pytest.approx(expected)


def test_a_ratio_is_near_the_jackknife() -> None:
    random = np.random.default_rng(2)
    under = random.integers(5, 40, 60)
    over = random.binomial(under, random.beta(8, 4, 60))
    ratio, low, high = clustered_ratio(over, under)
    without = (over.sum() - over) / (under.sum() - under)
    error = np.sqrt(59 / 60 * ((without - without.mean()) ** 2).sum())
    assert ratio == over.sum() / under.sum()
    assert low is not None and high is not None
    assert (high - low) / 2 == pytest.approx(student(59) * error, rel=0.03)


def test_strata_leave_out_what_lies_between_them() -> None:
    random = np.random.default_rng(3)
    values = random.normal(size=200) + np.repeat([0.0, 50.0], 100)
    clusters, strata = np.tile(np.repeat(np.arange(10), 10), 2), np.repeat([0, 1], 100)
    together, apart = clustered_mean(values, clusters + 10 * strata), clustered_mean(values, clusters, strata)
    assert together.value == apart.value
    assert together.high is not None and apart.high is not None
    assert apart.high - apart.value < 0.3 < 5 < together.high - together.value
    halves = [clustered_mean(part, clusters[:100]) for part in np.split(values, 2)]
    errors = [((half.high or 0) - half.value) / student(9) for half in halves]
    assert apart.high - apart.value == pytest.approx(student(18) * math.hypot(*errors) / 2)
    assert ratio_interval(values, np.ones(200), strata)[1:] == pytest.approx(apart[1:], rel=0.05)


def test_too_few_clusters_give_no_interval() -> None:
    values = np.arange(70.0)
    assert clustered_mean(values, np.repeat(np.arange(7), 10)) == Estimate(34.5, None, None)
    assert ratio_interval(values[:7], np.ones(7)) == Estimate(3.0, None, None)
    assert clustered_mean(values, np.repeat(np.arange(14), 5)).low is not None
    alone = np.repeat([0, 1], [69, 1])
    assert clustered_mean(values, np.arange(70), alone).low is None, (
        "one cluster of a stratum says nothing of its scatter"
    )


def test_units_and_bounds() -> None:
    estimate = Estimate(0.98, 0.95, 1.01)
    assert estimate.within(0.0, 1.0).times(100) == pytest.approx((98.0, 95.0, 100.0))
    assert Estimate(0.0, None, None).exp() == (1.0, None, None)
    assert Estimate(0.0, -1.0, 1.0).exp() == pytest.approx((1.0, np.exp(-1), np.e))


def test_the_bootstrap_is_repeatable_and_agrees_with_the_formula() -> None:
    random = np.random.default_rng(4)
    under = random.integers(20, 60, 48)
    over = random.binomial(under, random.beta(12, 8, 48))
    once = ratio_interval(over, under)
    assert once == ratio_interval(over, under) != ratio_interval(over, under, seed=1)
    assert once == pytest.approx(clustered_ratio(over, under), rel=0.01)
    nothing = np.zeros(48)
    assert ratio_interval(nothing, under) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (8, 10, 0.4902, 0.9433), (10, 10, 0.7225, 1.0), (0, 0, 0.0, 1.0)],
)
def test_shares(successes: int, n: int, low: float, high: float) -> None:
    assert share_interval(successes, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [8, 15, 60])
def test_of_a_hundred_intervals_ninety_five_hold(clusters: int) -> None:
    """Values in a cluster are correlated, like positions in a chunk: treating them as independent gives intervals that
    are too narrow.
    """
    random = np.random.default_rng(clusters)
    held, naive = [], []
    for _ in range(1500):
        sizes = random.integers(20, 30, clusters)
        member = np.repeat(np.arange(clusters), sizes)
        values = random.normal(size=clusters)[member] + random.normal(scale=2, size=sizes.sum())
        mean, low, high = clustered_mean(values, member)
        assert low is not None and high is not None
        held.append(low <= 0 <= high)
        naive.append(abs(mean) <= 1.96 * values.std() / np.sqrt(len(values)))
    assert 0.935 <= np.mean(held) <= 0.965
    assert np.mean(naive) < 0.75


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [12, 48])
def test_of_a_hundred_bootstrap_intervals_ninety_five_hold(clusters: int) -> None:
    random = np.random.default_rng(clusters)
    held = []
    for _ in range(600):
        under = random.integers(10, 60, clusters)
        over = random.binomial(under, random.beta(6, 4, clusters))
        _, low, high = ratio_interval(over, under, repeats=1000)
        assert low is not None and high is not None
        held.append(low <= 0.6 <= high)
    assert 0.92 <= np.mean(held) <= 0.975
