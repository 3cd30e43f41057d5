"""The APEX tiers compared with APEX's tables: roles, depths, the draft head, and totals confirmed by llama-quantize."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from policy_kit import SMALL, TIERS, WITH_SMALL_HEAD

from apex_build.gguf_model.catalogue import Model
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins
from apex_build.policy.plan import Plan, make_plan

GIB = 1 << 30
# routed edge, near, middle; shared edge, other; attention edge, other; embedding and output as the base type's mixture
# gives them
QUALITY = ("Q6_K", "Q5_K", "IQ4_XS", "Q8_0", "Q8_0", "Q6_K", "Q6_K", "Q6_K", "Q6_K")
BALANCED = ("Q6_K", "Q5_K", "Q5_K", "Q8_0", "Q8_0", "Q6_K", "Q6_K", "Q5_K", "Q6_K")
COMPACT = ("Q4_K", "Q3_K", "Q3_K", "Q6_K", "Q6_K", "Q4_K", "Q4_K", "Q4_K", "Q6_K")
EXPECTED = {
    "quality": QUALITY,
    "i-quality": QUALITY,
    "balanced": BALANCED,
    "i-balanced": BALANCED,
    "compact": COMPACT,
    "i-compact": COMPACT,
    "mini": ("Q3_K", "Q3_K", "Q2_K", "Q5_K", "Q4_K", "Q4_K", "Q3_K", "Q3_K", "Q6_K"),
    "i-mini": ("Q3_K", "Q3_K", "IQ2_S", "Q5_K", "Q4_K", "Q4_K", "Q3_K", "Q3_K", "Q6_K"),
    "i-nano": ("Q3_K", "IQ2_S", "IQ2_XXS", "Q5_K", "Q4_K", "Q4_K", "Q3_K", "Q2_K", "Q5_K"),
    "i-micro": ("Q3_K", "IQ2_XS", "IQ1_M", "Q5_K", "Q4_K", "Q4_K", "Q3_K", "Q2_K", "Q5_K"),
}
EDGE, NEAR = {0, 1, 2, 3, 4, 35, 36, 37, 38, 39}, {5, 6, 7, 8, 9, 30, 31, 32, 33, 34}
ATTENTION_EDGE = {0, 1, 2, 37, 38, 39}
KEPT = ("norm", "router", "conv", "other")
ROUTED = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
SHARED = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output", "attn_gate", "attn_qkv", "ssm_alpha", "ssm_beta", "ssm_out")


def plan_of(model: Model, tools: Toolset, tier: str, **parameters: str | int) -> Plan:
    return make_plan(
        model,
        load_plugins().policy(tier),
        {name.replace("__", "."): value for name, value in parameters.items()},
        tools,
    )


def types(plan: Plan) -> dict[str, str]:
    return {entry.name: entry.type for entry in plan.entries}


def expected(tier: str, name: str) -> str | None:
    """Worked out by hand from the names; None for tensors that stay as they are."""
    routed_edge, near, middle, shared_edge, shared, attention_edge, attention, embedding, output = EXPECTED[tier]
    if name in ("token_embd.weight", "output.weight"):
        return embedding if name.startswith("token") else output
    found = re.fullmatch(r"blk\.(\d+)\.(.+)\.weight", name)
    if not found:
        return None
    layer, part = int(found[1]), found[2]
    if layer == 40:
        low = tier in ("i-nano", "i-micro")
        if part in ROUTED:
            return "Q3_K" if low else "Q8_0"
        if part in SHARED:
            return "Q5_K" if low else "Q8_0"
        return ("Q4_K" if low else "Q8_0") if part in (*ATTENTION, "nextn.eh_proj") else None
    if part in ROUTED:
        return routed_edge if layer in EDGE else near if layer in NEAR else middle
    if part in SHARED:
        return shared_edge if layer in EDGE else shared
    return (attention_edge if layer in ATTENTION_EDGE else attention) if part in ATTENTION else None


def test_there_are_ten_and_six_with_a_small_head() -> None:
    assert {
        name
        for name, policy in load_plugins().policies().items()
        if policy.plugin == "apex" and "edge" in policy.parameters
    } == {
        *TIERS,
        *WITH_SMALL_HEAD,
    }
    assert set(TIERS) == set(EXPECTED)
    for name, policy in load_plugins().policies().items():
        # one that computes chooses by what an imatrix weighs
        assert policy.calibrated == (name.startswith("i-") or policy.compute is not None)


@pytest.mark.parametrize("tier", TIERS)
def test_types_and_total_on_the_35b_a3b(big: Model, tools: Toolset, tier: str, tmp_path: Path) -> None:
    plan = plan_of(big, tools, tier)
    for entry in plan.entries:
        assert entry.type == (expected(tier, entry.name) or entry.from_type), entry.name
        assert entry.fallback is None
        by_rule = entry.role not in (*KEPT, "embedding", "output")
        assert entry.source == (
            f"^{re.escape(entry.name)}$={entry.type}" if by_rule else "kept" if entry.role in KEPT else "mixture"
        )
    assert plan.n_bytes == sum(ours(entry.type, entry.n_elements) for entry in plan.entries)
    (tmp_path / "rules.txt").write_text(plan.rules)
    arguments: list[str | Path] = ["--dry-run", "--tensor-type-file", tmp_path / "rules.txt", big.path, plan.base_type]
    said = subprocess.run([tools.tool("llama-quantize"), *arguments], capture_output=True, text=True, check=True)
    assert (
        f"quant size  = {plan.n_bytes / (1 << 20):8.2f} MiB ({plan.bits_per_weight:.2f} BPW)"
        in said.stdout + said.stderr
    )


def ours(type_name: str, n_elements: int) -> int:
    """Bytes by the block sizes of ggml-common.h, repeated here."""
    blocks = {
        **{"F32": (1, 4), "F16": (1, 2), "Q8_0": (32, 34), "Q6_K": (256, 210), "Q5_K": (256, 176), "Q4_K": (256, 144)},
        **{"Q3_K": (256, 110), "Q2_K": (256, 84), "IQ4_XS": (256, 136), "IQ2_S": (256, 82), "IQ2_XS": (256, 74)},
        **{"IQ2_XXS": (256, 66), "IQ1_M": (256, 56)},
    }
    block, n_bytes = blocks[type_name]
    assert n_elements % block == 0
    return n_elements // block * n_bytes


@pytest.mark.parametrize("tier", TIERS)
def test_the_testbed_has_all_zones(small: Model, tools: Toolset, tier: str) -> None:
    plan = types(plan_of(small, tools, tier, **SMALL))
    routed = [plan[f"blk.{layer}.ffn_up_exps.weight"] for layer in range(6)]
    assert routed == [EXPECTED[tier][zone] for zone in (0, 1, 2, 2, 1, 0)]
    assert [plan[f"blk.{layer}.ffn_down_shexp.weight"] for layer in range(6)] == [
        EXPECTED[tier][zone] for zone in (3, 4, 4, 4, 4, 3)
    ]
    layers = [plan.get(f"blk.{layer}.attn_qkv.weight", plan.get(f"blk.{layer}.attn_q.weight")) for layer in range(6)]
    assert layers == [EXPECTED[tier][zone] for zone in (5, 6, 6, 6, 6, 5)]


def test_on_a_small_model_edge_wins_over_near_and_near_over_middle(small: Model, tools: Toolset) -> None:
    def routed(**parameters: int) -> list[str]:
        plan = types(plan_of(small, tools, "i-nano", **parameters))
        return [plan[f"blk.{layer}.ffn_up_exps.weight"] for layer in range(6)]

    edge, near, middle = EXPECTED["i-nano"][:3]
    assert routed() == [edge] * 6
    assert routed(edge=2) == [edge, edge, near, near, edge, edge]
    assert routed(edge=1, near=9) == [edge, near, near, near, near, edge]
    assert routed(edge=0, near=0) == [middle] * 6


def head(model: Model, tools: Toolset, tier: str, **parameters: str) -> dict[str, str]:
    plan = plan_of(model, tools, tier, **parameters)
    return {
        entry.name.removeprefix("blk.6.").removesuffix(".weight"): entry.type
        for entry in plan.entries
        if entry.draft_head and entry.type != "F32"
    }


def test_the_draft_head_as_a_whole_and_in_parts(small: Model, tools: Toolset) -> None:
    parts = {"attn_q", "attn_k", "attn_v", "attn_output", *ROUTED, *SHARED, "nextn.eh_proj"}
    assert head(small, tools, "quality") == dict.fromkeys(parts, "Q8_0")
    floor = {name: "Q3_K" if name in ROUTED else "Q5_K" if name in SHARED else "Q4_K" for name in parts}
    assert head(small, tools, "i-nano") == head(small, tools, "i-micro") == floor
    assert head(small, tools, "i-nano", draft_head="IQ2_XXS") == dict.fromkeys(parts, "IQ2_XXS")
    assert head(small, tools, "i-nano", draft_head__routed="IQ2_XXS") == {**floor, **dict.fromkeys(ROUTED, "IQ2_XXS")}
    assert head(small, tools, "i-nano", draft_head__routed="IQ2_XXS", draft_head__other="Q6_K") == {
        name: "IQ2_XXS" if name in ROUTED else "Q6_K" for name in parts
    }
    assert head(
        small,
        tools,
        "quality",
        draft_head="Q4_K",
        draft_head__eh_proj="Q8_0",
        draft_head__shared="Q5_K",
        draft_head__attention="Q6_K",
    ) == {
        name: "Q4_K" if name in ROUTED else "Q5_K" if name in SHARED else "Q8_0" if name == "nextn.eh_proj" else "Q6_K"
        for name in parts
    }
    assert (
        types(plan_of(small, tools, "i-nano", draft_head="Q8_0"))["blk.5.ffn_up_exps.weight"] == "Q3_K"
    )  # the trunk stays


def test_sizes_without_the_head_are_near_the_published_ones(big: Model, tools: Toolset) -> None:
    """The model cards give GiB with one decimal (F16: 64.6), but not the types of token_embd and output."""
    published = {"quality": 21.3, "balanced": 23.6, "compact": 16.1, "i-mini": 12.2, "i-nano": 10.9}
    assert sum(tensor.n_bytes for tensor in big.tensors if not tensor.draft_head) / GIB == pytest.approx(64.6, abs=0.05)
    for tier, size in published.items():
        plan = plan_of(big, tools, tier)
        without_head = plan.n_bytes - plan.bytes_by_role["draft head"]
        assert without_head / GIB == pytest.approx(size, rel=0.05), tier


def test_the_head_costs_a_gigabyte_at_q8_0_and_a_quarter_of_it_at_two_bits(big: Model, tools: Toolset) -> None:
    whole = plan_of(big, tools, "i-mini").bytes_by_role["draft head"]
    low = plan_of(big, tools, "i-mini", draft_head="IQ2_XXS").bytes_by_role["draft head"]
    assert whole == pytest.approx(0.9e9, rel=0.01)
    assert low / whole == pytest.approx(0.245, abs=0.005)
