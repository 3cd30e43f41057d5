"""The role of each tensor, for the families of llama.cpp: mixtures of experts, dense models, and parts beside the text
model.

llama.cpp gives a tensor of one purpose the same name in every family (LLM_TENSOR_NAMES in src/llama-arch.cpp), so one
table by name serves all. Every name of that list, of both pins, that llama-quantize would quantize has a role here
(tests/gguf_model/test_roles.py reads the list): routed, shared, dense (feed-forward that every token passes),
attention, ssm (what stands in attention's place), router, conv, norm, nextn, embedding, output, vision, audio.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from apex_build.plugin_api import hookimpl

APEX_API = 3

_BLOCK = re.compile(r"^(?:dec\.|enc\.)?blk\.\d+\.")
# parts of a file that see or hear: towers (mmproj files, some models' own), projectors, the vocoder's parts
_VISION = re.compile(r"^(?:v|mm|resampler|mm_projector|model\.(?:visual|vision)\w*)\.|^blk\.\d+\.vis_")
_AUDIO = re.compile(r"^(?:a|mm\.a|posnet|convnext)\.|^conv1d\.")
# no name of the main table: families of names of later architectures
_FAMILIES = (
    ("ssm", re.compile(r"^(?:time_mix_|ssm_)")),
    ("attention", re.compile(r"^(?:attn_(?!sinks|rot_embd)|cross_attn_|indexer|hc_attn_)")),
    ("dense", re.compile(r"^(?:channel_mix_|ffn_|hc_ffn_|ple_|altup|laurel|inp_gate$|proj$|per_layer_model_proj$)")),
    ("nextn", re.compile(r"^(?:nextn\.|markov_|selector_|masked_embd_|conf_proj$|d2t$|fc$|hrm\.)")),
    ("dense", re.compile(r"^(?:output_hc_|output_res_|dense_\d|cls)")),
)
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
    "dense": (
        *("ffn_gate", "ffn_up", "ffn_down"),
        *("ffn_latent_down", "ffn_latent_up"),  # into and out of the experts' narrower space, for every token
        *("inp_gate", "proj", "per_layer_model_proj"),  # the use of per-layer embeddings
    ),
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
    "conv": (
        "ssm_conv1d",
        "ssm_conv1d_q",
        "ssm_conv1d_k",
        "ssm_conv1d_v",
        "shortconv.conv",
        "attn_conv_proj",
        "ffn_conv_proj",
    ),
    "router": ("ffn_gate_inp", "ffn_gate_inp_shexp", "ffn_gate_tid2eid", "altup_router"),
    "nextn": ("nextn.eh_proj", "nextn.embed_tokens", "nextn.shared_head_head"),
    "embedding": ("token_embd", "per_layer_token_embd", "position_embd", "token_types"),
    "output": ("output",),
}
_ROLES = {weight: role for role, weights in _WEIGHTS.items() for weight in weights}


def role(name: str) -> str | None:
    """Role of one tensor, or None for one that has no part in the table: biases, scalars of the SSM."""
    stem, _, kind = _BLOCK.sub("", name).rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if _NORM.search(stem):
        return "norm"
    if stem == "exp_probs_b":  # a bias on the router's choice
        return "router"
    if kind == "bias":  # also the gated delta net's ssm_dt.bias, where Mamba's ssm_dt.weight is a matrix
        return None
    if _SINGLE_EXPERT.match(stem):
        return "routed"
    if known := _ROLES.get(stem):
        return known
    if _AUDIO.match(name):
        return "audio"
    if _VISION.match(name):
        return "vision"
    return next((family for family, pattern in _FAMILIES if pattern.match(stem)), None)


@hookimpl
def apex_tensor_roles(architecture: str) -> Callable[[str], str | None]:
    """The same table for every architecture; a plugin loaded later may know one better."""
    return role
