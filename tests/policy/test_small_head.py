"""Mixtures for the draft head, and the `-mtp` policies, which measure their mixture on the model (docs/policies.md)."""

from __future__ import annotations

import pytest
from policy_kit import WITH_SMALL_HEAD

from apex_build.gguf_model.catalogue import Model
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins
from apex_build.policy.plan import Plan, make_plan

MIXTURE = {"routed": "IQ2_XXS", "shared": "Q4_K", "attention": "Q4_K", "nextn": "Q4_K"}
CAUTIOUS = {"routed": "Q3_K", "shared": "Q5_K", "attention": "Q5_K", "nextn": "Q5_K"}


def plan_of(model: Model, tools: Toolset, policy: str, **parameters: str) -> Plan:
    return make_plan(model, load_plugins().policy(policy), parameters, tools)


@pytest.mark.parametrize("policy", WITH_SMALL_HEAD)
def test_the_trunk_is_the_tiers_and_the_head_cautious_before_it_is_measured(
    policy: str, big: Model, tools: Toolset
) -> None:
    plan, tier = plan_of(big, tools, policy), plan_of(big, tools, policy.removesuffix("-mtp"))
    trunk = [(entry.name, entry.type) for entry in plan.entries if not entry.draft_head]
    assert trunk == [(entry.name, entry.type) for entry in tier.entries if not entry.draft_head]
    head = {entry.role: entry.type for entry in plan.entries if entry.draft_head and entry.role in MIXTURE}
    assert head == CAUTIOUS


@pytest.mark.parametrize("given", ["quarter", "IQ2_XXS+Q4_K", "iq2_xxs+q4_k"])
def test_a_mixture_is_of_the_experts_and_the_rest(given: str, small: Model, tools: Toolset) -> None:
    plan = plan_of(small, tools, "i-nano", draft_head=given)
    assert {entry.role: entry.type for entry in plan.entries if entry.draft_head and entry.role in MIXTURE} == MIXTURE


def test_it_is_a_quarter_of_the_head_at_q8_0(big: Model, tools: Toolset) -> None:
    """The sizes given in docs/results/draft-head.md."""
    small = plan_of(big, tools, "i-nano", draft_head="quarter").bytes_by_role["draft head"]
    large = plan_of(big, tools, "i-nano", draft_head="Q8_0").bytes_by_role["draft head"]
    assert (small, large) == (231_589_888, 899_008_512) and round(small / large, 3) == 0.258


def test_it_needs_the_heads_calibration_data(big: Model, tools: Toolset) -> None:
    policy = load_plugins().policy("i-nano-mtp")
    assert policy.calibrated
    needing = {
        entry.role for entry in plan_of(big, tools, "i-nano", draft_head="quarter").needing_data if entry.draft_head
    }
    assert needing == {"routed"}


def test_what_is_set_wins(small: Model, tools: Toolset) -> None:
    plan = make_plan(
        small, load_plugins().policy("i-nano"), {"draft_head": "quarter", "draft_head.eh_proj": "Q6_K"}, tools
    )
    assert next(entry.type for entry in plan.entries if entry.name.endswith("nextn.eh_proj.weight")) == "Q6_K"
    assert {entry.type for entry in plan.entries if entry.draft_head and entry.role == "routed"} == {"IQ2_XXS"}
    one = plan_of(small, tools, "i-nano-mtp", draft_head="Q3_K")
    assert {entry.type for entry in one.entries if entry.draft_head and entry.role in MIXTURE} == {"Q3_K"}
