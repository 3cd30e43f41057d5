"""A calibration's folder and disk: the space it needs, and whether the tool wrote a complete file."""

from __future__ import annotations

import math
from pathlib import Path

from apex_build.errors import DiskTooSmall, ImatrixInvalid, ToolFailed
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.imatrix import Imatrix, read_imatrix
from apex_build.storage.disk import ROOM, amount, check_room, free_bytes
from apex_build.storage.outputs import LOG, beside
from apex_build.storage.work import files_in

COPIES = 4  # of the imatrix, on the disk together


def imatrix_bytes(model: Model) -> int:
    """The approximate size of the model's imatrix, rather too high: 4 bytes for each column of each matrix, names,
    counts.
    """
    weights = [tensor for tensor in model.tensors if len(tensor.shape) > 1]
    return sum(4 * (tensor.shape[0] + 1) * math.prod(tensor.shape[2:]) + 512 for tensor in weights)


def check_disk(work: Path, model: Model, more: int = 0) -> None:
    """Up to three snapshots exist at once, besides the last one, and `more` bytes; what an earlier run left is
    subtracted.
    """
    there = sum(path.stat().st_size for path in files_in(work))
    needed = COPIES * imatrix_bytes(model) + more
    what = f"the imatrix of {model.path.name}, with its periodic copies,"
    check_room(work.parent, max(0, needed - there), what, spare=min(ROOM, needed))


def written(partial: Path, out: Path, model: Model) -> Imatrix:
    """What the tool wrote: it exits with code 0 even if the disk was full. Raises DiskTooSmall, ToolFailed."""
    try:
        return read_imatrix(partial)
    except ImatrixInvalid as error:
        free = free_bytes(partial.parent)
        size = partial.stat().st_size if partial.exists() else 0
        said = (
            f"llama-imatrix ended with code 0, but wrote {size} bytes of its imatrix, expected about "
            f"{imatrix_bytes(model)}"
        )
        if free < imatrix_bytes(model):
            raise DiskTooSmall(
                f"{out}: {said}: {amount(free)} are free in {out.parent}",
                hint="free some space, then run the same command again: it resumes from the last periodic copy",
            ) from None
        raise ToolFailed(f"{out}: {said}: {error.message}\n  all of its output: {beside(out, LOG)}") from None
