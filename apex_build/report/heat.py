"""A heat map of an imatrix as PNG or SVG: layers down, experts across. Needs matplotlib, the extra `report`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from apex_build.gguf_model.expert_grid import ExpertGrid
from apex_build.storage.outputs import whole_file

_NONE = "#D55E00"  # an expert without a token


def draw_heat(grid: ExpertGrid, title: str, *outs: Path) -> None:
    """Write it to files, of the formats that their names end in. The same grid gives the same bytes.

    The colour is an expert's share of the even one, on a logarithmic scale; experts without a token stand out.
    """
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    layers, experts = grid.tokens.shape
    share = grid.tokens / np.where(grid.even > 0, grid.even, 1)[:, None]
    shown = np.ma.masked_where(~(share > 0), share)
    with matplotlib.rc_context({"svg.hashsalt": "apex", "font.size": 9}):
        height = min(14.0, max(3.2, 1.6 + 0.16 * layers))
        figure = Figure(figsize=(9, height), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        colors = matplotlib.colormaps["viridis"].with_extremes(bad=_NONE)
        image = axes.imshow(
            shown, aspect="auto", interpolation="nearest", cmap=colors, norm=LogNorm(0.01, 10, clip=True)
        )
        bar = figure.colorbar(image, ax=axes, extend="both", extendfrac=0.03, pad=0.015)
        bar.set_label("tokens / even share")
        bar.set_ticks([0.01, 0.1, 1, 10], labels=["1 %", "10 %", "even", "10 times"])
        step = max(1, round(layers / 24))
        ticks = sorted({*range(0, layers, step), *(grid.layers.index(layer) for layer in grid.head)})
        axes.set_yticks(
            ticks, [f"head {grid.layers[at]}" if grid.layers[at] in grid.head else str(grid.layers[at]) for at in ticks]
        )
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        axes.set_title(title, fontsize=10)
        if (without := int((grid.tokens == 0).sum())) > 0:
            patch = Patch(color=_NONE, label=f"no token: {without} of {layers * experts}")
            figure.legend(handles=[patch], loc="outside lower right", frameon=False)
        for out in outs:
            kind = out.suffix.removeprefix(".")
            with whole_file(out) as part:
                figure.savefig(part, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
