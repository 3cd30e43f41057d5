"""A heat map for the terminal: layers down, experts across, within 80 columns."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from apex_build.gguf_model.expert_grid import ExpertGrid

_WIDTH = 80
# up to which part of a layer's even share; the last one is for all above
_SHADES = ((0.0, "×"), (0.01, "."), (0.25, "░"), (1.0, "▒"), (4.0, "▓"), (math.inf, "█"))
LEGEND = "× none  . under 1 %  ░ under 25 %  ▒ under even share  ▓ under 4 times  █ more"


def lines(grid: ExpertGrid) -> Iterator[str]:
    """A line for each layer, with the least and the most that one of its experts saw. Where there are more experts
    than columns, each place shows the least seen of several.
    """
    experts = grid.tokens.shape[1]
    label = max(len(_label(grid, layer)) for layer in grid.layers)
    most = int(np.nanmax(grid.tokens))
    beside = 2 * len(str(most)) + 3
    each = max(1, math.ceil(experts / (_WIDTH - label - beside - 2)))
    yield f"tokens of experts 0 to {experts - 1} by layer; the least and the most at the right"
    if each > 1:
        yield f"each place is the least seen of {each} experts"
    for number, layer in enumerate(grid.layers):
        tokens = grid.tokens[number]
        tokens = tokens[~np.isnan(tokens)]
        places = "".join(
            _shade(float(tokens[at : at + each].min()) / float(grid.even[number] or 1))
            for at in range(0, len(tokens), each)
        )
        ends = f"{tokens.min():.0f} - {tokens.max():.0f}"
        yield f"{_label(grid, layer):>{label}} {places} {ends:>{beside}}"
    yield LEGEND


def _label(grid: ExpertGrid, layer: int) -> str:
    return f"head {layer}" if layer in grid.head else str(layer)


def _shade(share: float) -> str:
    if share == 0:
        return _SHADES[0][1]
    return next(sign for bound, sign in _SHADES[1:] if share < bound)
