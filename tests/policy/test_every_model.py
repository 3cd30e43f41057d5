"""Tiers on models that they were not made for: no role or shape falls to a default, and settings without effect are
reported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import gguf_edit
import numpy as np
import pytest
import shapes
from apex_runs import run_apex
from gguf_model.files import full_entries, read, write_imatrix
from policy_kit import TIERS, MakePolicy
from shapes import TINY, write_header_only

from apex_build.errors import DataMissing, PolicyUnfit, TemplateFailed
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.imatrix import HEAD_ROWS
from apex_build.native.ggml import Ggml
from apex_build.native.toolset import Toolset
from apex_build.parameters import Value
from apex_build.plugins import load_plugins
from apex_build.policy.plan import Plan, make_plan
from apex_build.policy.remarks import left_to_base_type, remarks
from apex_build.quantization.run import prepare

DENSE = ("ffn_gate", "ffn_up", "ffn_down")


def dense_tensors() -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """TINY, with dense feed-forward instead of experts."""
    for name, extents, is_float in shapes.tensors(TINY):
        if "_exps" in name:
            yield name.replace("_exps", ""), extents[:2], is_float
        elif "shexp" not in name and "gate_inp" not in name:
            yield name, extents, is_float


def dense_model(path: Path) -> Model:
    keys = {key: value for key, value in shapes._metadata(TINY, "qwen35").items() if "expert" not in key}
    writer = gguf.GGUFWriter(path, "qwen35")
    for key, value in keys.items():
        shapes._add(writer, key, value)
    writer.add_uint32("qwen35.feed_forward_length", 256)
    writer.add_rope_dimension_sections([11, 11, 10, 0])
    shapes._add_vocabulary(writer, TINY.vocabulary)
    for name, extents, is_float in dense_tensors():
        writer.add_tensor(name, np.zeros(extents[::-1], np.float32 if is_float else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read(path)


def plan_of(model: Model, tools: Toolset, policy: str, **settings: str | int) -> Plan:
    return make_plan(
        model, load_plugins().policy(policy), {name.replace("__", "."): v for name, v in settings.items()}, tools
    )


def bits(ggml: Ggml, plan: Plan, part: str, layer: int) -> float:
    (entry,) = (entry for entry in plan.entries if entry.name == f"blk.{layer}.{part}.weight")
    return ggml.type_traits(entry.type).bits_per_weight


@pytest.mark.parametrize("tier", TIERS)
def test_dense_feed_forward_is_never_below_the_experts_beside_it(tier: str, tools: Toolset, tmp_path: Path) -> None:
    extra = {f"blk.{layer}.{part}.weight": (256, 256) for part in DENSE for layer in range(4)}
    model, ggml = read(write_header_only(tmp_path / "m.gguf", TINY, extra=extra)), Ggml(tools)
    plan = plan_of(model, tools, tier, edge=1, near=1, attention_edge=1)
    for layer in range(4):
        assert bits(ggml, plan, "ffn_up", layer) == bits(ggml, plan, "ffn_up_shexp", layer)
        assert bits(ggml, plan, "ffn_up", layer) >= bits(ggml, plan, "ffn_up_exps", layer)
    assert not [line for line in remarks(plan, ggml) if "no rule" in line]


@pytest.mark.parametrize("tier", TIERS)
def test_a_dense_model_gets_sensible_types_and_a_word(tier: str, tools: Toolset, tmp_path: Path) -> None:
    model = dense_model(tmp_path / "m.gguf")
    plan = plan_of(model, tools, tier)
    assert any("has no routed experts" in line for line in plan.warnings)
    attention = {entry.type for entry in plan.entries if entry.role == "attention" and not entry.draft_head}
    assert {entry.type for entry in plan.entries if entry.role == "dense" and not entry.draft_head} <= attention
    assert {entry.role for entry in plan.entries if entry.source == "mixture"} <= {"embedding", "output"}
    if tier.startswith("i-"):
        warnings = plan_of(model, tools, tier, draft_head="quarter").warnings
        assert any(
            "the draft head has no experts: 'quarter' gives IQ2_XXS to its feed-forward" in line for line in warnings
        )
        head = {
            entry.type
            for entry in plan_of(model, tools, f"{tier}-mtp").entries
            if entry.draft_head and entry.role == "dense"
        }
        assert head == {"Q4_K"}, "cautious before it is measured"
    left = left_to_base_type(plan)
    assert left is not None and "token_embd.weight" in left


def test_heads_of_latent_attention_get_the_nearest_type_and_one_line(tools: Toolset, tmp_path: Path) -> None:
    extra = {f"blk.{layer}.attn_k_b.weight": (128, 256, 4) for layer in range(5)}
    model = read(write_header_only(tmp_path / "m.gguf", TINY, extra=extra))
    for tier in TIERS:
        plan = plan_of(model, tools, tier)
        made = {entry.type for entry in plan.fallbacks}
        assert len(plan.fallbacks) >= 4 and made <= {"IQ4_NL", "Q5_0", "Q8_0"}, tier
        (line,) = (line for line in remarks(plan, Ggml(tools)) if "cost" in line)
        assert "attn_k_b.weight (rows of 128" in line and "MB more" in line
    job = prepare(model, load_plugins().policy("compact"), {}, tools, tmp_path / "x.gguf")
    assert any("rows of 128" in warning for warning in job.warnings)


def test_what_no_rule_names_is_a_warning(make_policy: MakePolicy, small: Model, tools: Toolset) -> None:
    plan = make_plan(
        small,
        make_policy("{% for t in tensors if t.role == 'routed' %}{{ t.name | exactly }}=Q4_K\n{% endfor %}"),
        {},
        tools,
    )
    (line,) = remarks(plan, Ggml(tools))
    assert line.startswith("no rule of policy 'mine' names ") and "% of the bytes" in line


def test_parts_of_the_trunk(small: Model, tools: Toolset) -> None:
    for name, roles in (("routed", ["routed"]), ("shared", ["shared"]), ("attention", ["attention", "ssm"])):
        plan = plan_of(small, tools, "compact", **{name: "Q8_0"})
        assert {e.type for e in plan.entries if e.role in roles and e.source != "kept" and not e.draft_head} == {"Q8_0"}
        kept = plan_of(small, tools, "compact", **{name: "keep"})
        assert {e.type for e in kept.entries if e.role in roles and e.source != "kept" and not e.draft_head} == {"F16"}
    plan = plan_of(small, tools, "compact", token_embd="Q8_0", output="keep")
    types = {entry.name: entry.type for entry in plan.entries}
    assert (types["token_embd.weight"], types["output.weight"]) == ("Q8_0", "F16")
    plain = {entry.name: entry.type for entry in plan_of(small, tools, "compact").entries}
    assert {name for name in types if types[name] != plain[name]} == {"token_embd.weight", "output.weight"}
    assert {
        e.type for e in plan_of(small, tools, "uniform", type="Q4_K", output="Q6_K").entries if e.role == "output"
    } == {"Q6_K"}


def test_what_touches_nothing_is_said(testbed: Path, small: Model, tools: Toolset, tmp_path: Path) -> None:
    headless = gguf_edit.without_head(testbed, tmp_path / "headless.gguf")
    model = read(headless)
    for policy in ("i-nano-mtp", "draft-head-only"):
        with pytest.raises(PolicyUnfit, match="needs a draft head"):
            plan_of(model, tools, policy)
    assert any(
        line.startswith("draft_head=Q8_0 touches no tensor")
        for line in plan_of(model, tools, "i-nano", draft_head="Q8_0").warnings
    )
    assert plan_of(small, tools, "i-nano", draft_head="Q8_0", edge=1, near=1).warnings == ()
    assert plan_of(small, tools, "quality", draft_head="Q8_0", edge=1, near=1).warnings == (), (
        "as it is anyway, and still about something"
    )
    assert any(
        line.startswith("dense=Q4_K touches no") for line in plan_of(small, tools, "compact", dense="Q4_K").warnings
    )
    # numbers and flags too; what only a warning's text depends on is not a rule
    for name, value in (("near", 2), ("edge", 7), ("attention_edge", 1)):
        given: dict[str, str | int] = {"edge": 1, name: value}
        said = [line for line in plan_of(small, tools, "i-quality", **given).warnings if "touches no tensor" in line]
        assert said == ([f"attention_edge=1 touches no tensor of {small.name}"] if name == "attention_edge" else []), (
            name
        )
    warned = plan_of(small, tools, "uniform", type="Q4_K", base_type="Q8_0", token_embd="Q4_K", output="Q4_K").warnings
    assert warned == (f"base_type=Q8_0 touches no tensor of {small.name}",)
    assert plan_of(small, tools, "i-nano", edge=1, near=1, draft_loss="0.2").warnings == (), (
        "how a choice is made is not a rule"
    )
    assert "--policy i-nano\n" in run_apex("plan", headless, "--policy", "i-nano-mtp", code=66).stderr


def test_a_model_that_is_all_edge(small: Model, tools: Toolset) -> None:
    (line,) = plan_of(small, tools, "i-nano").warnings
    assert line.startswith("none of the 6 layers is in the middle, all are edge: no routed expert gets IQ2_XXS")
    assert plan_of(small, tools, "i-nano", edge=1, near=1).warnings == ()


def test_rules_count_what_would_be_quantized(make_policy: MakePolicy, small: Model, tools: Toolset) -> None:
    with pytest.raises(
        TemplateFailed, match=r"several roles: blk\.3\.attn_output\.weight \(attention\), output\.weight \(output\)"
    ):
        make_plan(small, make_policy("output.weight=q8_0"), {}, tools)
    plan = make_plan(small, make_policy(r"blk\.6\.=q4_K", base_type="Q8_0"), {}, tools)
    assert {entry.type for entry in plan.entries if entry.draft_head and entry.source != "kept"} == {"Q4_K"}
    (line,) = make_plan(small, make_policy(r"^blk\.0\.attn_norm\.weight$=Q4_K"), {}, tools).warnings
    assert "decides for no tensor" in line
    rules = "^blk\\.\\d+\\.ffn_up_exps\\.weight$=Q4_K\n^blk\\.[0-9]\\.ffn_up_exps\\.weight$=Q5_K\n"
    assert any("decides for no tensor" in line for line in make_plan(small, make_policy(rules), {}, tools).warnings)


# --- what needs data --------------------------------------------------------------------------------------------------
def test_output_and_embeddings_are_asked_of_ggml(testbed: Path, calibrated: Path, tmp_path: Path) -> None:
    """llama-quantize makes an exception for them, and its library aborts."""
    common = [
        "quantize",
        testbed,
        "--policy",
        "uniform",
        "--imatrix",
        calibrated,
        "-o",
        tmp_path / "x.gguf",
        "--dry-run",
    ]
    ran = run_apex(*common, "--set", "type=IQ2_XXS", code=72)
    assert "output.weight -> IQ2_XXS" in ran.stderr and "--set output=Q6_K" in ran.stderr
    ran = run_apex(*common, "--set", "type=IQ2_XXS", "--set", "output=Q6_K", code=72)
    assert "token_embd.weight -> IQ2_XXS" in ran.stderr and "--set token_embd=Q4_K" in ran.stderr
    run_apex(*common, "--set", "type=IQ2_XXS", "--set", "token_embd=Q4_K", "--set", "output=Q6_K")
    planned = json.loads(run_apex("plan", testbed, "--policy", "uniform", "--set", "type=IQ1_S", "--json").stdout)
    assert {"token_embd.weight", "output.weight"} <= set(planned["needing_data"])


def test_a_weight_that_no_calibration_reaches(testbed: Path, tools: Toolset, tmp_path: Path) -> None:
    model = read(gguf_edit.with_own_head_output(testbed, tmp_path / "own.gguf"))
    post = lambda writer: writer.add_string(HEAD_ROWS, "post_norm")  # noqa: E731
    imatrix = write_imatrix(tmp_path / "i.gguf", full_entries(model), change=post)
    policy = load_plugins().policy("i-nano")
    small: dict[str, Value] = {"edge": 1, "near": 1, "attention_edge": 1, "draft_head": "IQ2_XXS"}
    with pytest.raises(
        DataMissing, match=r"nextn\.embed_tokens\.weight of the draft head -> IQ2_XXS.*calibration cannot record any"
    ) as caught:
        prepare(model, policy, small, tools, tmp_path / "x.gguf", imatrix=imatrix)
    assert caught.value.hint == "a type that needs none: --set draft_head.other=Q8_0"
    prepare(model, policy, {**small, "draft_head.other": "Q8_0"}, tools, tmp_path / "x.gguf", imatrix=imatrix)
