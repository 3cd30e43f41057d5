"""What plugins provide, with what loading adds: the plugin that each comes from, and a digest of its code.

Authors of plugins never see these fields: they write a `PolicySpec` or an `Evaluator`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from apex_build.hookspecs import Evaluator, PolicySpec


@dataclass(frozen=True)
class LoadedPolicy(PolicySpec):
    """`library`: plugin -> folders of the templates of all plugins, for include and extends."""

    plugin: str = ""
    library: Mapping[str, tuple[Path, ...]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class LoadedEvaluator(Evaluator):
    """`code` identifies the plugin's code; empty for a built-in one."""

    plugin: str = ""
    code: str = ""


def loaded_policy(policy: PolicySpec, plugin: str, library: Mapping[str, tuple[Path, ...]]) -> LoadedPolicy:
    return LoadedPolicy(**_given(policy, PolicySpec), plugin=plugin, library=library)


def loaded_evaluator(evaluator: Evaluator, plugin: str, code: str, **changed: Any) -> LoadedEvaluator:
    return LoadedEvaluator(**{**_given(evaluator, Evaluator), **changed}, plugin=plugin, code=code)


def library_of(policy: PolicySpec) -> tuple[str, Mapping[str, tuple[Path, ...]]]:
    """The plugin, and the templates of all plugins; for a policy from no plugin, 'policy' and no templates."""
    if isinstance(policy, LoadedPolicy):
        return policy.plugin, policy.library
    return "policy", {}


def origin_of(evaluator: Evaluator) -> tuple[str, str]:
    """The plugin and its code; empty for an evaluator from no plugin."""
    return (evaluator.plugin, evaluator.code) if isinstance(evaluator, LoadedEvaluator) else ("", "")


def _given(spec: Any, kind: type) -> dict[str, Any]:
    return {one.name: getattr(spec, one.name) for one in fields(kind)}
