"""Small Hugging Face folders with made-up tensors: a Qwen3.5-MoE of 4 trunk layers and its draft head."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HIDDEN, EXPERTS, WIDTH, VOCABULARY = 64, 4, 32, 300
_DELTA = {  # gated delta net: 2 key heads and 4 value heads of 16
    "linear_attn.A_log": (4,),
    "linear_attn.dt_bias": (4,),
    "linear_attn.conv1d.weight": (128, 1, 4),
    "linear_attn.in_proj_a.weight": (4, HIDDEN),
    "linear_attn.in_proj_b.weight": (4, HIDDEN),
    "linear_attn.in_proj_qkv.weight": (128, HIDDEN),
    "linear_attn.in_proj_z.weight": (64, HIDDEN),
    "linear_attn.norm.weight": (16,),
    "linear_attn.out_proj.weight": (HIDDEN, 64),
}
_FULL = {  # 4 query heads and 2 KV heads of 16, the query projection doubled for the output gate
    "self_attn.q_proj.weight": (128, HIDDEN),
    "self_attn.k_proj.weight": (32, HIDDEN),
    "self_attn.v_proj.weight": (32, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, 64),
    "self_attn.q_norm.weight": (16,),
    "self_attn.k_norm.weight": (16,),
}
_EVERY = {
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
    "mlp.experts.down_proj": (EXPERTS, HIDDEN, WIDTH),
    "mlp.experts.gate_up_proj": (EXPERTS, 2 * WIDTH, HIDDEN),
    "mlp.gate.weight": (EXPERTS, HIDDEN),
    "mlp.shared_expert.down_proj.weight": (HIDDEN, WIDTH),
    "mlp.shared_expert.gate_proj.weight": (WIDTH, HIDDEN),
    "mlp.shared_expert.up_proj.weight": (WIDTH, HIDDEN),
    "mlp.shared_expert_gate.weight": (1, HIDDEN),
}
_HEAD = {
    "mtp.fc.weight": (HIDDEN, 2 * HIDDEN),
    "mtp.norm.weight": (HIDDEN,),
    "mtp.pre_fc_norm_embedding.weight": (HIDDEN,),
    "mtp.pre_fc_norm_hidden.weight": (HIDDEN,),
}
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "model_type": "qwen3_5_moe_text",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "mtp_num_hidden_layers": 1,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": WIDTH,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    },
    "tie_word_embeddings": False,
}


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        **_HEAD,
    }
    for block in ("model.layers.0", "model.layers.1", "model.layers.2", "model.layers.3", "mtp.layers.0"):
        kind = _DELTA if block in ("model.layers.0", "model.layers.1", "model.layers.2") else _FULL
        found |= {f"{block}.{name}": shape for name, shape in {**kind, **_EVERY}.items()}
    return found


def qwen3_next_shapes() -> dict[str, tuple[int, ...]]:
    """The same model in the layout of Qwen3-Next: the delta net's projections in two matrices."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes().items():
        if "in_proj_qkv." in name:
            found[name.replace("in_proj_qkv.", "in_proj_qkvz.")] = (192, HIDDEN)
        elif "in_proj_b." in name:
            found[name.replace("in_proj_b.", "in_proj_ba.")] = (8, HIDDEN)
        elif "in_proj_z." not in name and "in_proj_a." not in name:
            found[name] = shape
    return found


QWEN3_NEXT: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "mtp_num_hidden_layers": 0,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
}


def write_safetensors(path: Path, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """F16, all values 0.125: nothing here depends on them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\x00\x30" * (end // 2))


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE without merges: 256 bytes and special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's bytes_to_unicode
    letters = {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + index) for index, byte in enumerate(sorted(set(range(256)) - set(printable)))
    }
    vocabulary = {letters[byte]: byte for byte in range(256)}
    special = [
        {
            "id": 256 + index,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, text in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        )
    )


def make_checkpoint(
    folder: Path, *, config: Mapping[str, Any] | None = None, without: str = "\0", shards: int = 1
) -> Path:
    """A whole checkpoint, without tensors whose names start with `without`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    write_tokenizer(folder)
    tensors = {name: shape for name, shape in shapes().items() if not name.startswith(without)}
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        write_safetensors(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
