"""An imatrix as if the draft head had not been run: the same file without the head's entries."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np

from apex_build.errors import ImatrixInvalid
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.imatrix import HEAD_ROWS, HEAD_TOKENS, read_imatrix
from apex_build.storage.outputs import whole_file

_BLOCK = re.compile(r"blk\.(\d+)\.")


def holds_head(name: str, model: Model) -> bool:
    """Whether an entry of this name is data of the model's draft head."""
    weight = name.removesuffix(".in_sum2").removesuffix(".counts")
    known = next((tensor for tensor in model.tensors if tensor.name == weight), None)
    if known is not None:
        return known.draft_head
    found = _BLOCK.match(name)
    return found is not None and int(found[1]) >= model.trunk_layers


def write_without_head(imatrix: Path, model: Model, out: Path) -> None:
    """Write `imatrix` to `out`, without the draft head's entries and metadata.

    The values of the others are copied bit for bit; the same input gives the same file. Raises ImatrixInvalid, also
    for the older format.
    """
    if read_imatrix(imatrix).format != "gguf":
        raise ImatrixInvalid(
            f"{imatrix}: the head's entries can only be left out of an imatrix in GGUF, and this is in the format "
            "before it",
            hint="apex calibrate MODEL; or give --imatrix-without-head",
        )
    reader = gguf.GGUFReader(imatrix)
    with whole_file(out) as part:
        writer = gguf.GGUFWriter(part, "")
        for name, field in reader.fields.items():
            if name.startswith("GGUF.") or name in (HEAD_TOKENS, HEAD_ROWS, "general.architecture"):
                continue
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=field.types[-1] if array else None)
        for tensor in reader.tensors:
            if not holds_head(tensor.name, model):
                writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
