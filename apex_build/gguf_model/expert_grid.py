"""The tokens that each expert of each layer saw, as a grid: what a heat map shows."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from apex_build.gguf_model.imatrix import Imatrix

_BLOCK = re.compile(r"^blk\.(\d+)\..*_exps\.weight$")


@dataclass(frozen=True)
class ExpertGrid:
    """`tokens` [layers, experts]; NaN where a layer has fewer experts than another."""

    layers: tuple[int, ...]
    head: frozenset[int]  # layers of the draft head, if known
    tokens: npt.NDArray[np.float64]

    @property
    def even(self) -> npt.NDArray[np.float64]:
        """Each layer's even share of its tokens."""
        share: npt.NDArray[np.float64] = np.nanmean(self.tokens, axis=1)
        return share


def expert_grid(imatrix: Imatrix, head: Collection[int] = ()) -> ExpertGrid | None:
    """None for an imatrix without a count for each expert: of a dense model, or of the older format."""
    rows: dict[int, list[npt.NDArray[np.float64]]] = {}
    for name, entry in imatrix.entries.items():
        if (block := _BLOCK.match(name)) and len(entry.counts) > 1:
            rows.setdefault(int(block[1]), []).append(np.array(entry.counts))
    if not rows:
        return None
    widest = max(len(each) for some in rows.values() for each in some)
    layers = tuple(sorted(rows))
    tokens = np.full((len(layers), widest), np.nan)
    for number, layer in enumerate(layers):
        longest = max(map(len, rows[layer]))
        tokens[number, :longest] = np.min([each for each in rows[layer] if len(each) == longest], axis=0)
    return ExpertGrid(layers, frozenset(head) & set(layers), tokens)
