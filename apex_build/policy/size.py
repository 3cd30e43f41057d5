"""The size in bytes of the file that llama-quantize will write: a header built from the input's, and the padded
tensors.

Follows gguf_get_meta_size (ggml/src/gguf.cpp) and the writing loop of llama_model_quantize_impl (src/llama-quant.cpp).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gguf.constants import GGUF_DEFAULT_ALIGNMENT

from apex_build.errors import ModelInvalid
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.imatrix import Imatrix
from apex_build.gguf_model.quantizable import n_dims

if TYPE_CHECKING:
    from apex_build.policy.plan import Plan

_COUNTS_END = 4 + 4 + 8 + 8  # magic, version, number of tensors, number of keys
_REMOVED = ("split.no", "split.count", "split.tensors.count")
_SET = ("general.quantization_version", "general.file_type")  # set in every output, as UINT32
_LONGEST_TEXT = 127  # of a --override-kv value: llama_model_kv_override.val_str


# what a run adds to the metadata: the keys of quantization.provenance and of the imatrix, with texts of at most
# _LONGEST_TEXT; with some room for --meta
_ADDED = 3 << 10


def other_bytes(model: Model) -> int:
    """Bytes that a file quantized of this model takes beside the data of its tensors: an upper bound, known before
    their types are. 0 for a model without a file.
    """
    if not model.headers:
        return 0
    keys = dict(model.headers[0].key_bytes)
    return _padded(_COUNTS_END + sum(keys.values()) + _infos((t.name, t.shape) for t in model.tensors) + _ADDED)


def padded_bytes(n_bytes: int) -> int:
    """Bytes that data of a tensor takes in a file, up to where the next one begins."""
    return _padded(n_bytes)


def file_size(plan: Plan, model: Model, added: Mapping[str, str | int | float | bool]) -> int:
    """Bytes of the output file, exactly.

    `added`: metadata that the run sets, by --override-kv or, for its imatrix, by itself (`imatrix_keys`).
    Raises ModelInvalid for a model that llama-quantize would make an unreadable file of.
    """
    header = model.headers[0]
    if header.alignment != GGUF_DEFAULT_ALIGNMENT:
        raise ModelInvalid(
            f"{header.path}: general.alignment is {header.alignment}; llama-quantize copies that key but writes the "
            "tensors "
            f"at multiples of {GGUF_DEFAULT_ALIGNMENT}, which makes the file unreadable"
        )
    keys = dict(header.key_bytes)
    for key in _REMOVED:
        keys.pop(key, None)
    for key, value in {**dict.fromkeys(_SET, 0), **added}.items():
        keys[key] = 8 + len(key.encode()) + 4 + _value_bytes(value)
    tensors = _infos((entry.name, entry.shape) for entry in plan.entries)
    return _padded(_COUNTS_END + sum(keys.values()) + tensors) + sum(_padded(entry.n_bytes) for entry in plan.entries)


def imatrix_keys(path: Path, imatrix: Imatrix) -> dict[str, str | int]:
    """The metadata that llama-quantize sets for `--imatrix path` (the path as it is given)."""
    keys: dict[str, str | int] = {
        "quantize.imatrix.file": str(path),
        "quantize.imatrix.entries_count": len(imatrix.entries),
    }
    if imatrix.datasets:
        keys["quantize.imatrix.dataset"] = imatrix.datasets[0]
    if imatrix.chunk_count:
        keys["quantize.imatrix.chunks_count"] = imatrix.chunk_count
    return keys


def _infos(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    return sum(8 + len(name.encode()) + 4 + 8 * n_dims(shape) + 4 + 8 for name, shape in tensors)


def _value_bytes(value: str | int | float | bool) -> int:
    if isinstance(value, str):
        return 8 + len(value.encode()[:_LONGEST_TEXT])
    return 1 if isinstance(value, bool) else 4


def _padded(n_bytes: int) -> int:
    return n_bytes + -n_bytes % GGUF_DEFAULT_ALIGNMENT
