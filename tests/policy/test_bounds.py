"""What rendering a template costs the calling process."""

from __future__ import annotations

from counted import counted
from policy_kit import MakePolicy

from apex_build.gguf_model.catalogue import Model
from apex_build.native.ggml import Ggml
from apex_build.native.toolset import Toolset
from apex_build.policy.render import render
from apex_build.policy.rules import apply_rules, parse_rules


def test_thousands_of_plain_lines_cost_the_parent_little(make_policy: MakePolicy, small: Model, tools: Toolset) -> None:
    text = "".join(f"^blk\\.0\\.attn_qkv\\.weight{'x?' * (number % 7)}$=Q4_K # {number}\n" for number in range(16_000))
    policy = make_policy(text)
    ggml = Ggml(tools)
    with counted() as asked:
        lines = render(policy, {}, small, ())
        rules = parse_rules(lines, ggml)
    assert asked.lines < 60 * 16_000
    assert [where.rpartition(":")[2] for _, where in (lines[0], lines[7], lines[15_999])] == ["1", "8", "16000"]
    assert len(rules) == 16_000
    with counted() as applied:
        assert set(apply_rules(rules, small.tensors)) == {"blk.0.attn_qkv.weight"}
    assert applied.lines < 60 * 16_000


def test_lines_of_a_loop_have_its_place(make_policy: MakePolicy, small: Model) -> None:
    lines = render(make_policy("a=Q4_K\nb=Q4_K\n{% for n in range(2) %}\na=Q4_K\n{% endfor %}\n"), {}, small, ())
    assert [where.rpartition(":")[2] for line, where in lines if line] == ["1", "2", "4", "4"]
