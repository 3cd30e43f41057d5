"""Variants of the testbed and of imatrices, written with gguf-py."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

HEAD = "blk.6."


def copy(
    source: Path,
    out: Path,
    *,
    keys: Mapping[str, int | str | None],
    drop: str = "",
    add: Mapping[str, str] | None = None,
    new: Mapping[str, int] | None = None,
) -> Path:
    """Copy a model; `keys`: metadata to change, or None to leave out; `new`: metadata that it does not have yet;
    `drop`: prefix of tensors left out; `add`: new from old.
    """
    reader = gguf.GGUFReader(source)
    architecture = reader.fields.get("general.architecture")
    writer = gguf.GGUFWriter(out, architecture.contents() if architecture else "")
    if architecture is None:  # an imatrix has none
        writer.kv_data[0].clear()
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or keys.get(name, 0) is None:
            continue
        kind = field.types[0]
        value = keys.get(name, field.contents())
        writer.add_key_value(name, value, kind, sub_type=field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    for name, number in (new or {}).items():
        writer.add_uint32(name, number)
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


def changed(source: Path, out: Path, change: Callable[[str, Array], Array]) -> Path:
    """Copy a float model with other values: `change` gets the name and the values of each tensor."""
    shutil.copyfile(source, out)
    for tensor in gguf.GGUFReader(out, "r+").tensors:
        tensor.data[...] = change(tensor.name, np.array(tensor.data))
    return out


def with_zero_head(source: Path, out: Path) -> Path:
    return changed(source, out, lambda name, values: values * 0 if name.startswith(HEAD) else values)


def with_noise_head(source: Path, out: Path) -> Path:
    random = np.random.default_rng(1)

    def noise(name: str, values: Array) -> Array:
        if not name.startswith(HEAD) or values.ndim < 2:
            return values
        return random.normal(0, values.astype(np.float32).std(), values.shape).astype(values.dtype)

    return changed(source, out, noise)


def with_foreign_head(source: Path, out: Path) -> Path:
    """A head as if from another model: valid by itself, but for the channels of another hidden state."""
    order = np.random.default_rng(2)

    def other(name: str, values: Array) -> Array:
        if name != f"{HEAD}nextn.eh_proj.weight":
            return values
        half = values.shape[1] // 2
        return np.concatenate(
            [values[:, :half][:, order.permutation(half)], values[:, half:][:, order.permutation(half)]], axis=1
        )

    return changed(source, out, other)


def without_head(source: Path, out: Path) -> Path:
    return copy(source, out, keys={"qwen35moe.nextn_predict_layers": None, "qwen35moe.block_count": 6}, drop=HEAD)


def with_own_head_output(source: Path, out: Path) -> Path:
    """Give the head a separate output matrix and token embeddings, like checkpoints of some other families."""
    own = {
        f"{HEAD}nextn.shared_head_head.weight": "output.weight",
        f"{HEAD}nextn.embed_tokens.weight": "token_embd.weight",
    }
    return copy(source, out, keys={}, add=own)


def uneven_norms(source: Path, out: Path) -> Path:
    """Make the final norms of trunk and head as uneven as a large model's, and the head fit for rows before the norm.

    The output matrix undoes the change, so the trunk's choices stay the same, and the head's choices for rows before
    the norm equal those for rows after it in `source`.
    """
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(source).tensors}
    norm, own, hnorm = "output_norm.weight", f"{HEAD}nextn.shared_head_norm.weight", f"{HEAD}nextn.hnorm.weight"
    uneven = np.random.default_rng(7).lognormal(0, 1, tensors[norm].shape).astype(np.float32)
    factors = {norm: uneven, own: uneven, "output.weight": 1 / uneven, hnorm: tensors[norm]}
    return changed(
        source, out, lambda name, values: (values * factors[name]).astype(values.dtype) if name in factors else values
    )


def imatrix_without_rows(source: Path, out: Path) -> Path:
    """Like files of tools that did not record which hidden rows the head got."""
    return copy(source, out, keys={"imatrix.mtp_hidden": None})
