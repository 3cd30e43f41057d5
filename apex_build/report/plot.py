"""Plots: points with intervals, named series, labels that keep out of each other's way. Needs matplotlib, the extra
`report`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apex_build.storage.outputs import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import RendererBase
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

MISSING = "no plot: it needs matplotlib; pip install 'apex-build[report]'"

# Okabe and Ito's colours, which those with colour blindness can tell apart; markers differ too
_STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#56B4E9", "v"),
    ("#E69F00", "P"),
    ("#000000", "X"),
)
_DIRECTIONS = [(math.cos(math.pi / 4 * step), math.sin(math.pi / 4 * step)) for step in (2, 6, 0, 4, 1, 3, 7, 5)]
_DISTANCES = (7, 13, 20, 29, 40, 54)  # points between a label and its mark
_NEAR = 13  # a label farther off has a line to its mark
_LOG_FROM = 3.0  # x values that differ by this factor are drawn on a logarithmic axis


@dataclass(frozen=True)
class Mark:
    """A point. `y` None: it was refused, and is drawn at the bottom. Intervals are (low, high). `ring`: it is pointed
    out.

    `inner` is a second interval in y, drawn thick: the paired difference's, around the point.
    """

    x: float
    y: float | None
    label: str = ""
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    ring: bool = False
    inner: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    name: str
    marks: tuple[Mark, ...]
    joined: bool = True  # by lines, in the order of x


@dataclass(frozen=True)
class Chart:
    """`lines`: horizontal ones, (y, name). `ring` and `inner` say in the legend what those are. `log_x` None: where it
    helps.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    lines: tuple[tuple[float, str], ...] = ()
    ring: str = ""
    inner: str = ""
    log_x: bool | None = None


def available() -> bool:
    """Whether matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw(chart: Chart, *outs: Path) -> None:
    """Write the chart to files, of the formats that their names end in (.png, .svg). The same chart gives the same
    bytes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "apex", "font.size": 9}):
        figure = Figure(figsize=(9, 5.6), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        _draw(chart, figure, axes)
        for out in outs:
            kind = out.suffix.removeprefix(".")
            with whole_file(out) as part:
                figure.savefig(part, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})


def _draw(chart: Chart, figure: Figure, axes: Axes) -> None:
    marks = [mark for series in chart.series for mark in series.marks]
    _axis(chart, axes, [mark.x for mark in marks])
    colors = {}
    for series, (color, marker) in zip(chart.series, itertools.cycle(_STYLES), strict=False):
        colors[series.name] = color
        _series(series, axes, color, marker)
    if chart.inner and any(mark.inner for mark in marks):
        axes.plot([], [], color="#888888", linewidth=5, alpha=0.6, label=chart.inner)
    for y, name in chart.lines:
        axes.axhline(y, color="#666666", linewidth=0.9, linestyle=(0, (4, 3)), label=name, zorder=1)
    axes.margins(0.08, 0.12)
    _refused(chart, axes, colors)
    ringed = [(mark.x, mark.y) for mark in marks if mark.ring and mark.y is not None]
    if ringed:
        xs, ys = zip(*ringed, strict=True)
        axes.scatter(
            xs, ys, s=220, facecolors="none", edgecolors="black", linewidths=1.4, label=chart.ring or None, zorder=6
        )
    axes.set_title(chart.title)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        handles, names = axes.get_legend_handles_labels()
        first = [series.name for series in chart.series]
        order = sorted(range(len(names)), key=lambda at: first.index(names[at]) if names[at] in first else len(first))
        axes.legend([handles[at] for at in order], [names[at] for at in order], loc="best", framealpha=0.9)
    figure.draw_without_rendering()  # lays the axes out, so that places in pixels are the final ones
    _labels(chart, figure, axes, colors)


def _axis(chart: Chart, axes: Axes, xs: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = bool(xs) and min(xs) > 0
    if chart.log_x or (chart.log_x is None and positive and max(xs) / min(xs) > _LOG_FROM):
        axes.set_xscale("log")
        many = max(xs) / min(xs) > 50
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if many else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


def _series(series: Series, axes: Axes, color: str, marker: str) -> None:
    drawn = sorted(((mark, mark.y) for mark in series.marks if mark.y is not None), key=lambda pair: pair[0].x)
    if not drawn:
        return
    axes.errorbar(
        [mark.x for mark, _ in drawn],
        [y for _, y in drawn],
        xerr=_bars([(mark.x, mark.x_interval) for mark, _ in drawn]),
        yerr=_bars([(y, mark.y_interval) for mark, y in drawn]),
        color=color,
        marker=marker,
        markersize=6,
        linestyle="-" if series.joined else "none",
        linewidth=1.2,
        elinewidth=1.0,
        capsize=3,
        label=series.name,
        zorder=4,
    )

    inner = [(mark.x, *mark.inner) for mark, _ in drawn if mark.inner]
    if inner:
        axes.vlines(*zip(*inner, strict=True), color=color, linewidth=5, alpha=0.45, zorder=3)


def _bars(intervals: Sequence[tuple[float, tuple[float, float] | None]]) -> list[list[float]] | None:
    """matplotlib's form: distances down and up. An interval that does not hold its value has a bar on one side."""
    if not any(interval for _, interval in intervals):
        return None
    bounds = [(value, interval or (value, value)) for value, interval in intervals]
    return [
        [max(0.0, value - low) for value, (low, _) in bounds],
        [max(0.0, high - value) for value, (_, high) in bounds],
    ]


def _refused(chart: Chart, axes: Axes, colors: dict[str, str]) -> None:
    """Crosses along the bottom, below all that was measured."""
    if not any(mark.y is None for series in chart.series for mark in series.marks):
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.08 * (high - low), high)
    at = low - 0.03 * (high - low)
    for series in chart.series:
        xs = [mark.x for mark in series.marks if mark.y is None]
        if xs:
            axes.plot(
                xs, [at] * len(xs), linestyle="none", marker="x", markersize=7, markeredgewidth=1.8,
                color=colors[series.name],
                label=f"refused, {series.name}", zorder=5,
            )  # fmt: skip


def _labels(chart: Chart, figure: Figure, axes: Axes, colors: dict[str, str]) -> None:
    """Put each label where it covers least: near its mark, away from marks, bars, lines, legend and other labels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    renderer: RendererBase = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    scale = figure.dpi / 72
    low, high = axes.get_ylim()
    at_bottom = low + (high - low) * 0.05 / 1.08
    obstacles = _obstacles(chart, axes, at_bottom, scale)
    if legend := axes.get_legend():
        obstacles.append(legend.get_window_extent(renderer))
    frame = axes.get_window_extent(renderer)
    labels: list[Bbox] = []
    wanted = [(mark, colors[series.name]) for series in chart.series for mark in series.marks if mark.label]
    for mark, color in sorted(wanted, key=lambda pair: not pair[0].ring):
        x, y = axes.transData.transform((mark.x, at_bottom if mark.y is None else mark.y))
        weight = "bold" if mark.ring else "normal"
        text = axes.annotate(
            mark.label, (x, y), xycoords="figure pixels", fontsize=8, fontweight=weight, color=color, zorder=7
        )
        size = text.get_window_extent(renderer)
        boxes = []
        for distance, (right, up) in itertools.product(_DISTANCES, _DIRECTIONS):
            gap = (distance + 4 * mark.ring) * scale
            left = x + right * gap - (size.width * (1 - right) / 2)
            bottom = y + up * gap - (size.height * (1 - up) / 2)
            box = Bbox.from_bounds(left, bottom, size.width, size.height)
            leader = (
                _along((x, y), ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2), 5 * scale)[2:-2]
                if distance > _NEAR
                else []
            )
            crossed = sum(label.contains(*point) for point in leader for label in labels)
            boxes.append(
                (_cost(box, obstacles + labels, frame) + (distance * 2 + crossed * 40) * scale, distance, box, leader)
            )
        _, distance, box, leader = min(boxes, key=lambda one: one[0])
        text.remove()
        labels.append(box)
        obstacles += [Bbox.from_extents(px - scale, py - scale, px + scale, py + scale) for px, py in leader]
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.7, "shrinkA": 0, "shrinkB": 4}
        placed = axes.annotate(
            mark.label, (mark.x, at_bottom if mark.y is None else mark.y), xycoords="data",
            xytext=((box.x0 + box.width / 2 - x) / scale, (box.y0 + box.height / 2 - y) / scale),
            textcoords="offset points",
            ha="center", va="center", fontsize=8, fontweight=weight, color=color, zorder=7,
            arrowprops=arrow if distance > _NEAR else None,
        )  # fmt: skip
        placed.set_in_layout(False)  # otherwise the axes would move again


def _obstacles(chart: Chart, axes: Axes, at_bottom: float, scale: float) -> list[Bbox]:
    """Boxes, in pixels, over all that is drawn."""
    from matplotlib.transforms import Bbox

    boxes = []
    for series in chart.series:
        points = []
        for mark in sorted(series.marks, key=lambda mark: mark.x):
            y = at_bottom if mark.y is None else mark.y
            x0, y0 = axes.transData.transform((mark.x, y))
            radius = (8 if mark.ring else 4) * scale
            boxes.append(Bbox.from_extents(x0 - radius, y0 - radius, x0 + radius, y0 + radius))
            if mark.y is not None:
                points.append((x0, y0))
            for interval, along_y in ((mark.y_interval, True), (mark.x_interval, False)):
                if interval and mark.y is not None:
                    ends = [axes.transData.transform((mark.x, end) if along_y else (end, y)) for end in interval]
                    thin = 2 * scale
                    boxes.append(
                        Bbox.from_extents(ends[0][0] - thin, ends[0][1] - thin, ends[1][0] + thin, ends[1][1] + thin)
                    )
        for (x0, y0), (x1, y1) in itertools.pairwise(points) if series.joined else ():
            for x, y in _along((x0, y0), (x1, y1), 5 * scale):
                boxes.append(Bbox.from_extents(x - scale, y - scale, x + scale, y + scale))
    return boxes


def _along(start: tuple[float, float], end: tuple[float, float], every: float) -> list[tuple[float, float]]:
    """Points on the line between two, without the two."""
    steps = max(1, int(math.dist(start, end) / every))
    x, y = ((end[axis] - start[axis]) / steps for axis in (0, 1))
    return [(start[0] + x * step, start[1] + y * step) for step in range(1, steps)]


def _cost(box: Bbox, obstacles: Sequence[Bbox], frame: Bbox) -> float:
    """Pixels covered, and many more for each outside the axes."""
    covered = 0.0
    for other in obstacles:
        width = min(box.x1, other.x1) - max(box.x0, other.x0)
        height = min(box.y1, other.y1) - max(box.y0, other.y0)
        if width > 0 and height > 0:
            covered += width * height + 20
    outside: float = (
        max(0.0, frame.x0 - box.x0)
        + max(0.0, box.x1 - frame.x1)
        + max(0.0, frame.y0 - box.y0)
        + max(0.0, box.y1 - frame.y1)
    )
    return covered + 100 * outside
