"""Rules: valid lines, and patterns that would match more than intended."""

from __future__ import annotations

import pytest

from apex_build.errors import ApexError, TemplateFailed, TypeUnknown
from apex_build.gguf_model.catalogue import Model
from apex_build.native.ggml import Ggml
from apex_build.policy import sandbox
from apex_build.policy.render import find, only_name
from apex_build.policy.rules import Rule, apply_rules, parse_rules, rules_text
from apex_build.policy.sandbox import exactly


def parsed(ggml: Ggml, *lines: str) -> tuple[Rule, ...]:
    return parse_rules([(line, f"mine.jinja:{number}") for number, line in enumerate(lines, 1)], ggml)


def applied(ggml: Ggml, model: Model, *lines: str) -> dict[str, str]:
    return {name: rule.line for name, rule in apply_rules(parsed(ggml, *lines), model.tensors).items()}


def test_lines_comments_and_the_file_for_llama_quantize(ggml: Ggml) -> None:
    rules = parsed(ggml, "# a comment", "", r"  ^blk\.3\.attn_q\.weight$=q4_K  ", "^x$=F16 # optional", "^y$=Q8_0# why")
    assert [(rule.where, rule.optional) for rule in rules] == [
        ("mine.jinja:3", False),
        ("mine.jinja:4", True),
        ("mine.jinja:5", False),
    ]
    assert rules_text(rules) == "^blk\\.3\\.attn_q\\.weight$=Q4_K\n^x$=F16\n^y$=Q8_0\n"


@pytest.mark.parametrize(
    ("line", "error", "says"),
    [
        ("blk.0", TemplateFailed, "is not of the form pattern=type"),
        ("=Q4_K", TemplateFailed, "is not of the form pattern=type"),
        ("x=", TemplateFailed, "is not of the form pattern=type"),
        ("x = Q4_K", TemplateFailed, "without spaces"),
        ("x\ud800=Q4_K # optional", TemplateFailed, "without spaces"),
        ("x\x00=Q4_K # optional", TemplateFailed, "without spaces"),
        ("x=Q4_K y=Q4_K", TemplateFailed, "without spaces"),
        ("a=b=Q4_K", TypeUnknown, "is not a tensor type"),
        ("x=Q4_KM", TypeUnknown, "'Q4_KM' is not a tensor type"),
        ("x=Q8_K", TypeUnknown, "llama-quantize cannot write tensors of type Q8_K"),
        ("x=I32", TypeUnknown, "llama-quantize cannot write tensors of type I32"),
        (r"^blk\.\D=Q4_K", TemplateFailed, "lower-cases patterns"),
        ("(x=Q4_K", TemplateFailed, "is not a regular expression"),
    ],
)
def test_bad_lines_are_named_with_their_place(ggml: Ggml, line: str, error: type[ApexError], says: str) -> None:
    with pytest.raises(error) as caught:
        parsed(ggml, "# first", line)
    assert caught.value.message.startswith("mine.jinja:2: ") and says in caught.value.message


def test_an_unknown_type_comes_with_near_names(ggml: Ggml) -> None:
    with pytest.raises(TypeUnknown) as caught:
        parsed(ggml, "x=IQ2XXS")
    assert "IQ2_XXS" in (caught.value.hint or "")


def test_the_first_rule_that_finds_a_tensor_decides(ggml: Ggml, small: Model) -> None:
    found = applied(ggml, small, r"^blk\.6\.ffn_up_exps\.weight$=Q4_K", r"^blk\.\d+\.ffn_(up|gate)_exps\.weight$=Q3_K")
    assert found["blk.6.ffn_up_exps.weight"] == r"^blk\.6\.ffn_up_exps\.weight$=Q4_K"
    assert found["blk.5.ffn_up_exps.weight"] == r"^blk\.\d+\.ffn_(up|gate)_exps\.weight$=Q3_K"
    assert len(found) == 14


def test_a_pattern_that_is_not_anchored_may_find_one_role(ggml: Ggml, small: Model) -> None:
    assert len(applied(ggml, small, "ffn_.*_exps=Q3_K")) == 21
    assert len(applied(ggml, small, r"blk\.6\.ffn_.*_exps=Q3_K", "^.*$=Q4_K")) == len(small.tensors)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("attn_q", "also matches 'blk.0.attn_qkv.weight', in the middle of a word"),
        (
            "ffn_up",
            "finds tensors of several roles: blk.0.ffn_up_exps.weight (routed), blk.0.ffn_up_shexp.weight (shared)",
        ),
        (r"blk\.6\.ffn", "finds tensors of several roles"),
        (r"^blk\.9\.attn_q\.weight$", "matches no tensor of the model"),
    ],
)
def test_patterns_that_find_by_accident_or_nothing_are_refused(
    ggml: Ggml, small: Model, pattern: str, says: str
) -> None:
    with pytest.raises(TemplateFailed) as caught:
        applied(ggml, small, f"{pattern}=Q4_K")
    assert caught.value.message.startswith("mine.jinja:1: ") and says in caught.value.message


def test_a_block_number_that_is_the_beginning_of_others_is_refused(ggml: Ggml, big: Model) -> None:
    with pytest.raises(TemplateFailed, match=r"also matches 'blk\.30\.ffn_gate_exps\.weight'|also matches 'blk\.3\d"):
        applied(ggml, big, "blk.3=Q4_K")


def test_an_optional_rule_may_find_nothing(ggml: Ggml, small: Model) -> None:
    assert applied(ggml, small, r"^blk\.9\.attn_q\.weight$=Q4_K # optional") == {}


def test_a_pattern_that_backtracks_for_years_is_stopped(ggml: Ggml, small: Model) -> None:
    with pytest.raises(TemplateFailed, match=r"more computing than is allowed|not done within"):
        applied(ggml, small, r"^(((\w|\.)+)+)+!$=Q4_K")


def test_a_pattern_for_one_name_is_looked_up() -> None:
    """It finds the same as a search; a pattern that is more than a name is searched for."""
    names = ["blk.3.attn_q.weight", "blk.33attn_q.weight", "output.weight", "a-b_c"]
    exact = [exactly(name) for name in (*names, "absent", "^", "a\\b")]
    assert [only_name(pattern) for pattern in exact] == [*names, "absent", "^", "a\\b"]
    searched = [r"^blk.3.attn_q\.weight$", r"^output\.weight", r"^\d$", r"^a+$", r"^$", r"^a\-b_c$|x"]
    assert [only_name(pattern) for pattern in searched] == [None] * len(searched)
    looked_up = [[list(place) for place in places] for places in find(exact, names).values()]
    assert looked_up == [[list(place) for place in places] for places in sandbox.find(exact, names)]
