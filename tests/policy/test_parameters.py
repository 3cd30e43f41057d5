"""Parameters: defaults, kinds, and rejected values."""

from __future__ import annotations

import pytest
from policy_kit import MakePolicy

from apex_build.errors import ApexError, ParameterUnknown, TypeUnknown
from apex_build.gguf_model.catalogue import Model
from apex_build.hookspecs import Parameter, PolicySpec
from apex_build.native.ggml import Ggml
from apex_build.parameters import parse_settings, resolve
from apex_build.policy.render import render


@pytest.fixture
def policy(make_policy: MakePolicy) -> PolicySpec:
    parameters = {
        "head": Parameter("tier", "type", words=("tier",)),
        "head.routed": Parameter("Q4_K"),
        "edge": Parameter(5, "int"),
        "loud": Parameter(False, "flag"),
        "note": Parameter("none", "text"),
    }
    return make_policy(
        "{{ head }} {{ head_routed }} {{ edge + 1 }} {{ loud }} {{ note }}",
        parameters=parameters,
        base_type="{head.routed}",
    )


def test_defaults_and_values(policy: PolicySpec, ggml: Ggml, small: Model) -> None:
    values = resolve(policy, {}, ggml)
    assert values == {
        "head": "tier",
        "head.routed": "Q4_K",
        "edge": 5,
        "loud": False,
        "note": "none",
        "base_type": "Q4_K",
    }
    given = parse_settings(["head=q6_k", "edge=2", "loud=yes", "note=a=b", "head.routed=IQ2_xxs", "edge=3"])
    values = resolve(policy, given, ggml)
    assert values == {
        "head": "Q6_K",
        "head.routed": "IQ2_XXS",
        "edge": 3,
        "loud": True,
        "note": "a=b",
        "base_type": "IQ2_XXS",
    }
    assert render(policy, values, small, ())[0][0] == "Q6_K IQ2_XXS 4 True a=b"
    assert resolve(policy, {"base_type": "q3_k_m"}, ggml)["base_type"] == "Q3_K_M"


@pytest.mark.parametrize(
    ("setting", "error", "says"),
    [
        ("heed=Q4_K", ParameterUnknown, "has no parameter 'heed'; near it: head"),
        ("edge=-1", ParameterUnknown, "parameter 'edge' of policy 'mine' takes a whole number from 0, not '-1'"),
        ("edge=two", ParameterUnknown, "takes a whole number"),
        ("edge=99999999999", ParameterUnknown, "takes a whole number"),
        ("loud=maybe", ParameterUnknown, "takes yes or no"),
        (
            "head=Q4KM",
            TypeUnknown,
            "parameter 'head' of policy 'mine': 'Q4KM' is not a tensor type of this build's ggml (or: tier)",
        ),
        ("head.routed=tier", TypeUnknown, "parameter 'head.routed'"),
        ("head=Q8_K", TypeUnknown, "cannot write"),
    ],
)
def test_bad_values(policy: PolicySpec, ggml: Ggml, setting: str, error: type[ApexError], says: str) -> None:
    with pytest.raises(error) as caught:
        resolve(policy, parse_settings([setting]), ggml)
    assert says in caught.value.message


@pytest.mark.parametrize("setting", ["head", "=Q4_K", "head=", " = "])
def test_settings_that_are_none(setting: str) -> None:
    with pytest.raises(ParameterUnknown, match="is not of the form name=value"):
        parse_settings([setting])
