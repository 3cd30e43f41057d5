"""The scores that llama-perplexity prints, from its real output (tests/native/captured)."""

from __future__ import annotations

import math
from pathlib import Path

from apex_build.native import scores

CAPTURED = Path(__file__).parent / "captured"


def captured(name: str) -> list[str]:
    return (CAPTURED / f"{name}.txt").read_text(encoding="utf-8").split("\n")


def test_perplexity_after_each_chunk() -> None:
    found = scores.running_perplexities(captured("perplexity"))
    assert [number for number, _ in found] == list(range(1, 13)) and found[-1][1] == 2135.1334
    assert scores.running_perplexities(["[1]nan,[2]inf,"])[1] == (2, math.inf)


def test_divergence() -> None:
    lines = captured("kl-divergence")
    rows = scores.divergence_rows(lines)
    assert [row[0] for row in rows] == [1, 2, 3, 4] and {len(row) for row in rows} == {11}
    for name in ("Mean KLD", "Median KLD", "99.9% KLD", "Maximum KLD", "Same top p"):
        assert scores.divergence_statistic(lines, name), name
    mean, median = (scores.divergence_statistic(lines, name) for name in ("Mean KLD", "Median KLD"))
    assert mean and median and mean[1] > 0 and math.isnan(median[1]), "only the mean has an error"
    assert scores.divergence_statistic(lines, "Mean") is None
    assert not scores.vocabulary_differs(lines)
    assert scores.vocabulary_differs(["kl_divergence: inconsistent vocabulary (2046 vs 2048)"])


def test_tasks() -> None:
    lines = ["task\tacc_norm", "1\t100.00000000", "2\t50.0000%\t[9.5, 90.5]", "", "not 3\t1.0"]
    assert scores.tasks_scored(lines) == (2, 50.0) and scores.tasks_scored([]) == (0, 0.0)
    assert scores.logged_error(["0.00.1 I all is well", "0.00.2 E the task does not fit in the context"]) == (
        "the task does not fit in the context"
    )
    assert scores.logged_error(["I"]) is None


def test_a_text_that_is_too_short() -> None:
    needed = scores.text_too_short(captured("text-too-short"))
    assert needed and needed[0] > (needed[1] or 0) > 0
    assert scores.text_too_short(["you need at least 512 tokens"]) == (512, None)
    assert scores.text_too_short(captured("perplexity")) is None
