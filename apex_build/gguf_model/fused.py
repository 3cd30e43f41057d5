"""Share calibration data between fused and separate experts: gate and up read the same inputs, so data for one is
data for the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.imatrix import Entry, Imatrix

_NAME = re.compile(r"^(blk\.\d+\.)(ffn_(?:gate|up|gate_up)_exps|ffn_(?:gate|up|down)\.(\d+))\.weight$")
_SAME_INPUTS = ("ffn_gate_up_exps", "ffn_gate_exps", "ffn_up_exps")


def crossed(imatrix: Imatrix, model: Model) -> tuple[Imatrix, tuple[str, ...]]:
    """The imatrix, with entries added for expert tensors whose data it has under another name; and the names of
    those.
    """
    added = {}
    for tensor in model.tensors:
        if tensor.name in imatrix.entries or not (found := _NAME.match(tensor.name)):
            continue
        for name, expert in _others(found):
            entry = imatrix.entries.get(name)
            if entry is not None and (own := _own(entry, tensor.name, expert)) and own.row_length == tensor.shape[0]:
                added[tensor.name] = own
                break
    if not added:
        return imatrix, ()
    return replace(imatrix, entries={**imatrix.entries, **added}), tuple(added)


def _others(found: re.Match[str]) -> Iterator[tuple[str, int | None]]:
    block, part, expert = found.groups()
    if expert is None:
        yield from ((f"{block}{other}.weight", None) for other in _SAME_INPUTS if other != part)
        return
    kind = part.partition(".")[0]  # one matrix for each expert: Mixtral files from before 2024
    yield f"{block}{kind}_exps.weight", int(expert)
    if kind != "ffn_down":
        yield from ((f"{block}{other}.weight", int(expert)) for other in _SAME_INPUTS)


def _own(entry: Entry, name: str, expert: int | None) -> Entry | None:
    if expert is None:
        return replace(entry, name=name)
    if expert >= len(entry.counts):  # or a legacy file, which does not record experts separately
        return None
    offset = entry.offset + 4 * entry.row_length * expert
    return replace(entry, name=name, counts=(entry.counts[expert],), offset=offset)
