"""The data of a model's tensors, mapped from its files as rows of bytes."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from apex_build.gguf_model.header import Header


@dataclass(frozen=True)
class TensorRows:
    """A tensor's data as rows of bytes."""

    type: str
    rows: npt.NDArray[np.uint8]


@contextmanager
def mapped_rows(headers: Sequence[Header]) -> Iterator[dict[str, TensorRows]]:
    """Tensor name -> its rows, which are only read on access."""
    found = {}
    with ExitStack() as stack:
        for header in headers:
            file = stack.enter_context(header.path.open("rb"))
            # not closed explicitly: it is freed with the last array that refers to it
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            view = np.frombuffer(data, dtype=np.uint8)
            for tensor in header.tensors:
                start = header.data_offset + tensor.offset
                rows = math.prod(tensor.shape[1:])
                found[tensor.name] = TensorRows(tensor.type, view[start : start + tensor.n_bytes].reshape(rows, -1))
        yield found
