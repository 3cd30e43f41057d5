"""Losses, knees, and the table of a sweep, from rows like a sweep's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from apex_build.errors import EvaluationRefused
from apex_build.hookspecs import Figure
from apex_build.sweep.knee import find_knees
from apex_build.sweep.loss import Loss, loss_of
from apex_build.sweep.report import check_scores, default_score, report_sweep
from apex_build.sweep.rows import Row, read_rows, results_of, write_rows
from apex_build.sweep.table import markdown

SCORE = "depth1.agreement"


def row(
    kind: str,
    size: int,
    score: float,
    loss: tuple[float, float | None, float | None],
    *,
    head_data: bool = True,
    baseline: bool = False,
) -> Row:
    low, high = (None if bound is None else -bound for bound in (loss[2], loss[1]))
    figures = (
        Figure(
            SCORE,
            score,
            score - 0.4,
            score + 0.4,
            "%",
            10_000,
            better="higher",
            paired=f"{SCORE}.difference",
            label="it",
            plot=True,
        ),
        Figure(SCORE, score + 1, unit="%", domain="chat"),
        Figure(f"{SCORE}.difference", -loss[0], low, high, "points", 10_000),
        Figure("depth1.kld", 0.2, 0.1, 0.3, "nats", better="lower", paired="depth1.kld.difference"),
        Figure("depth1.kld.difference", 0.02, 0.01, 0.03, "nats"),
        Figure("kld.mean", 0.05, 0.04, 0.06, "nats", better="lower", paired="kld.mean"),
    )
    name = f"{kind}{head_data}"
    return Row(
        name,
        {"draft_head": kind},
        head_data,
        baseline,
        size,
        10_000_000,
        size + 10_001_000,
        figures={"draft-head": figures},
        measured="now",
    )


ROWS = [
    row("Q8_0", 2_313_000, 73.3, (0.0, 0.0, 0.0), baseline=True),
    row("Q4_K", 1_231_000, 73.2, (0.1, -0.1, 0.3)),
    row("Q3_K", 944_000, 72.7, (0.6, 0.4, 0.8)),
    row("IQ3_XXS", 843_000, 73.0, (0.3, 0.2, 0.45)),
    row("IQ2_XXS", 572_000, 72.9, (0.4, 0.1, 0.7)),
    row("Q4_K", 1_231_000, 72.0, (1.3, 1.0, 1.6), head_data=False),
    Row("r", {"draft_head": "IQ2_XXS"}, False, False, 572_000, 1, None, refused="no data | for it"),
]


def test_a_loss_is_positive_where_the_file_is_worse() -> None:
    assert loss_of(ROWS[3], SCORE) == Loss(0.3, 0.2, 0.45)
    assert loss_of(ROWS[3], "depth1.kld") == Loss(0.02, 0.01, 0.03), "lower is better"
    assert loss_of(ROWS[3], "kld.mean") == Loss(0.05, 0.04, 0.06), "a divergence from the reference is a loss"
    assert loss_of(ROWS[3], "depth2.agreement") is None and loss_of(ROWS[-1], SCORE) is None


def test_the_knee_by_the_estimate_and_by_the_interval() -> None:
    with_data, without = find_knees(ROWS, SCORE, 0.5, by_head=True)
    assert with_data.smallest == ROWS[4] and with_data.firm == ROWS[3]
    assert without.smallest is None
    text = "\n".join(report_sweep(ROWS, SCORE, "testbed", by_head=True).knees)
    assert (
        "smallest head that loses less than 0.5 points of depth1.agreement is IQ2_XXS (0.572 MB, loss 0.40 [0.10, "
        "0.70])" in text
    )
    assert (
        "but its interval reaches beyond the bound; the smallest head whose whole interval is under the bound is "
        "IQ3_XXS" in text
    )
    assert "without head data: nothing loses less than 0.5 points" in text
    (firm,) = report_sweep(ROWS[:4], SCORE, "testbed", by_head=True).knees
    assert firm.endswith("and its whole interval is under the bound")
    (vague,) = report_sweep([ROWS[0], row("Q2_K", 1, 73.0, (0.1, None, None))], SCORE, "testbed", by_head=True).knees
    assert vague.endswith("too little text for an interval")


@pytest.mark.parametrize("name", ["wer", "nll", "loss", "latency", "depth1.kld"])
def test_which_direction_is_better_is_what_the_figure_says(name: str) -> None:
    """Whatever its name: words in a name mean nothing."""

    def rows(better: Literal["", "lower", "higher"]) -> list[Row]:
        def figures(value: float, change: float) -> dict[str, tuple[Figure, ...]]:
            paired = Figure(f"{name}.difference", change, change - 0.1, change + 0.1, "points")
            return {"mine": (Figure(name, value, unit="%", better=better, paired=paired.name), paired)}

        worse = replace(ROWS[1], figures=figures(30.0, 10.0))
        return [replace(ROWS[0], figures=figures(20.0, 0.0)), worse]

    assert loss_of(rows("lower")[1], name) == Loss(10.0, 9.9, 10.1)
    assert loss_of(rows("higher")[1], name) == Loss(-10.0, -10.1, -9.9)
    assert "is Q8_0" in report_sweep(rows("lower"), name, "testbed", by_head=True).knees[0], "higher is worse: no gain"
    assert "is Q4_K" in report_sweep(rows("higher"), name, "testbed", by_head=True).knees[0]
    assert loss_of(rows("")[1], name) is None
    (text,) = report_sweep(rows(""), name, "testbed", by_head=True).knees
    assert text == f"no knee of {name}: the evaluator does not say whether lower or higher is better"


def test_rows_from_before_figures_said_so_are_measured_again(tmp_path: Path) -> None:
    write_rows(results_of(tmp_path, {}), ROWS[:2])
    path = tmp_path / "sweep.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for figure in lines[0]["figures"]["draft-head"]:
        del figure["better"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(read_rows(tmp_path)) == [ROWS[1].identity]


def test_no_knee_without_a_bound_that_has_a_meaning() -> None:
    assert report_sweep(ROWS, "depth1.kld", "testbed", by_head=True).knees == ()
    assert len(report_sweep(ROWS, "depth1.kld", "testbed", by_head=True, bound=0.05).knees) == 2


def test_the_table() -> None:
    report = report_sweep(ROWS, SCORE, "testbed", by_head=True, counted="positions")
    table = report.table
    assert table.title == "testbed: depth1.agreement, n = 10,000 positions"
    assert table.columns[:3] == ("draft_head", "head", "depth1.agreement, with head data (%)")
    cells = {line[0]: line[1:] for line in table.rows}
    assert cells["Q8_0"] == ("2.313 MB", "73.30 [72.90, 73.70]", "baseline", "", "")
    assert cells["Q4_K"] == (
        "1.231 MB",
        "73.20 [72.80, 73.60]",
        "0.10 [-0.10, 0.30]",
        "72.00 [71.60, 72.40]",
        "1.30 [1.00, 1.60]",
    )
    assert cells["IQ2_XXS"][-2:] == ("refused", "")
    assert table.notes == (
        "compared with draft_head=Q8_0, with head data, on the same positions; intervals are of 95 %",
        "refused, without head data: IQ2_XXS. Of the first: no data | for it",
    )
    lines = markdown(table).splitlines()
    assert lines[3] == "|---|---:|---:|---:|---:|---:|"
    assert all(line.count(" | ") == 5 for line in lines if line.startswith("| ")) and "no data \\| for it" in lines[-1]


def test_one_curve_of_whole_files() -> None:
    report = report_sweep(ROWS[:5], "kld.mean", "testbed", by_head=False, bound=0.055, reference="F16.gguf")
    assert report.table.columns == ("draft_head", "file", "kld.mean (nats)"), "the divergence is the loss"
    assert report.table.notes == (
        "compared with draft_head=Q8_0, with head data, on the same positions; intervals are of 95 %",
    )
    (text,) = report.knees
    assert text.startswith("the smallest file that loses less than 0.055 nats of kld.mean is IQ2_XXS (10.573 MB")
    assert report.chart is not None and [line for line, _ in report.chart.lines] == [pytest.approx(0.105)], (
        "more is worse"
    )


def test_the_chart_points_out_the_knees() -> None:
    chart = report_sweep(ROWS, SCORE, "testbed", by_head=True).chart
    assert chart is not None
    assert [(mark.label, mark.ring) for series in chart.series for mark in series.marks if mark.ring] == [
        ("IQ2_XXS", True)
    ]
    assert chart.lines == ((72.8, "Q8_0 less 0.5 points"),)
    assert [mark.y for mark in chart.series[1].marks] == [72.0, None]
    assert [mark.inner for mark in chart.series[0].marks][:2] == [None, pytest.approx((73.0, 73.4))], (
        "paired, about the score"
    )


def test_scores_that_were_not_measured() -> None:
    assert default_score(ROWS) == SCORE and default_score([ROWS[-1]]) == "score"
    check_scores(ROWS, [SCORE, "depth1.kld"])
    check_scores([ROWS[-1]], ["whatever"])  # nothing measured yet: nothing known
    with pytest.raises(EvaluationRefused, match=r"--score depth9\.agreement: .* There are: depth1\.agreement"):
        check_scores(ROWS, ["depth9.agreement"])


def test_rows_come_back_whatever_a_note_holds(tmp_path: Path) -> None:
    """JSON allows unescaped line breaks other than the line feed in strings."""
    odd = replace(ROWS[0], figures={"mine": (Figure("score", 1.0, note="two\u2028lines\x85and more"),)})
    write_rows(results_of(tmp_path, {}), [odd, ROWS[1]])
    assert read_rows(tmp_path) == {row.identity: row for row in (odd, ROWS[1])}
