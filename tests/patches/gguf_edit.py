"""Variants of the testbed, written with gguf-py."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

HEAD = "blk.6."


def copy(source: Path, out: Path, *, keys: dict[str, int | None], drop: str = "", add: dict[str, str] | None = None) -> Path:
    """Copy a model; `keys`: metadata to change, or None to leave out; `drop`: prefix of tensors left out; `add`: new from old."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, "qwen35moe")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or keys.get(name, 0) is None:
            continue
        kind = field.types[0]
        value = keys.get(name, field.contents())
        writer.add_key_value(name, value, kind, sub_type=field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in tensors.items():
        if not drop or not name.startswith(drop):
            writer.add_tensor(name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for name, old in (add or {}).items():
        writer.add_tensor(name, np.array(tensors[old].data), raw_dtype=tensors[old].tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def without_head(source: Path, out: Path) -> Path:
    return copy(source, out, keys={"qwen35moe.nextn_predict_layers": None, "qwen35moe.block_count": 6}, drop=HEAD)


def with_own_head_output(source: Path, out: Path) -> Path:
    """The head brings an output matrix and token embeddings of its own, as some checkpoints of other families do."""
    own = {f"{HEAD}nextn.shared_head_head.weight": "output.weight", f"{HEAD}nextn.embed_tokens.weight": "token_embd.weight"}
    return copy(source, out, keys={}, add=own)
