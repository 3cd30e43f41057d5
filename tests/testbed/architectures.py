"""Small GGUF models with random weights, one for each architecture whose draft head the pin `latest` can run.

Names and shapes are from that pin's src/models/*.cpp, in ggml's order (row length first), with the testbed's
vocabulary. They do not show quality, only that every matrix is evaluated, counted and quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, HEAD = 256, 4, 2, 64
WIDTH, EXPERTS, EXPERT, USED = 512, 4, 256, 2
LAYERS = 3  # of the trunk
Q, KV = HEADS * HEAD, KV_HEADS * HEAD
Tensor = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """The content of a file of this architecture.

    `block` yields the tensors of a block, without its number; `unused`: name suffixes of matrices in the head that its
    graph does not use; `rows`: the trunk's hidden rows that feed the head.
    """

    name: str
    keys: Mapping[str, Any]
    block: Callable[[int, bool], Iterator[Tensor]]
    heads: int = 1
    rows: str = "post_norm"
    unused: tuple[str, ...] = ()
    extra: tuple[Tensor, ...] = field(default=())

    @property
    def blocks(self) -> int:
        return LAYERS + self.heads


def write_model(
    name: str,
    vocabulary: Path,
    out: Path,
    *,
    heads: int | None = None,
    own: bool = False,
    split: bool = False,
    only_said: bool = False,
) -> Path:
    """A model of that architecture, with the tokenizer of the model `vocabulary`.

    `heads`: number of heads, if not the usual one; `own`: each head has its own token embeddings and output matrix;
    `split`: a head has attn_q, attn_k and attn_v instead of attn_qkv; `only_said`: the metadata declare heads that
    have no tensors in the file.
    """
    base = ARCHITECTURES[name]
    arch = base if heads is None else build(name, heads)
    reader = gguf.GGUFReader(vocabulary)
    writer = gguf.GGUFWriter(out, name)
    for key, found in reader.fields.items():
        if key.startswith("tokenizer."):
            kind = found.types[0]
            writer.add_key_value(
                key, found.contents(), kind, found.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            )
    tokens = len(reader.fields["tokenizer.ggml.tokens"].data)
    for key, value in {"block_count": arch.blocks, "nextn_predict_layers": arch.heads, **_COMMON, **arch.keys}.items():
        _add_key(writer, f"{name}.{key}", value)
    random = np.random.default_rng(len(name))
    tensors = [
        ("token_embd.weight", (HIDDEN, tokens)),
        ("output.weight", (HIDDEN, tokens)),
        ("output_norm.weight", (HIDDEN,)),
    ]
    tensors += arch.extra
    for layer in range(arch.blocks):
        head = layer >= LAYERS
        if head and only_said:
            break
        parts = [*arch.block(layer, head)]
        if head and split:
            parts = [part for part in parts if part[0] != "attn_qkv.weight"] + list(_projections(Q, KV))
        if head and own:
            parts += [
                ("nextn.embed_tokens.weight", (HIDDEN, tokens)),
                ("nextn.shared_head_head.weight", (HIDDEN, tokens)),
            ]
        tensors += [(f"blk.{layer}.{part}", shape) for part, shape in parts]
    for tensor, shape in tensors:
        writer.add_tensor(tensor, _values(tensor, shape, random))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def build(name: str, heads: int) -> Architecture:
    return _MAKERS[name](heads)


_COMMON = {
    "context_length": 4096,
    "embedding_length": HIDDEN,
    "feed_forward_length": WIDTH,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.key_length": HEAD,
    "attention.value_length": HEAD,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}
_MOE = {
    "expert_count": EXPERTS,
    "expert_used_count": USED,
    "expert_feed_forward_length": EXPERT,
    "expert_shared_feed_forward_length": EXPERT,
    "expert_shared_count": 1,
    "expert_weights_norm": True,
    "expert_weights_scale": 1.5,
}


def _add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _values(name: str, shape: tuple[int, ...], random: np.random.Generator) -> Any:
    if "norm" in name and name.endswith(".weight"):
        return random.lognormal(0, 0.3, shape[::-1]).astype(np.float32)
    if name.endswith("ssm_a"):
        return -random.lognormal(0, 0.3, shape[::-1]).astype(np.float32)
    values = random.normal(0, shape[0] ** -0.5, shape[::-1]) if len(shape) > 1 else random.normal(0, 0.1, shape)
    plain = len(shape) < 2 or any(part in name for part in ("conv1d", "ssm_d", "_ape", "hc_", "gate_inp"))
    return values.astype(np.float32 if plain else np.float16)


def _attention(
    queries: int = Q, kv: int = KV, out: int = Q, *, norms: bool = True, bias: bool = False
) -> Iterator[Tensor]:
    yield from _projections(queries, kv, bias=bias)
    yield "attn_output.weight", (out, HIDDEN)
    if norms:
        yield "attn_q_norm.weight", (HEAD,)
        yield "attn_k_norm.weight", (HEAD,)


def _projections(queries: int, kv: int, *, bias: bool = False) -> Iterator[Tensor]:
    for part, size in (("q", queries), ("k", kv), ("v", kv)):
        yield f"attn_{part}.weight", (HIDDEN, size)
        if bias:
            yield f"attn_{part}.bias", (size,)


def _dense(suffix: str = "", width: int = WIDTH, parts: str = "gate up down") -> Iterator[Tensor]:
    for part in parts.split():
        yield f"ffn_{part}{suffix}.weight", (width, HIDDEN) if part == "down" else (HIDDEN, width)


def _experts(
    *, bias: str = "", shared: bool = True, parts: str = "gate up down", hidden: int = HIDDEN
) -> Iterator[Tensor]:
    yield "ffn_gate_inp.weight", (HIDDEN, EXPERTS)
    if bias:
        yield bias, (EXPERTS,)
    for part in parts.split():
        yield f"ffn_{part}_exps.weight", (EXPERT, hidden, EXPERTS) if part == "down" else (hidden, EXPERT, EXPERTS)
    if shared:
        yield from _dense("_shexp", EXPERT, parts)


def _nextn(norm: str = "nextn.shared_head_norm.weight") -> Iterator[Tensor]:
    yield "nextn.eh_proj.weight", (2 * HIDDEN, HIDDEN)
    yield "nextn.enorm.weight", (HIDDEN,)
    yield "nextn.hnorm.weight", (HIDDEN,)
    if norm:
        yield norm, (HIDDEN,)


def _norms(*names: str) -> Iterator[Tensor]:
    for name in names:
        yield f"{name}.weight", (HIDDEN,)


# --- Qwen3-Next and after: gated delta net, every second layer full attention

_STATE, _K_HEADS, _V_HEADS = 64, 2, 4
_DELTA = {
    "ssm.conv_kernel": 4,
    "ssm.state_size": _STATE,
    "ssm.group_count": _K_HEADS,
    "ssm.time_step_rank": _V_HEADS,
    "ssm.inner_size": _V_HEADS * _STATE,
    "full_attention_interval": 2,
    "rope.dimension_count": 16,
}


def _qwen(name: str, heads: int) -> Architecture:
    keys, values = _K_HEADS * _STATE, _V_HEADS * _STATE
    sections = {} if name == "qwen3next" else {"rope.dimension_sections": [3, 3, 2, 0]}

    def block(layer: int, head: bool) -> Iterator[Tensor]:
        yield from _norms("attn_norm", "post_attention_norm")
        if head or (layer + 1) % 2 == 0:
            yield from _attention(2 * Q)
        else:
            yield "attn_qkv.weight", (HIDDEN, 2 * keys + values)
            yield "attn_gate.weight", (HIDDEN, values)
            yield "ssm_conv1d.weight", (4, 2 * keys + values)
            yield "ssm_dt.bias", (_V_HEADS,)
            yield "ssm_a", (_V_HEADS,)
            if name == "qwen3next":
                yield "ssm_ba.weight", (HIDDEN, 2 * _V_HEADS)
            else:
                yield "ssm_beta.weight", (HIDDEN, _V_HEADS)
                yield "ssm_alpha.weight", (HIDDEN, _V_HEADS)
            yield "ssm_norm.weight", (_STATE,)
            yield "ssm_out.weight", (values, HIDDEN)
        if name == "qwen35":
            yield from _dense()
        else:
            yield from _experts()
            yield "ffn_gate_inp_shexp.weight", (HIDDEN,)
        if head:
            yield from _nextn()

    return Architecture(name, {**_DELTA, **sections, **({} if name == "qwen35" else _MOE)}, block, heads)


# --- GLM-4.5 to 4.7, Hunyuan, Cohere: attention and experts


def _glm4moe(heads: int) -> Architecture:
    def block(layer: int, head: bool) -> Iterator[Tensor]:
        yield from _norms("attn_norm", "post_attention_norm")
        yield from _attention(bias=True)
        yield from _experts(bias="exp_probs_b.bias") if layer else _dense()
        if head:
            yield from _nextn()

    return Architecture("glm4moe", {**_MOE, "leading_dense_block_count": 1, "rope.dimension_count": 32}, block, heads)


def _hy_v3(heads: int) -> Architecture:
    def block(layer: int, head: bool) -> Iterator[Tensor]:
        yield from _norms("attn_norm", "ffn_norm")
        yield from _attention()
        yield from _experts(bias="exp_probs_b") if layer else _dense()
        if head:
            yield from _nextn()

    return Architecture("hy_v3", {**_MOE, "rope.dimension_count": HEAD}, block, heads)


def _cohere2moe(heads: int) -> Architecture:
    def block(layer: int, head: bool) -> Iterator[Tensor]:
        yield from _norms("attn_norm")
        yield from _attention(norms=False)
        yield from _experts() if layer else _dense()
        if head:
            yield from _nextn()

    keys = {
        **_MOE,
        "leading_dense_block_count": 1,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.sliding_window": 64,
        "attention.sliding_window_pattern": 2,
        "logit_scale": 0.25,
        "rope.dimension_count": HEAD,
    }
    return Architecture("cohere2moe", keys, block, heads)


# --- Step-3.5, MiMo: windows in some layers, several heads, rows from before the norm


def _step35(heads: int) -> Architecture:
    def block(layer: int, head: bool) -> Iterator[Tensor]:
        yield from _norms("attn_norm", "ffn_norm")
        yield from _attention()
        yield "attn_gate.weight", (HIDDEN, HEADS)
        yield from _dense() if layer == 0 or head else _experts(bias="exp_probs_b.bias")
        if head:
            yield from _nextn()

    keys = {
        **_MOE,
        "rope.dimension_count": HEAD,
        "attention.sliding_window": 64,
        "attention.sliding_window_pattern": [layer % 2 == 1 or layer >= LAYERS for layer in range(LAYERS + heads)],
    }
    return Architecture("step35", keys, block, heads, "pre_norm")


def _mimo2(heads: int) -> Architecture:
    def block(layer: int, head: bool) -> Iterator[Tensor]:
        yield from _norms("attn_norm", "ffn_norm")
        if head:  # its graph takes no others
            yield "attn_qkv.weight", (HIDDEN, Q + 2 * KV)
            yield "attn_output.weight", (Q, HIDDEN)
        else:
            yield from _attention(norms=False)
        yield "attn_sinks.weight", (HEADS,)
        yield from _dense() if layer == 0 or head else _experts(bias="exp_probs_b.bias", shared=False)
        if head:
            yield from _nextn("")
            yield from _norms("layer_output_norm")

    keys = {
        **_MOE,
        "rope.dimension_count": HEAD,
        "attention.sliding_window": 64,
        "attention.sliding_window_pattern": [layer % 2 == 1 or layer >= LAYERS for layer in range(LAYERS + heads)],
    }
    return Architecture("mimo2", keys, block, heads, "pre_norm")


def _exaone_moe(heads: int) -> Architecture:
    """llama.cpp loads its head, but has no graph for it."""

    def block(layer: int, head: bool) -> Iterator[Tensor]:
        yield from _norms("attn_norm", "ffn_norm")
        yield from _attention()
        yield from _dense() if layer == 0 or head else _experts(bias="exp_probs_b.bias")
        if head:
            yield from _nextn()

    keys = {
        **_MOE,
        "leading_dense_block_count": 1,
        "expert_gating_func": 2,
        "rope.dimension_count": HEAD,
        "attention.sliding_window": 64,
    }
    return Architecture("exaone-moe", keys, block, heads)


# --- DeepSeek: latent attention

_LORA_Q, _LORA_KV, _ROPE, _NOPE, _VALUE = 128, 128, 32, 32, 64
_MLA = {
    "attention.head_count_kv": 1,
    "attention.q_lora_rank": _LORA_Q,
    "attention.kv_lora_rank": _LORA_KV,
    "attention.key_length": _LORA_KV + _ROPE,
    "attention.value_length": _LORA_KV,
    "attention.key_length_mla": _NOPE + _ROPE,
    "attention.value_length_mla": _VALUE,
    "rope.dimension_count": _ROPE,
    "expert_gating_func": 2,
}
_INDEXER = {"attention.indexer.head_count": 2, "attention.indexer.key_length": 64, "attention.indexer.top_k": 64}


def _latent(*, gate: bool = False) -> Iterator[Tensor]:
    yield "attn_q_a.weight", (HIDDEN, _LORA_Q)
    yield "attn_q_a_norm.weight", (_LORA_Q,)
    yield "attn_q_b.weight", (_LORA_Q, HEADS * (_NOPE + _ROPE))
    yield "attn_kv_a_mqa.weight", (HIDDEN, _LORA_KV + _ROPE)
    yield "attn_kv_a_norm.weight", (_LORA_KV,)
    yield "attn_k_b.weight", (_NOPE, _LORA_KV, HEADS)
    yield "attn_v_b.weight", (_LORA_KV, _VALUE, HEADS)
    yield "attn_output.weight", (HEADS * _VALUE, HIDDEN)
    if gate:
        yield "attn_gate.weight", (HIDDEN, HEADS)


def _deepseek(name: str, heads: int) -> Architecture:
    indexer = name != "deepseek2"

    def block(layer: int, head: bool) -> Iterator[Tensor]:
        yield from _norms("attn_norm", "ffn_norm")
        yield from _latent()
        if indexer:
            yield "indexer.k_norm.weight", (64,)
            yield "indexer.k_norm.bias", (64,)
            yield "indexer.proj.weight", (HIDDEN, 2)
            yield "indexer.attn_k.weight", (HIDDEN, 64)
            yield "indexer.attn_q_b.weight", (_LORA_Q, 2 * 64)
        yield from _experts(bias="exp_probs_b.bias") if layer else _dense()
        if head:
            yield from _nextn()

    # llama.cpp's graphs of these heads attend to all tokens
    unused = ("indexer.proj.weight", "indexer.attn_k.weight", "indexer.attn_q_b.weight") if indexer else ()
    keys = {**_MOE, **_MLA, **(_INDEXER if indexer else {}), "leading_dense_block_count": 1}
    return Architecture(name, keys, block, heads, unused=unused)


def _deepseek4(heads: int) -> Architecture:
    streams, groups, lora = 4, 2, 64
    ratios = [0, 4, 128, *[0] * heads]
    mix = (2 + streams) * streams

    def block(layer: int, head: bool) -> Iterator[Tensor]:
        yield from _norms("attn_norm", "ffn_norm")
        yield "attn_sinks.weight", (HEADS,)
        yield "attn_q_a.weight", (HIDDEN, _LORA_Q)
        yield "attn_q_a_norm.weight", (_LORA_Q,)
        yield "attn_q_b.weight", (_LORA_Q, HEADS * HEAD)
        yield "attn_kv.weight", (HIDDEN, HEAD)
        yield "attn_kv_a_norm.weight", (HEAD,)
        yield "attn_output_a.weight", (HEADS * HEAD // groups, lora * groups)
        yield "attn_output_b.weight", (groups * lora, HIDDEN)
        for part in ("attn", "ffn"):
            yield f"hc_{part}_fn.weight", (streams * HIDDEN, mix)
            yield f"hc_{part}_base.weight", (mix,)
            yield f"hc_{part}_scale.weight", (3,)
        if ratio := ratios[layer]:
            twice = 2 if ratio == 4 else 1
            yield "attn_compressor_kv.weight", (HIDDEN, twice * HEAD)
            yield "attn_compressor_gate.weight", (HIDDEN, twice * HEAD)
            yield "attn_compressor_ape.weight", (twice * HEAD, ratio)
            yield "attn_compressor_norm.weight", (HEAD,)
            if ratio == 4:
                yield "indexer.proj.weight", (HIDDEN, 2)
                yield "indexer.attn_q_b.weight", (_LORA_Q, 2 * 128)
                yield "indexer_compressor_kv.weight", (HIDDEN, 2 * 128)
                yield "indexer_compressor_gate.weight", (HIDDEN, 2 * 128)
                yield "indexer_compressor_ape.weight", (2 * 128, ratio)
                yield "indexer_compressor_norm.weight", (128,)
        yield from _experts(bias="exp_probs_b.bias")
        if head:
            yield from _nextn()

    keys = {
        **_MOE,
        **_INDEXER,
        # with that of the heads llama.cpp takes a cache for an indexer's, and divides by zero
        "attention.indexer.key_length": 128,
        "expert_gating_func": 4,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": _LORA_Q,
        "attention.sliding_window": 64,
        "attention.output_group_count": groups,
        "attention.output_lora_rank": lora,
        "attention.compress_rope_freq_base": 10000.0,
        "attention.compress_ratios": ratios,
        "hyper_connection.count": streams,
        "hyper_connection.sinkhorn_iterations": 2,
        "hyper_connection.epsilon": 1e-6,
        "hash_layer_count": 0,
        "swiglu_clamp_exp": [10.0] * (LAYERS + heads),
        "rope.dimension_count": _ROPE,
    }
    extra = (
        ("output_hc_fn.weight", (streams * HIDDEN, streams)),
        ("output_hc_base.weight", (streams,)),
        ("output_hc_scale.weight", (1,)),
    )
    return Architecture("deepseek4", keys, block, heads, "streams", extra=extra)


# --- Bailing (KDA), Nemotron-H (Mamba-2): attention in some layers only


def _bailingmoe3(heads: int) -> Architecture:
    inner = HEADS * HEAD

    def block(layer: int, head: bool) -> Iterator[Tensor]:
        yield from _norms("attn_norm", "ffn_norm")
        if head or layer == 1:
            yield from _latent(gate=True)
        else:
            for part in "qkv":
                yield f"ssm_conv1d_{part}.weight", (4, 1, inner, 1)
            yield from _attention(inner, inner, inner, norms=False)
            yield "ssm_f_a.weight", (HIDDEN, inner)
            yield "ssm_beta.weight", (HIDDEN, HEADS)
            yield "ssm_a", (1, HEADS)
            yield "ssm_dt.bias", (inner,)
            yield "ssm_g_a.weight", (HIDDEN, inner)
            yield "ssm_norm.weight", (HEAD,)
        yield from _experts(bias="exp_probs_b.bias") if layer else _dense()
        if head:
            yield from _nextn("layer_output_norm.weight")

    keys = {
        **_MOE,
        **_MLA,
        "attention.head_count_kv": [0, 1, 0, *[1] * heads],
        "leading_dense_block_count": 1,
        "ssm.conv_kernel": 4,
        "kda.head_dim": HEAD,
        "kda.gate_lower_bound": -5.0,
    }
    return Architecture("bailingmoe3", keys, block, heads)


def _nemotron_h_moe(heads: int) -> Architecture:
    inner, state, ssm_heads, groups = 256, 64, 4, 2
    conv = inner + 2 * groups * state

    def block(layer: int, head: bool) -> Iterator[Tensor]:
        yield from _norms("attn_norm")
        if head or layer == 1:
            yield from _attention(norms=False)
        elif layer == 0:
            yield "ssm_in.weight", (HIDDEN, inner + conv + ssm_heads)
            yield "ssm_conv1d.weight", (4, conv)
            yield "ssm_conv1d.bias", (conv,)
            yield "ssm_dt.bias", (ssm_heads,)
            yield "ssm_a", (1, ssm_heads)
            yield "ssm_d", (1, ssm_heads)
            yield "ssm_norm.weight", (inner // groups, groups)
            yield "ssm_out.weight", (inner, HIDDEN)
        if head or layer == 2:
            yield from _experts(bias="exp_probs_b.bias", parts="up down")
        if head:
            yield from _norms("post_attention_norm")
            yield from _nextn()

    keys = {
        **_MOE,
        "attention.head_count_kv": [0, KV_HEADS, 0, *[KV_HEADS] * heads],
        "feed_forward_length": [0, 0, WIDTH, *[0] * heads],
        "attention.layer_norm_epsilon": 1e-5,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": inner,
        "ssm.state_size": state,
        "ssm.time_step_rank": ssm_heads,
        "ssm.group_count": groups,
        "rope.dimension_count": HEAD,
    }
    return Architecture("nemotron_h_moe", keys, block, heads)


_MAKERS: Mapping[str, Callable[[int], Architecture]] = {
    "qwen35": lambda heads: _qwen("qwen35", heads),
    "qwen35moe": lambda heads: _qwen("qwen35moe", heads),
    "qwen3next": lambda heads: _qwen("qwen3next", heads),
    "glm4moe": _glm4moe,
    "deepseek2": lambda heads: _deepseek("deepseek2", heads),
    "deepseek32": lambda heads: _deepseek("deepseek32", heads),
    "glm-dsa": lambda heads: _deepseek("glm-dsa", heads),
    "deepseek4": _deepseek4,
    "exaone-moe": _exaone_moe,
    "step35": _step35,
    "mimo2": _mimo2,
    "hy_v3": _hy_v3,
    "cohere2moe": _cohere2moe,
    "bailingmoe3": _bailingmoe3,
    "nemotron_h_moe": _nemotron_h_moe,
}
SEVERAL = {"step35": 3, "mimo2": 3, "hy_v3": 2}  # heads that these models come with
ARCHITECTURES: Mapping[str, Architecture] = {name: build(name, SEVERAL.get(name, 1)) for name in _MAKERS}
