"""A real trunk with a trained draft head as GGUF: `python tests/testbed/smollm2_gguf.py HEAD OUT.gguf`.

HEAD is smollm2-head-moe.safetensors.zst or smollm2-head-dense.safetensors.zst in this folder, or an output of
smollm2_head.py.

The trunk is SmolLM2-135M, padded like in smollm2.py and stored as the layers of an architecture whose head can be
trained for it (smollm2_head.py): `moe` makes a glm4moe file whose trunk layers are all dense, `dense` a mimo2 file. The
pin `latest` can run heads of both. They use rotary embedding by halves, so query and key rows are reordered for that.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import zstandard
from smollm2 import (
    ACTIVE,
    EXPERT_WIDTH,
    EXPERTS,
    HEAD,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    ROPE_BASE,
    SHRINK,
    WIDE,
    Array,
    finish,
    half_split,
    padded,
    source_or_exit,
)  # fmt: skip

ARCHITECTURE = {"moe": "glm4moe", "dense": "mimo2"}


def head_tensors(file: Path) -> tuple[str, dict[str, Array]]:
    """Kind and BF16 tensors of a head, as float32 (safetensors: 8 bytes of length, a JSON header, the data)."""
    raw = file.read_bytes()
    raw = zstandard.ZstdDecompressor().decompress(raw) if file.suffix == ".zst" else raw
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    kind = header.pop("__metadata__")["kind"]
    out = {}
    for name, about in header.items():
        start, end = (8 + size + at for at in about["data_offsets"])
        bits = np.frombuffer(raw[start:end], np.uint16).astype(np.uint32) << 16
        out[name] = bits.view(np.float32).reshape(about["shape"])
    return kind, out


def wide(name: str, values: Array) -> Array:
    """A tensor of the head, padded with zeros for the new channels and heads."""
    if values.ndim == 1:
        return np.pad(values * np.float32(np.sqrt(SHRINK)), (0, WIDE - HIDDEN))
    if name == "nextn.eh_proj":
        halves = [np.pad(half, ((0, WIDE - HIDDEN), (0, WIDE - HIDDEN))) for half in np.split(values, 2, axis=1)]
        return np.concatenate(halves, axis=1)
    if name.startswith("attn"):
        return padded(f"{name}.weight", values)
    grown = [(0, WIDE - n if n == HIDDEN else 0) for n in values.shape]
    return np.pad(values, grown)


def tensors(source: Path, kind: str, head: dict[str, Array]) -> Iterator[tuple[str, Array]]:
    post = "post_attention_norm" if kind == "moe" else "ffn_norm"
    for tensor in gguf.GGUFReader(source).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            values = half_split(values, (HEADS if ".attn_q." in tensor.name else KV_HEADS)[0])
        yield tensor.name.replace(".ffn_norm.", f".{post}."), padded(tensor.name, values)
        if tensor.name == "token_embd.weight" and kind == "dense":
            yield "output.weight", padded(tensor.name, values)  # mimo2 has no tied output
    parts = {name: wide(name, values) for name, values in head.items()}
    if kind == "dense":  # mimo2's head has one matrix for queries, keys and values
        parts["attn_qkv"] = np.concatenate([parts.pop(f"attn_{part}") for part in "qkv"])
    for name, values in parts.items():
        yield f"blk.{LAYERS}.{name.replace('post_norm', post)}.weight", values
    if kind == "moe":
        yield f"blk.{LAYERS}.exp_probs_b.bias", np.zeros(EXPERTS, np.float32)


def keys(kind: str) -> dict[str, tuple[Any, gguf.GGUFValueType]]:
    whole, real = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32
    found: dict[str, tuple[Any, gguf.GGUFValueType]] = {
        "block_count": (LAYERS + 1, whole), "nextn_predict_layers": (1, whole), "embedding_length": (WIDE, whole),
        "attention.head_count": (HEADS[1], whole), "attention.head_count_kv": (KV_HEADS[1], whole),
        "attention.key_length": (HEAD, whole), "attention.value_length": (HEAD, whole),
        "expert_feed_forward_length": (EXPERT_WIDTH, whole),
    }  # fmt: skip
    if kind == "moe":
        return found | {
            "leading_dense_block_count": (LAYERS, whole), "expert_count": (EXPERTS, whole),
            "expert_used_count": (ACTIVE, whole),
            "expert_shared_count": (1, whole), "expert_gating_func": (2, whole),
            "expert_weights_norm": (True, gguf.GGUFValueType.BOOL), "expert_weights_scale": (1.0, real),
        }  # fmt: skip
    # mimo2 wants layers with a window: one has it, as wide as the context, which changes nothing
    return found | {"attention.sliding_window": (8192, whole), "rope.freq_base_swa": (ROPE_BASE, real)}


def write(source: Path, head_file: Path, out: Path) -> None:
    kind, head = head_tensors(head_file)
    architecture = ARCHITECTURE[kind]
    writer = gguf.GGUFWriter(out, architecture)
    ours = {f"{architecture}.{name}": value for name, value in keys(kind).items()}
    ours |= {"general.file_type": (int(gguf.LlamaFileType.MOSTLY_F16), gguf.GGUFValueType.UINT32)}
    for name, field in gguf.GGUFReader(source).fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.quantization_version"):
            continue
        named = name.replace("llama.", f"{architecture}.", 1) if name.startswith("llama.") else name
        kind_of = field.types[0]
        value = field.contents()
        if named.endswith("layer_norm_rms_epsilon"):
            value *= SHRINK
        if named not in ours:
            writer.add_key_value(
                named, value, kind_of, sub_type=field.types[-1] if kind_of == gguf.GGUFValueType.ARRAY else None
            )
    for name, (value, value_type) in ours.items():
        writer.add_key_value(name, value, value_type)
    if kind == "dense":
        writer.add_array(f"{architecture}.attention.sliding_window_pattern", [True] + [False] * LAYERS)
    for name, values in tensors(source, kind, head):
        small = values.ndim == 1 or "gate_inp" in name
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32 if small else np.float16))
    finish(writer)


def main() -> None:
    write(source_or_exit(), Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
