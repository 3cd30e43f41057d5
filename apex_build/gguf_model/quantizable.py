"""Which tensors llama-quantize converts at all: its `tensor_allows_quantization` (src/llama-quant.cpp), which no tool
prints.
"""

from __future__ import annotations

from collections.abc import Sequence

# a tensor whose name contains one of these is copied
_KEPT = (
    *("_norm.weight", "ffn_gate_inp.weight", "altup", "laurel", "per_layer_model_proj"),
    *("ssm_conv1d", "shortconv.conv.weight", "attn_rel_b.weight"),
    *(
        f"time_mix_{part}.weight"
        for part in ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")
    ),
    *("time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight"),
    *(
        "ffn_gate_tid2eid.weight",
        "indexer.k_proj.weight",
        "indexer.q_proj.weight",
        "a.rvq.codebook",
        "mm.a.code_embd",
    ),  # latest
    *(".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger"),
)
_KEPT_WHOLE = ("position_embd.weight", "token_types.weight")


def n_dims(shape: Sequence[int]) -> int:
    """The number of dimensions as ggml counts: without trailing extents of 1."""
    return max((index for index, extent in enumerate(shape, start=1) if extent > 1), default=1)


def quantizable(name: str, shape: Sequence[int]) -> bool:
    """Whether llama-quantize converts this tensor to a requested type; otherwise it copies it."""
    return (
        n_dims(shape) >= 2
        and name.endswith("weight")
        and name not in _KEPT_WHOLE
        and not any(part in name for part in _KEPT)
    )
