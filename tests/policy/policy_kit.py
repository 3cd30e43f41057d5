"""Shared names of the policy tests."""

from __future__ import annotations

from collections.abc import Callable

from apex_build.hookspecs import PolicySpec

# depth bounds with which a model of six layers has all zones
SMALL = {"edge": 1, "near": 1, "attention_edge": 1}
TIERS = (
    "quality",
    "i-quality",
    "balanced",
    "i-balanced",
    "compact",
    "i-compact",
    "mini",
    "i-mini",
    "i-nano",
    "i-micro",
)
WITH_SMALL_HEAD = tuple(f"{tier}-mtp" for tier in TIERS if tier.startswith("i-"))

MakePolicy = Callable[..., PolicySpec]
