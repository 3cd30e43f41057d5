"""Plots: files that open, the same bytes each time, labels that do not overlap each other or the marks."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import pytest
from matplotlib.backend_bases import RendererBase

from apex_build.report.plot import Chart, Mark, Series, available, draw

pytest.importorskip("matplotlib")

SIZES = {
    "Q8_0": 2.31, "Q6_K": 1.79, "Q5_K": 1.5, "Q4_K": 1.23, "IQ4_XS": 1.16, "Q3_K": 0.94,
    "IQ3_XXS": 0.84, "Q2_K": 0.72, "IQ2_S": 0.71, "IQ2_XXS": 0.57, "IQ1_M": 0.49,
}  # fmt: skip
REFUSED = ("IQ3_XXS", "IQ2_S", "IQ2_XXS", "IQ1_M")


def series(name: str, drop: float, refused: tuple[str, ...] = ()) -> Series:
    marks = []
    for label, x in SIZES.items():
        y = None if label in refused else 73.3 - drop / x**3
        marks.append(Mark(x, y, label, y_interval=(y - 0.3, y + 0.3) if y else None, ring=label == "IQ2_XXS"))
    return Series(name, tuple(marks))


CHART = Chart(
    "testbed: depth1.agreement, n = 63,232", "bytes of the draft head (MB)", "depth1.agreement (%)",
    (series("with head data", 0.2), series("without head data", 0.3, REFUSED)), ((72.8, "Q8_0 less 0.5 points"),),
    "knee",
)  # fmt: skip


@pytest.mark.slow
def test_png_and_svg(tmp_path: Path) -> None:
    assert available()
    draw(CHART, tmp_path / "a.png", tmp_path / "a.svg")
    png = (tmp_path / "a.png").read_bytes()
    assert png.startswith(b"\x89PNG") and struct.unpack(">II", png[16:24]) == (1350, 840)
    svg = (tmp_path / "a.svg").read_text()
    for said in ("63,232", "bytes of the draft head (MB)", "refused, without head data", "IQ2_XXS", "knee"):
        assert said in svg
    draw(CHART, tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_text() == svg
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a.svg", "b.svg"}


def test_labels_keep_apart(tmp_path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

    from apex_build.report import plot

    figure = Figure(figsize=(9, 5.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    plot._draw(CHART, figure, axes)
    renderer: RendererBase = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    assert len(labels) == 2 * len(SIZES)
    boxes = [(text.get_text(), text.get_window_extent(renderer).shrunk(0.9, 0.8)) for text in labels]
    overlapping = [
        (one, other) for (one, box), (other, second) in itertools.combinations(boxes, 2) if box.overlaps(second)
    ]
    assert not overlapping


@pytest.mark.parametrize(
    "chart",
    [
        Chart(
            "chunks", "chunks of text", "agreement (%)",
            (Series("all", tuple(Mark(n, 70 + n / 99) for n in (5, 25, 50, 200))),),
        ),
        Chart(
            "both intervals", "agreement (%)", "acceptance (%)",
            (Series("types", (Mark(70, 60, "Q2_K", (69, 71), (58, 63)),
                              Mark(73, 64, "Q8_0", (72, 74), (63, 66))), joined=False),),
        ),
        Chart("all refused", "MB", "score", (Series("none", (Mark(1.0, None, "IQ1_M"),)),)),
        Chart("nothing", "MB", "score", ()),
        Chart("one | $odd$ name", "MB", "score", (Series("_x", (Mark(0.0, 0.0, "a_b$c", y_interval=(0.1, 0.2)),)),)),
    ],
    ids=lambda chart: chart.title,
)  # fmt: skip
def test_other_charts(chart: Chart, tmp_path: Path) -> None:
    draw(chart, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000
