"""Plans: what llama-quantize is asked and answers, shapes that do not fit, and the file as it is written in the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from policy_kit import SMALL, MakePolicy
from shapes import TINY, write_header_only

from apex_build.errors import ApexError, ModelInvalid, PlanMismatch, ShapeUnfit, TemplateFailed, ToolFailed, TypeUnknown
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.header import read_header
from apex_build.gguf_model.imatrix import read_imatrix
from apex_build.gguf_model.model import read_model
from apex_build.gguf_model.quantizable import quantizable
from apex_build.hookspecs import Parameter
from apex_build.native.output import quantized_size, tensor_lines
from apex_build.native.run import run_tool
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins
from apex_build.policy.dry_run import base_types, dry_run, quantizable_tensors
from apex_build.policy.plan import Plan, make_plan
from apex_build.policy.size import file_size, imatrix_keys


def model_of(path: Path) -> Model:
    return read_model(path, load_plugins().role_of)


def types(plan: Plan) -> dict[str, str]:
    return {entry.name: entry.type for entry in plan.entries}


def write(plan: Plan, model: Model, tools: Toolset, out: Path, *arguments: str | Path) -> Path:
    """Quantize for real, as the plan says."""
    rules = out.with_suffix(".txt")
    rules.write_text(plan.rules, encoding="utf-8")
    run_tool(
        [tools.tool("llama-quantize"), "--tensor-type-file", rules, *arguments, model.path, out, plan.base_type, "1"]
    )
    return out


# --- what the tool is asked -------------------------------------------------------------------------------------------
def test_what_is_quantizable_is_asked_of_the_tool(small: Model, big: Model, tools: Toolset) -> None:
    for model in (small, big):
        found = quantizable_tensors(model, tools)
        assert found == {tensor.name for tensor in model.tensors if quantizable(tensor.name, tensor.shape)}
        assert "token_embd.weight" in found and "blk.0.ffn_gate_inp.weight" not in found


@pytest.mark.parametrize("weights", ["BF16", "F32", "Q8_0"])
def test_it_is_found_whatever_the_types_of_the_input(tools: Toolset, tmp_path: Path, weights: str) -> None:
    model = model_of(write_header_only(tmp_path / "m.gguf", TINY, weights=weights))
    assert quantizable_tensors(model, tools) == {
        tensor.name for tensor in model.tensors if quantizable(tensor.name, tensor.shape)
    }


def test_base_types_come_from_the_tools_own_help(tools: Toolset) -> None:
    known = base_types(tools)
    assert (known["Q4_K_M"], known["Q4_K"], known["IQ2_XXS"], known["IQ1_M"], known["F16"]) == (15, 15, 19, 31, 1)


def test_the_mixture_knows_whether_there_is_an_imatrix(small: Model, tools: Toolset, trunk_imatrix: Path) -> None:
    """IQ3_XXS gives ffn_down more bits without an imatrix; a dry run with an empty one behaves like with a real one."""
    without = dry_run(small, "IQ3_XXS", "", tools)
    empty = dry_run(small, "IQ3_XXS", "", tools, calibrated=True)
    command: list[str | Path] = [
        tools.tool("llama-quantize"),
        "--dry-run",
        "--imatrix",
        trunk_imatrix,
        small.path,
        "IQ3_XXS",
    ]
    real = run_tool(command).lines
    size = quantized_size(real)
    assert size and without.mib > empty.mib == size[0]
    assert {name: line.target for name, line in empty.tensors.items()} == {
        line.name: line.target for line in tensor_lines(real)
    }


def test_a_calibrated_policy_is_planned_as_with_an_imatrix(
    make_policy: MakePolicy, small: Model, tools: Toolset, trunk_imatrix: Path
) -> None:
    policy = make_policy("# the mixture alone", base_type="IQ3_XXS")
    plain = make_plan(small, policy, {}, tools)
    calibrated = make_plan(small, policy, {}, tools, trunk_imatrix)
    assert not plain.calibrated and calibrated.calibrated and plain.identity != calibrated.identity
    assert plain.n_bytes > calibrated.n_bytes
    assert {entry.source for entry in plain.entries} == {"mixture", "kept"}


def test_identity_is_of_the_content(small: Model, tools: Toolset) -> None:
    policies = load_plugins().policies()
    first = make_plan(small, policies["compact"], SMALL, tools)
    assert (
        first.identity
        == make_plan(small, policies["compact"], {name: str(value) for name, value in SMALL.items()}, tools).identity
    )
    assert first.identity != make_plan(small, policies["compact"], {}, tools).identity
    assert first.identity != make_plan(small, policies["i-compact"], SMALL, tools).identity


def test_types_that_need_data(small: Model, tools: Toolset) -> None:
    plan = make_plan(small, load_plugins().policy("i-nano"), {**SMALL, "draft_head": "IQ2_XXS"}, tools)
    needing = {entry.name for entry in plan.needing_data}
    assert needing == {entry.name for entry in plan.entries if entry.type in ("IQ2_S", "IQ2_XXS")}
    assert sum(entry.draft_head for entry in plan.needing_data) == 11
    uniform = make_plan(small, load_plugins().policy("uniform"), {"type": "IQ2_XXS"}, tools)
    assert {"token_embd.weight", "output.weight"} <= {entry.name for entry in uniform.needing_data}


# --- built-in policies to compare with --------------------------------------------------------------------------------
def test_uniform(small: Model, tools: Toolset) -> None:
    plan = make_plan(small, load_plugins().policy("uniform"), {"type": "q3_k"}, tools)
    assert {entry.type for entry in plan.entries if entry.source != "kept"} == {"Q3_K"} and plan.base_type == "Q3_K"


def test_draft_head_only(small: Model, tools: Toolset) -> None:
    policy = load_plugins().policy("draft-head-only")
    plan = make_plan(small, policy, {"draft_head": "Q4_K", "draft_head.eh_proj": "Q6_K", "trunk": "keep"}, tools)
    for entry in plan.entries:
        if entry.source != "kept":
            expected = "F16" if not entry.draft_head else "Q6_K" if "eh_proj" in entry.name else "Q4_K"
            assert (entry.type, entry.fallback) == (expected, None)


# --- shapes and rules that llama-quantize would not follow ------------------------------------------------------------
def odd_model(tmp_path: Path, **extra: tuple[int, ...]) -> Model:
    return model_of(
        write_header_only(
            tmp_path / "odd.gguf", TINY, extra={f"blk.1.{name}.weight": shape for name, shape in extra.items()}
        )
    )


def test_a_row_that_is_no_multiple_of_a_block_falls_back_and_is_marked(
    make_policy: MakePolicy, tools: Toolset, tmp_path: Path
) -> None:
    model = odd_model(tmp_path, attn_odd=(96, 64), attn_odder=(50, 64))
    plan = make_plan(model, make_policy(r"^blk\.1\.attn_odd(er)?\.weight$=IQ2_XXS"), {}, tools)
    fallen = {entry.name: (entry.fallback, entry.type, entry.n_bytes) for entry in plan.fallbacks}
    assert fallen == {
        "blk.1.attn_odd.weight": ("IQ2_XXS", "IQ4_NL", 64 * 3 * 18),
        "blk.1.attn_odder.weight": ("IQ2_XXS", "F16", 64 * 50 * 2),
    }


def test_a_fallback_of_the_mixture_is_marked_too(make_policy: MakePolicy, tools: Toolset, tmp_path: Path) -> None:
    model = odd_model(tmp_path, attn_odd=(96, 64))
    plan = make_plan(model, make_policy("# nothing", base_type="Q4_K_S"), {}, tools)
    (entry,) = plan.fallbacks
    assert (entry.fallback, entry.type, entry.source) == ("Q4_K", "Q5_0", "mixture")


def test_a_type_without_a_fallback_is_refused_with_the_tensor(
    make_policy: MakePolicy, tools: Toolset, tmp_path: Path
) -> None:
    model = odd_model(tmp_path, attn_odd=(50, 64))
    with pytest.raises(
        ShapeUnfit, match=r"blk\.1\.attn_odd\.weight has rows of 50 values, and type Q8_0 needs a multiple of 32"
    ):
        make_plan(model, make_policy(r"^blk\.1\.attn_odd\.weight$=Q8_0"), {}, tools)


def test_rules_under_a_base_type_that_ignores_them_are_refused(
    make_policy: MakePolicy, small: Model, tools: Toolset
) -> None:
    with pytest.raises(
        PlanMismatch, match=r"blk\.3\.attn_q\.weight: .*mine\.jinja:1 says Q4_K, but .* would write BF16"
    ) as caught:
        make_plan(small, make_policy(r"^blk\.3\.attn_q\.weight$=Q4_K", base_type="BF16"), {}, tools)
    assert "--set base_type=" in (caught.value.hint or "")


def test_a_rule_for_what_is_never_quantized_changes_nothing(
    make_policy: MakePolicy, small: Model, tools: Toolset
) -> None:
    plan = make_plan(small, make_policy(r"^blk\.0\.attn_norm\.weight$=Q4_K"), {}, tools)
    entry = next(entry for entry in plan.entries if entry.name == "blk.0.attn_norm.weight")
    assert (entry.type, entry.source) == ("F32", "kept")


def test_a_pattern_only_python_understands_is_refused(make_policy: MakePolicy, small: Model, tools: Toolset) -> None:
    with pytest.raises(TemplateFailed, match="llama-quantize does not understand a pattern"):
        make_plan(small, make_policy(r"^blk\.3\.attn_(?i:q)\.weight$=Q4_K"), {}, tools)


@pytest.mark.parametrize(
    ("text", "parameters", "error", "says"),
    [
        ("", {"base_type": "Q4KM"}, TypeUnknown, "'Q4KM' is not a base type of llama-quantize; it knows: Q4_K_M"),
        (
            "\n{{ 'token_embd.weight' | exactly }}={{ type }}X",
            {},
            TypeUnknown,
            "mine.jinja:2: 'Q4_KX' is not a tensor type",
        ),
        ("\n\n^token_embd=Q4_KM\n", {}, TypeUnknown, "mine.jinja:3: 'Q4_KM' is not a tensor type"),
        ("# ok\n{% for t in tensors %}\n{{ t.name }}\n{% endfor %}", {}, TemplateFailed, ".weight' is not of the form"),
    ],
)
def test_mistakes_are_named_before_anything_is_run(
    make_policy: MakePolicy,
    small: Model,
    tools: Toolset,
    text: str,
    parameters: dict[str, str],
    error: type[ApexError],
    says: str,
) -> None:
    policy = make_policy(text, parameters={"type": Parameter("Q4_K")})
    with pytest.raises(error) as caught:
        make_plan(small, policy, parameters, tools)
    assert says in caught.value.message


def test_an_architecture_the_build_does_not_know(make_policy: MakePolicy, tools: Toolset, tmp_path: Path) -> None:
    model = model_of(write_header_only(tmp_path / "m.gguf", TINY, arch="qwen99moe"))
    with pytest.raises(ToolFailed, match="qwen99moe"):
        make_plan(model, make_policy(""), {}, tools)


# --- the file as it is written ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tier", "parameters"), [("compact", {}), ("i-nano", {"draft_head": "Q8_0"}), ("uniform", {"type": "Q6_K"})]
)
def test_the_written_file_is_the_plan_to_the_byte(
    small: Model, tools: Toolset, trunk_imatrix: Path, tmp_path: Path, tier: str, parameters: dict[str, str]
) -> None:
    policy = load_plugins().policy(tier)
    imatrix = trunk_imatrix if policy.calibrated else None
    plan = make_plan(small, policy, {**(SMALL if "edge" in policy.parameters else {}), **parameters}, tools, imatrix)
    added: dict[str, str | int | float | bool] = {
        "apex.policy": tier,
        "general.name": "Ähm",
        "apex.n": 7,
        "apex.f": 0.5,
        "apex.b": True,
    }
    arguments: list[str | Path] = []
    for key, value in added.items():
        kind = {str: "str", int: "int", float: "float", bool: "bool"}[type(value)]
        arguments += ["--override-kv", f"{key}={kind}:{str(value).lower() if kind == 'bool' else value}"]
    if imatrix:
        arguments += ["--imatrix", imatrix]
        added |= imatrix_keys(imatrix, read_imatrix(imatrix))
    out = write(plan, small, tools, tmp_path / "out put é.gguf", *arguments)
    header = read_header(out)
    assert {tensor.name: (tensor.type, tensor.n_bytes) for tensor in header.tensors} == {
        e.name: (e.type, e.n_bytes) for e in plan.entries
    }
    assert sum(tensor.n_bytes for tensor in header.tensors) == plan.n_bytes
    assert out.stat().st_size == file_size(plan, small, added)
    assert header.metadata["general.file_type"] == base_types(tools)[plan.base_type]


def test_the_size_of_the_file_of_a_split_model(small: Model, tools: Toolset, tmp_path: Path) -> None:
    run_tool([tools.tool("llama-gguf-split"), "--split", "--split-max-tensors", "50", small.path, tmp_path / "part"])
    model = model_of(tmp_path / "part-00001-of-00003.gguf")
    plan = make_plan(model, load_plugins().policy("uniform"), {"type": "Q4_0"}, tools)
    out = write(plan, model, tools, tmp_path / "out.gguf", "--override-kv", f"apex.long=str:{'x' * 127}")
    assert out.stat().st_size == file_size(plan, model, {"apex.long": "x" * 127})


def test_an_alignment_that_llama_quantize_breaks_is_refused(tools: Toolset, tmp_path: Path) -> None:
    shape = replace(TINY, value_heads=16)  # every tensor a multiple of 64 bytes
    with_alignment: dict[str, str | int] = {"general.alignment": 64, "general.name": ""}
    path = write_header_only(tmp_path / "m.gguf", shape, metadata=with_alignment)
    if end := read_end_of_header(path) % 64:  # and the header too, as a writer with that alignment pads it
        write_header_only(path, shape, metadata={**with_alignment, "general.name": "x" * (64 - end)})
    model = model_of(path)
    plan = make_plan(model, load_plugins().policy("uniform"), {"type": "Q4_0"}, tools)
    with pytest.raises(ModelInvalid, match=r"general\.alignment is 64; llama-quantize copies that key but"):
        file_size(plan, model, {})
    with pytest.raises(ModelInvalid):  # what it would leave
        read_header(write(plan, model, tools, tmp_path / "out.gguf"))


def read_end_of_header(path: Path) -> int:
    data_bytes = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)
    return path.stat().st_size - data_bytes
