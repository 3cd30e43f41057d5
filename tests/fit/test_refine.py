"""Exchanges near the optimum: which ones are tried and kept."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from apex_build.evaluation.probes import Probe, ProbeScore

sys.path.insert(0, str(Path(__file__).parents[2] / "plugins"))
refine: Any = importlib.import_module("fit.refine")
allocation: Any = importlib.import_module("fit.allocate")

TYPES = (("Q2_K", 2, 8.0), ("Q3_K", 3, 4.0), ("Q4_K", 4, 2.0))
ITEMS = [
    allocation.Item(name, tuple(allocation.Option(kind, 100 * n, loss * weight) for kind, n, loss in TYPES))
    for name, weight in (("a", 1.0), ("b", 1.1), ("c", 5.0))
]
NOW = {"a": "Q3_K", "b": "Q3_K", "c": "Q4_K"}


def test_the_likeliest_exchanges_are_tried_first() -> None:
    found = refine.exchanges(ITEMS, NOW, 0, 10)
    assert [one.loss for one in found] == sorted(one.loss for one in found)
    assert found[0].types == {"b": "Q4_K", "a": "Q2_K"} and found[0].n_bytes == 0
    assert len(refine.exchanges(ITEMS, NOW, 0, 2)) == 2


def score(kld: float) -> ProbeScore:
    noise = np.linspace(-0.01, 0.01, 12)
    n = np.full(12, 255)
    return ProbeScore(Probe("x"), n, n * (kld + noise * kld), n, np.zeros(12, dtype=np.int64))


def test_those_that_surely_pay_are_kept_each_tensor_once() -> None:
    some = [
        refine.Exchange({"a": "Q4_K", "b": "Q2_K"}, 0, 0.1),
        refine.Exchange({"a": "Q4_K", "c": "Q3_K"}, 0, 0.1),
        refine.Exchange({"d": "Q4_K", "e": "Q2_K"}, 50, 0.1),
        refine.Exchange({"f": "Q4_K", "g": "Q2_K"}, 0, 0.1),
    ]
    scores = [score(0.10), score(0.09), score(0.08), score(0.07), score(0.12)]
    assert refine.that_pay(some, scores, 50) == [some[2], some[1]]
    assert refine.that_pay(some, scores, 0) == [some[1]]
    assert refine.that_pay(some, [score(0.01), *scores[1:]], 50) == []
