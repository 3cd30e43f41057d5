"""The allocation: compared with all possibilities if there are few, for budgets of every size, and its cost."""

from __future__ import annotations

import importlib
import itertools
import random
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "plugins"))
allocation = importlib.import_module("fit.allocate")
Item, Option = allocation.Item, allocation.Option

BITS = (1.75, 2.06, 2.31, 2.56, 3.06, 3.44, 4.25, 4.5, 5.5, 6.56, 8.5, 16)


def items(count: int, kinds: int, seed: int, least: int = 4096) -> list[Any]:
    """Tensors whose sizes and sensitivities differ by up to a factor of a hundred."""
    generator = random.Random(seed)
    found = []
    for number in range(count):
        size, weight = least * 2 ** generator.randrange(7), 10 ** generator.uniform(-3, 0)
        options = [
            Option(f"T{kind}", round(size * bits / 8), weight * 4**-bits * generator.uniform(0.7, 1.3))
            for kind, bits in enumerate(BITS[:kinds])
        ]
        found.append(Item(f"t{number}", tuple(options)))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_it_is_near_the_best_of_all(seed: int) -> None:
    few = items(5, 5, seed)
    choices = [
        (sum(one.n_bytes for one in choice), sum(one.loss for one in choice))
        for choice in itertools.product(*(item.options for item in few))
    ]
    low, high = min(choices)[0], max(n_bytes for n_bytes, _ in choices)
    for share in (0.0, 0.2, 0.5, 0.8):
        budget = round(low + share * (high - low))
        found = allocation.allocate(few, budget)
        best = min(loss for n_bytes, loss in choices if n_bytes <= budget)
        assert found.n_bytes <= budget
        assert best <= found.loss * (1 + 1e-9) and found.loss <= 1.5 * best


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.6, 0.9])
def test_it_spends_what_it_may(share: float) -> None:
    many = items(60, 11, 3)
    low, high = allocation.smallest(many), allocation.largest(many)
    budget = round(low + share * (high - low))
    found = allocation.allocate(many, budget)
    assert 0.998 * budget <= found.n_bytes <= budget
    assert found == allocation.allocate(many, budget)


def test_more_bytes_never_lose_more() -> None:
    many = items(40, 12, 5)
    low, high = allocation.smallest(many), allocation.largest(many)
    losses = [allocation.allocate(many, low + (high - low) * step // 50).loss for step in range(51)]
    assert all(after <= before * 1.001 for before, after in itertools.pairwise(losses))


def test_a_long_step_of_one_is_paid_by_many() -> None:
    """One large tensor whose last step is worth more than all that was spent on the others before it."""
    large = Item("large", (Option("Q5_K", 5500, 2.0), Option("Q6_K", 6560, 0.5)))
    small = [Item(f"t{number}", (Option("Q4_K", 450, 0.05), Option("Q8_0", 850, 0.01))) for number in range(20)]
    found = allocation.allocate([large, *small], 6560 + 20 * 450 + 850 - 450)
    assert found.types["large"] == "Q6_K"
    assert list(found.types.values()).count("Q8_0") == 1


@pytest.mark.parametrize("share", [0.05, 0.4, 0.8])
def test_800_tensors_of_12_types_are_quick(share: float) -> None:
    """Python looks at more than a million steps per second: 5 s."""
    many = items(800, 12, 7)
    low, high = allocation.smallest(many), allocation.largest(many)
    found = allocation.allocate(many, round(low + share * (high - low)))
    assert found.looked_at < 4_000_000


def test_the_cheapest_within_a_bound() -> None:
    many = items(20, 12, 9)
    top = sum(min(one.loss for one in item.options) for item in many)
    found = allocation.cheapest(many, 3 * top)
    assert found.loss <= 3 * top
    assert allocation.allocate(many, found.n_bytes).loss <= found.loss
    assert found.n_bytes <= 1.03 * allocation.allocate(many, found.n_bytes).n_bytes
    assert allocation.cheapest(many, 0.0).loss == pytest.approx(top)
