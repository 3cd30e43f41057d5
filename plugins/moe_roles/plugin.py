"""The role of each tensor, for the mixture-of-experts families of llama.cpp.

llama.cpp gives a tensor of one purpose the same name in every family (LLM_TENSOR_NAMES in src/llama-arch.cpp), so one table by
name serves all: qwen2moe, qwen3moe, qwen3next, qwen35moe, llama (Mixtral), llama4, deepseek2, glm4moe, ernie4_5-moe, gpt-oss,
dots1, bailingmoe2, granitehybrid, kimi-linear, lfm2moe and the others; dense models as far as they share its names.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from apex_build.hookspecs import hookimpl

_BLOCK = re.compile(r"^blk\.\d+\.")
_NORM = re.compile(r"norm(_\d+|_exps)?$")
# one matrix for each expert: Mixtral files from before 2024
_SINGLE_EXPERT = re.compile(r"^ffn_(gate|up|down)\.\d+$")

# role -> the weights that have it: names without `blk.N.` and `.weight`
_WEIGHTS = {
    "routed": (
        *("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_up_exps"),
        *("ffn_gate_chexps", "ffn_up_chexps", "ffn_down_chexps"),  # grovemoe's small experts
    ),
    "shared": ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"),
    "attention": (
        *("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "attn_gate"),
        *("attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b", "attn_k_b", "attn_v_b"),  # multi-head latent attention
        *("indexer.proj", "indexer.attn_k", "indexer.attn_q_b"),  # sparse attention
    ),
    "ssm": (
        *("ssm_in", "ssm_x", "ssm_dt", "ssm_out"),  # Mamba
        *("ssm_alpha", "ssm_beta", "ssm_ba"),  # gated delta net
        *("ssm_f_a", "ssm_f_b", "ssm_g_a", "ssm_g_b"),  # Kimi's delta attention
        *("shortconv.in_proj", "shortconv.out_proj"),  # LFM2: what stands in attention's place
    ),
    "conv": ("ssm_conv1d", "ssm_conv1d_q", "ssm_conv1d_k", "ssm_conv1d_v", "shortconv.conv"),
    "router": ("ffn_gate_inp", "ffn_gate_inp_shexp"),
    "nextn": ("nextn.eh_proj", "nextn.embed_tokens", "nextn.shared_head_head"),
    "embedding": ("token_embd", "per_layer_token_embd"),
    "output": ("output",),
}
_ROLES = {weight: role for role, weights in _WEIGHTS.items() for weight in weights}


def role(name: str) -> str | None:
    """Role of one tensor, or None for one that has no part in the table: dense feed-forward, biases, scalars of the SSM."""
    stem, _, kind = _BLOCK.sub("", name).rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if _NORM.search(stem):
        return "norm"
    if stem == "exp_probs_b":  # a bias on the router's choice
        return "router"
    if kind == "bias":  # also the gated delta net's ssm_dt.bias, where Mamba's ssm_dt.weight is a matrix
        return None
    return "routed" if _SINGLE_EXPERT.match(stem) else _ROLES.get(stem)


@hookimpl
def apex_tensor_roles(architecture: str) -> Callable[[str], str | None]:
    """The same table for every architecture; a plugin loaded later may know one better."""
    return role
