"""Policies that compute: the plugin's function gives each tensor its type, instead of a template."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from apex_build.errors import PluginFailed
from apex_build.gguf_model.catalogue import Model
from apex_build.hookspecs import Computed, PolicySpec, PolicyTask
from apex_build.loaded import library_of
from apex_build.native.ggml import Ggml
from apex_build.parameters import Value
from apex_build.plugin_blame import blame
from apex_build.policy.render import Rendered
from apex_build.policy.sandbox import exactly
from apex_build.policy.size import other_bytes


def task_of(
    policy: PolicySpec,
    values: Mapping[str, Value],
    model: Model,
    quantizable: Collection[str],
    ggml: Ggml,
    *,
    calibrated: bool,
    build: str = "",
) -> PolicyTask:
    return PolicyTask(policy.name, model, values, quantizable, ggml, calibrated, other_bytes(model), build)


def compute(policy: PolicySpec, task: PolicyTask) -> tuple[Rendered, Computed]:
    """The function's result, as the lines that a template would render. Raises PluginFailed for anything but types
    of the model's tensors, and what the function raises for the user.
    """
    assert policy.compute is not None
    plugin, _ = library_of(policy)
    with blame(plugin):
        found = policy.compute(task)
    about = f"plugin '{plugin}': policy '{policy.name}'"
    if not isinstance(found, Computed):
        raise PluginFailed(f"{about} must return a Computed, not {found!r:.200}")
    names = {tensor.name for tensor in task.model.tensors}
    for name, type_name in found.types.items():
        if name not in names or not isinstance(type_name, str):
            raise PluginFailed(f"{about} gives {name!r:.80} the type {type_name!r:.40}: expected a tensor and a type")
    _check_figures(found.predicted, about)
    where = f"policy '{policy.name}'"
    lines = [(f"{exactly(name)}={type_name}", where) for name, type_name in found.types.items()]
    warnings = [(f"# warning: {' '.join(text.split())}", where) for text in found.warnings]
    return Rendered([*lines, *warnings], []), found


def predict(policy: PolicySpec, task: PolicyTask, types: Mapping[str, str]) -> Mapping[str, float]:
    """The figures that the policy expects of a file with these types; empty if it predicts none."""
    if policy.predict is None:
        return {}
    plugin, _ = library_of(policy)
    with blame(plugin):
        found = policy.predict(task, types)
    _check_figures(found, f"plugin '{plugin}': policy '{policy.name}'")
    return found


def _check_figures(found: Mapping[str, float], about: str) -> None:
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise PluginFailed(f"{about} predicts {name!r:.40} as {value!r:.40}: expected a figure and a number")
