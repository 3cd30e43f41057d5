"""Models as header-only GGUF files: every tensor has its real shape, but its data is a hole in a sparse file, so 72 GB
take no disk space.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np


@dataclass(frozen=True)
class Shape:
    """Dimensions of a qwen35moe model; the defaults are Qwen3.5/3.6-35B-A3B's, with its MTP block."""

    hidden: int = 2048
    trunk_layers: int = 40
    head_layers: int = 1
    full_attention_interval: int = 4
    heads: int = 16
    kv_heads: int = 2
    head_size: int = 256
    key_heads: int = 16  # of the gated delta net
    value_heads: int = 32
    state_size: int = 128
    conv_kernel: int = 4
    experts: int = 256
    experts_used: int = 8
    expert_width: int = 512
    shared_width: int = 512
    vocabulary: int = 248320


QWEN_35B_A3B = Shape()
TINY = Shape(
    hidden=256,
    trunk_layers=4,
    heads=4,
    head_size=64,
    key_heads=2,
    value_heads=4,
    state_size=64,
    experts=8,
    experts_used=2,
    expert_width=256,
    shared_width=256,
    vocabulary=320,
)


def write_header_only(
    path: Path,
    shape: Shape = QWEN_35B_A3B,
    *,
    arch: str = "qwen35moe",
    weights: str = "F16",
    metadata: Mapping[str, str | int | float | bool] | None = None,
    extra: Mapping[str, tuple[int, ...]] | None = None,
    full_size: bool = True,
) -> Path:
    """Write a GGUF file with the tensors of `load_arch_tensors` (src/models/qwen35moe.cpp): matrices of type `weights`,
    others F32.

    `metadata` adds keys or replaces them, `extra` adds tensors (ggml's order of extents). With `full_size` False the
    tensor data is missing: a truncated file.
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {**_metadata(shape, arch), **(metadata or {})}.items():
        _add(writer, key, value)
    writer.add_rope_dimension_sections([11, 11, 10, 0])
    _add_vocabulary(writer, shape.vocabulary)
    end = 0
    listed = itertools.chain(tensors(shape), ((name, extents, False) for name, extents in (extra or {}).items()))
    for name, extents, is_float in listed:
        kind = gguf.GGMLQuantizationType.F32 if is_float else gguf.GGMLQuantizationType[weights]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        n_bytes = int(np.prod(extents)) // block * block_bytes
        # numpy's order is the reverse of ggml's; the dtype is not used where raw_dtype is given (and not uint8)
        writer.add_tensor_info(name, extents[::-1], np.dtype(np.float32), n_bytes, raw_dtype=kind)
        end += gguf.GGUFWriter.ggml_pad(n_bytes, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    if full_size:
        os.truncate(path, gguf.GGUFWriter.ggml_pad(path.stat().st_size, writer.data_alignment) + end)
    return path


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """(name, extents in ggml's order, whether it stays F32) in the order the converter writes them."""
    yield "token_embd.weight", (shape.hidden, shape.vocabulary), False
    yield "output.weight", (shape.hidden, shape.vocabulary), False
    yield "output_norm.weight", (shape.hidden,), True
    for layer in range(shape.trunk_layers + shape.head_layers):
        head = layer >= shape.trunk_layers
        attention = head or (layer + 1) % shape.full_attention_interval == 0
        block = itertools.chain(
            _attention(shape) if attention else _delta_net(shape), _experts(shape), _nextn(shape) if head else ()
        )
        for name, extents, is_float in block:
            yield f"blk.{layer}.{name}", extents, is_float


def _attention(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    yield "attn_norm.weight", (shape.hidden,), True
    yield "attn_q.weight", (shape.hidden, 2 * shape.heads * shape.head_size), False  # the queries and their output gate
    yield "attn_k.weight", (shape.hidden, shape.kv_heads * shape.head_size), False
    yield "attn_v.weight", (shape.hidden, shape.kv_heads * shape.head_size), False
    yield "attn_output.weight", (shape.heads * shape.head_size, shape.hidden), False
    yield "attn_q_norm.weight", (shape.head_size,), True
    yield "attn_k_norm.weight", (shape.head_size,), True


def _delta_net(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    keys, values = shape.key_heads * shape.state_size, shape.value_heads * shape.state_size
    yield "attn_norm.weight", (shape.hidden,), True
    yield "attn_qkv.weight", (shape.hidden, 2 * keys + values), False
    yield "attn_gate.weight", (shape.hidden, values), False
    yield "ssm_conv1d.weight", (shape.conv_kernel, 2 * keys + values), True
    yield "ssm_dt.bias", (shape.value_heads,), True
    yield "ssm_a", (shape.value_heads,), True
    yield "ssm_beta.weight", (shape.hidden, shape.value_heads), False
    yield "ssm_alpha.weight", (shape.hidden, shape.value_heads), False
    yield "ssm_norm.weight", (shape.state_size,), True
    yield "ssm_out.weight", (values, shape.hidden), False


def _experts(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    yield "post_attention_norm.weight", (shape.hidden,), True
    yield "ffn_gate_inp.weight", (shape.hidden, shape.experts), True
    yield "ffn_gate_exps.weight", (shape.hidden, shape.expert_width, shape.experts), False
    yield "ffn_up_exps.weight", (shape.hidden, shape.expert_width, shape.experts), False
    yield "ffn_down_exps.weight", (shape.expert_width, shape.hidden, shape.experts), False
    yield "ffn_gate_inp_shexp.weight", (shape.hidden, 1), True
    yield "ffn_gate_shexp.weight", (shape.hidden, shape.shared_width), False
    yield "ffn_up_shexp.weight", (shape.hidden, shape.shared_width), False
    yield "ffn_down_shexp.weight", (shape.shared_width, shape.hidden), False


def _nextn(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    yield "nextn.eh_proj.weight", (2 * shape.hidden, shape.hidden), False
    yield "nextn.enorm.weight", (shape.hidden,), True
    yield "nextn.hnorm.weight", (shape.hidden,), True
    yield "nextn.shared_head_norm.weight", (shape.hidden,), True


def _metadata(shape: Shape, arch: str) -> dict[str, str | int | float | bool]:
    return {
        "general.type": "model",
        "general.name": "header only",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_F16),
        f"{arch}.block_count": shape.trunk_layers + shape.head_layers,
        f"{arch}.nextn_predict_layers": shape.head_layers,
        f"{arch}.context_length": 262144,
        f"{arch}.embedding_length": shape.hidden,
        f"{arch}.attention.head_count": shape.heads,
        f"{arch}.attention.head_count_kv": shape.kv_heads,
        f"{arch}.attention.key_length": shape.head_size,
        f"{arch}.attention.value_length": shape.head_size,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{arch}.rope.freq_base": 1e7,
        f"{arch}.rope.dimension_count": shape.head_size // 4,
        f"{arch}.expert_count": shape.experts,
        f"{arch}.expert_used_count": shape.experts_used,
        f"{arch}.expert_feed_forward_length": shape.expert_width,
        f"{arch}.expert_shared_feed_forward_length": shape.shared_width,
        f"{arch}.ssm.conv_kernel": shape.conv_kernel,
        f"{arch}.ssm.state_size": shape.state_size,
        f"{arch}.ssm.group_count": shape.key_heads,
        f"{arch}.ssm.time_step_rank": shape.value_heads,
        f"{arch}.ssm.inner_size": shape.value_heads * shape.state_size,
        f"{arch}.full_attention_interval": shape.full_attention_interval,
        "general.quantization_version": 2,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen35",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
    }


def _add(writer: gguf.GGUFWriter, key: str, value: str | int | float | bool) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        (writer.add_uint16 if key.startswith("split.") and key != "split.tensors.count" else writer.add_uint32)(
            key, value
        )
    else:
        writer.add_float32(key, value)


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Like a byte-level BPE: tokens, types, merges (about as many as tokens), here also scores; special tokens last."""
    special = 32
    tokens = [f"Ġw{index:x}" for index in range(size - special)] + [f"<|special_{index}|>" for index in range(special)]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (size - special) + [gguf.TokenType.CONTROL] * special)
    writer.add_token_scores([-float(index) for index in range(size)])
    writer.add_token_merges([f"Ġ{index % 977:x} w{index:x}" for index in range(size - special - 256)])
    writer.add_eos_token_id(size - 1)
