"""The built-in role table, with names of several families (LLM_TENSOR_NAMES in src/llama-arch.cpp)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from apex_build.plugins import load_plugins

ROLES = {
    "routed": "ffn_gate_exps ffn_up_exps ffn_down_exps ffn_gate_up_exps ffn_down_chexps ffn_gate.7 ffn_down.15 "
    "ffn_up.0",
    "shared": "ffn_gate_shexp ffn_up_shexp ffn_down_shexp",
    "attention": "attn_q attn_k attn_v attn_qkv attn_output attn_gate attn_q_a attn_q_b attn_kv_a_mqa attn_kv_b "
    "attn_k_b attn_v_b",
    "ssm": "ssm_alpha ssm_beta ssm_ba ssm_out ssm_in ssm_x ssm_dt ssm_f_a ssm_g_b shortconv.in_proj",
    "router": "ffn_gate_inp ffn_gate_inp_shexp",
    "norm": "attn_norm attn_norm_2 post_attention_norm attn_q_norm attn_kv_a_norm ffn_norm ffn_norm_exps "
    "post_ffw_norm_1 ssm_norm "
    "ssm_dt_norm nextn.enorm nextn.hnorm nextn.shared_head_norm layer_output_norm indexer.k_norm",
    "conv": "ssm_conv1d ssm_conv1d_k shortconv.conv",
    "nextn": "nextn.eh_proj nextn.embed_tokens nextn.shared_head_head",
}


def role(name: str, architecture: str = "qwen35moe") -> str | None:
    found = load_plugins().role_of(architecture, name)
    assert found is None or isinstance(found, str)
    return found


@pytest.mark.parametrize(("expected", "names"), ROLES.items())
def test_weights_of_a_block(expected: str, names: str) -> None:
    assert {name: role(f"blk.12.{name}.weight") for name in names.split()} == dict.fromkeys(names.split(), expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_embd.weight", "embedding"),
        ("output.weight", "output"),
        ("output_norm.weight", "norm"),
        ("blk.3.attn_norm.bias", "norm"),
        ("blk.3.exp_probs_b.bias", "router"),
        ("blk.3.ssm_dt.bias", None),
        ("blk.3.ssm_a", None),
        ("blk.3.ffn_gate_exps.bias", None),
        ("blk.3.ffn_down.weight", "dense"),
        ("blk.3.ffn_latent_up.weight", "dense"),
        ("per_layer_token_embd.weight", "embedding"),
        ("blk.3.indexer.proj.weight", "attention"),
        ("blk.3.vis_gate.weight", "vision"),
        ("v.blk.3.attn_q.weight", "vision"),
        ("mm.a.mlp.1.weight", "audio"),
        ("blk.3.attn_sinks.weight", None),
        ("rope_freqs.weight", None),
        ("dec.blk.3.attn_q.weight", "attention"),
        ("weight", None),
        ("", None),
    ],
)
def test_the_rest(name: str, expected: str | None) -> None:
    assert role(name) == expected


@pytest.mark.parametrize(
    "architecture", ["qwen2moe", "qwen3next", "deepseek2", "glm4moe", "llama", "gpt-oss", "ernie4_5-moe", "dots1"]
)
def test_one_table_serves_every_family(architecture: str) -> None:
    assert role("blk.0.ffn_down_exps.weight", architecture) == "routed"


def names_of(source: Path) -> list[str]:
    """LLM_TENSOR_NAMES in src/llama-arch.cpp, as weights."""
    text = (source / "src" / "llama-arch.cpp").read_text()
    listed = text[text.index("LLM_TENSOR_NAMES = {") :]
    names = re.findall(r'"([^"]+)"', listed[: listed.index("};")])
    return [f"{name.replace('%d', '3')}.weight" for name in names]


# vectors, and tables of whole numbers, whatever their number of extents
NO_MATRICES = (
    "attn_sinks",
    "rope_f",
    "attn_rot_embd",
    "layer_output_scale",
    "exp_probs_b",
    "ffn.act",
    "blk.3.ffn.weight",
    "convnext.3.gamma",
    "hrm.z_l_init",
)


@pytest.mark.parametrize("pin", ["pr-22673", "latest"])
def test_every_matrix_that_the_pins_know_has_a_role(pin: str) -> None:
    from apex_build.gguf_model.quantizable import quantizable
    from apex_build.source.fetch import ensure_source
    from apex_build.source.pins import load_pin
    from apex_build.source.tree import tree_path

    source = tree_path(load_pin(pin)) if pin == "latest" else ensure_source(load_pin(pin))
    if not (source / "src" / "llama-arch.cpp").is_file():
        pytest.skip("the newest pin's source has not been fetched: apex source fetch --pin latest")
    names = names_of(source)
    assert len(names) > 200
    unknown = {name for name in names if quantizable(name, (256, 256)) and role(name) is None}
    assert {name for name in unknown if not any(part in name for part in NO_MATRICES)} == set()


def test_every_matrix_of_the_converter_has_a_role() -> None:
    """Also vision and audio towers, from gguf-py's list, which the converter uses."""
    import gguf

    from apex_build.gguf_model.quantizable import quantizable

    names = {f"{name.replace('{bid}', '3').replace('{xid}', '1')}.weight" for name in gguf.TENSOR_NAMES.values()}
    unknown = {name for name in names if quantizable(name, (256, 256)) and role(name) is None}
    assert {name for name in unknown if not any(part in name for part in NO_MATRICES)} == set()
