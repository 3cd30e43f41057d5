"""Scores of a draft head at each position of a text, as llama-perplexity --mtp writes them; part of the plugin API."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from apex_build.errors import ToolFailed

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

# The tool's CSV: tools/perplexity/README.md of the patched tree
_HEADER = "pos,depth,token,trunk,head,agree,p,kld,nll"
_COLUMNS = {"pos": (0, np.int32), "depth": (1, np.int32), "token": (2, np.int32), "agree": (5, np.int32)} | {
    name: (index, np.float32) for index, name in enumerate(("p", "kld", "nll"), 6)
}


@dataclass(frozen=True, eq=False)
class Scores:
    """One element a position and depth, in the tool's order."""

    pos: Ints  # of the token in the text
    depth: Ints
    token: Ints  # of the text
    agree: Ints  # 1: the head's first choice is the trunk's
    p: Floats  # probability that the trunk gives to the head's first choice
    kld: Floats  # nats, of the head from the trunk
    nll: Floats  # nats, of `token` by the head


def read_csv(path: Path) -> Scores:
    """Raises ToolFailed if the file is not what the tool writes."""
    with path.open(encoding="ascii", errors="replace") as file:
        header = file.readline().strip()
        if header != _HEADER:
            raise ToolFailed(
                f"llama-perplexity wrote no scores of the draft head: expected '{_HEADER}', found '{header:.80}'"
            )
        try:
            table = np.loadtxt(file, delimiter=",", ndmin=2, usecols=[index for index, _ in _COLUMNS.values()])
        except ValueError as error:
            raise ToolFailed(f"llama-perplexity wrote scores of the draft head that cannot be read: {error}") from None
    return Scores(
        **{name: column.astype(kind) for (name, (_, kind)), column in zip(_COLUMNS.items(), table.T, strict=True)}
    )
