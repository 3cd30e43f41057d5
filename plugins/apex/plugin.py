"""The APEX tiers: a type for each tensor by role and depth (Adaptive Precision for EXpert models); and policies for
the head.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from apex_build.plugin_api import Parameter, PolicySpec, hookimpl

APEX_API = 3

_HERE = Path(__file__).parent

_INHERIT = ("inherit",)
_TRUNK = ("inherit", "keep")
QUARTER = "quarter"  # a mixture for the head, in head.jinja
# What draft_head=auto chooses among: routed experts (of a dense head: feed-forward) and the rest. What a head loses
# is not known before it is measured: docs/results/draft-head.md.
MEASURED = ("Q8_0", "Q6_K", "Q5_K", "Q4_K+Q5_K", "Q3_K+Q5_K", "IQ3_XXS+Q5_K", "IQ2_S+Q5_K", "IQ2_XXS+Q4_K")
HEAD_PARTS = {
    "draft_head.routed": Parameter("inherit", "type", "the head's routed experts", _INHERIT),
    "draft_head.shared": Parameter("inherit", "type", "the head's shared expert", _INHERIT),
    "draft_head.dense": Parameter(
        "inherit", "type", "the head's dense feed-forward, where it has no experts", _INHERIT
    ),
    "draft_head.attention": Parameter("inherit", "type", "the head's attention", _INHERIT),
    "draft_head.eh_proj": Parameter("inherit", "type", "nextn.eh_proj, which joins token and hidden state", _INHERIT),
    "draft_head.other": Parameter("inherit", "type", "parts of the head without their own setting", _INHERIT),
}
PARAMETERS = {
    "edge": Parameter(5, "int", "routed and shared experts: this many layers at either end of the trunk are 'edge'"),
    "near": Parameter(5, "int", "routed experts: this many layers next to the edges are 'near', the rest is 'middle'"),
    "routed": Parameter("inherit", "type", "all of the trunk's routed experts; 'keep' copies them", _TRUNK),
    "shared": Parameter("inherit", "type", "the trunk's shared experts", _TRUNK),
    "dense": Parameter("inherit", "type", "the trunk's dense feed-forward", _TRUNK),
    "attention": Parameter("inherit", "type", "the trunk's attention and SSM", _TRUNK),
    "token_embd": Parameter(
        "inherit", "type", "token embeddings, by default as the base type's mixture has them", _TRUNK
    ),
    "output": Parameter("inherit", "type", "the output matrix, by default as the base type's mixture has it", _TRUNK),
    "attention_edge": Parameter(3, "int", "attention and SSM: this many layers at either end of the trunk are 'edge'"),
    "draft_head": Parameter(
        "tier",
        "type",
        "the whole draft head; A+B: its routed experts A, the rest B; 'tier' is APEX's choice, 'quarter' "
        "IQ2_XXS+Q4_K "
        "(it cost 1.5 points of agreement on the test model), "
        "'auto' the smallest of several mixtures that loses little on this model: apex quantize measures them",
        ("tier", QUARTER),
        mixtures=True,
        measured=MEASURED,
        bound="draft_loss",
    ),
    "starved": Parameter(
        "inherit",
        "type",
        "routed experts of which one saw fewer than starved_tokens tokens of the calibration text: at least this type",
        _INHERIT,
    ),
    "starved_tokens": Parameter(64, "int", "bound for starved; it needs an imatrix"),
    "draft_loss": Parameter(
        0.5,
        "number",
        "bound for draft_head=auto: points of agreement, and twice as many per cent of the tokens per step",
    ),
    **HEAD_PARTS,
}

# template -> base type, description. The types of each tier stand in its template.
_TIERS = {
    "quality": ("Q6_K", "routed experts at 6 bits, 4 in the middle of the trunk"),
    "balanced": ("Q5_K_M", "routed experts at 6 bits, 5 in the middle"),
    "compact": ("Q4_K_M", "routed experts at 4 bits, 3 in the middle"),
    "mini": ("Q3_K_M", "i-mini for models without calibration data, Q2_K for IQ2_S (this project's, not APEX's)"),
    "i-mini": ("Q3_K_M", "routed experts at 3 bits, 2.5 in the middle"),
    "i-nano": ("IQ2_XXS", "routed experts at 3 bits, 2 in the middle"),
    "i-micro": ("IQ1_M", "routed experts at 3 bits, 1.75 in the middle"),
}


@hookimpl
def apex_policies() -> list[PolicySpec]:
    policies = [_policy(tier, tier, calibrated=tier.startswith("i-")) for tier in _TIERS]
    # the same types, with an importance matrix
    policies += [_policy(f"i-{tier}", tier, calibrated=True) for tier in ("quality", "balanced", "compact")]
    return [*policies, *(_with_small_head(policy) for policy in policies if policy.calibrated), _head_alone()]


def _policy(name: str, tier: str, *, calibrated: bool) -> PolicySpec:
    base_type, description = _TIERS[tier]
    return PolicySpec(name, _HERE / f"{tier}.jinja", base_type, calibrated, PARAMETERS, description, fit=True)


def _with_small_head(policy: PolicySpec) -> PolicySpec:
    """The tier with the smallest head that loses little: only calibrated tiers, since small heads need data."""
    parameters = {**policy.parameters, "draft_head": replace(PARAMETERS["draft_head"], default="auto")}
    description = (
        f"{policy.name}, with the smallest draft head that loses little, measured on the model (draft_head=auto)"
    )
    return replace(
        policy,
        name=f"{policy.name}-mtp",
        parameters=parameters,
        description=description,
        needs=("head",),
        otherwise=policy.name,
    )


def _head_alone() -> PolicySpec:
    trunk = "the type of the trunk, token_embd and output; 'keep' copies them"
    return PolicySpec(
        name="draft-head-only",
        template=_HERE / "draft-head-only.jinja",
        base_type="Q8_0",
        parameters={
            "trunk": Parameter("Q8_0", "type", trunk, ("keep",)),
            "draft_head": Parameter(
                "Q4_K", "type", "the whole draft head; A+B: its routed experts A, the rest B", mixtures=True
            ),
            **HEAD_PARTS,
        },
        needs=("head",),
        sweeps=True,
        description="one type for the trunk, another for the draft head: what does the head's type cost?",
    )
