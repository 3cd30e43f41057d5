"""Remarks on a plan for the user: shapes that cannot hold their type, tensors without a rule."""

from __future__ import annotations

from apex_build.native.ggml import Ggml
from apex_build.policy.plan import MIXTURE, Entry, Plan

_MUCH = 0.01  # of all bytes
# what the tiers leave to the base type on purpose
_MEANT = ("embedding", "output")


def remarks(plan: Plan, ggml: Ggml) -> list[str]:
    """Warnings."""
    return [line for line in (_fallbacks(plan, ggml), _unnamed(plan)) if line]


def left_to_base_type(plan: Plan) -> str | None:
    """Tensors without a rule, with bytes and share; None if every quantized tensor has one."""
    left = [entry for entry in plan.entries if entry.source == MIXTURE]
    return f"left to the mixture of {plan.base_type}: {_listed(left, plan)}" if left else None


def _unnamed(plan: Plan) -> str | None:
    left = [entry for entry in plan.entries if entry.source == MIXTURE and entry.role not in _MEANT]
    if sum(entry.n_bytes for entry in left) <= _MUCH * plan.n_bytes:
        return None
    return f"no rule of policy '{plan.policy}' names {_listed(left, plan)}: the mixture of {plan.base_type} decides"


def _listed(entries: list[Entry], plan: Plan) -> str:
    """`token_embd.weight (Q2_K) and 3 others, 12.34 MB, 1.2 % of all`"""
    largest = sorted(entries, key=lambda entry: -entry.n_bytes)
    named = ", ".join(f"{entry.name} ({entry.type})" for entry in largest[:2])
    more = f" and {len(largest) - 2} more" if len(largest) > 2 else ""
    n_bytes = sum(entry.n_bytes for entry in entries)
    return f"{named}{more}, {n_bytes / 1e6:.2f} MB, {n_bytes / plan.n_bytes:.1%} of the bytes"


def _fallbacks(plan: Plan, ggml: Ggml) -> str | None:
    if not plan.fallbacks:
        return None
    more = 0.0
    for entry in plan.fallbacks:
        more += entry.n_bytes - entry.n_elements * ggml.type_traits(entry.fallback or entry.type).bits_per_weight / 8
    first = max(plan.fallbacks, key=lambda entry: entry.n_bytes)
    others = f" and {len(plan.fallbacks) - 1} more tensors" if len(plan.fallbacks) > 1 else ""
    return (
        f"{first.name} (rows of {first.shape[0]}: {first.type}, for {first.fallback} does not fit){others}: "
        f"types that the shapes can hold cost {more / 1e6:.2f} MB more"
    )
