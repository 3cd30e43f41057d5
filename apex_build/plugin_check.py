"""Check a plugin as far as possible without a model and the native tools; for authors and their tests."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast, get_args, get_type_hints

import gguf

from apex_build.errors import ParameterUnknown, PluginFailed, PolicyUnfit, ShapeUnfit, TypeUnknown
from apex_build.gguf_model.catalogue import Model, Tensor
from apex_build.gguf_model.quantizable import quantizable
from apex_build.hookspecs import Evaluator, GpuTarget, Part, PolicySpec, Service
from apex_build.loaded import LoadedPolicy
from apex_build.native.ggml import Ggml, TypeTraits
from apex_build.near import nearby
from apex_build.parameters import resolve, values_of
from apex_build.plugins import Plugins, load_plugins
from apex_build.policy.computed import compute, task_of
from apex_build.policy.render import render
from apex_build.policy.rules import apply_rules, parse_rules

_NEEDS = ("text", "prompts", "reference", "head", "data")
# what each purpose asks figures for (hookspecs.Service)
_FIGURES: Mapping[str, tuple[frozenset[str], ...]] = {
    "sweep": (frozenset(),),
    "head": (frozenset(),),
    "auto": (frozenset({"agreement", "tokens"}),),
    "check": (frozenset({"perplexity"}), frozenset({"acceptance"})),
}
_MORE = {"check": frozenset({"same_text", "drafted", "accepted"})}  # and may name, with the acceptance
_LAYERS = 40  # of the sample models, so that tiers by depth have a middle


@dataclass(frozen=True)
class CheckedPlugin:
    """A valid plugin. `given`: what it provides by kind (policies, roles, sources, evaluators, gpus, commands);
    `rules`: of each policy, tensor -> type in a sample model, a mixture of experts of 40 layers with a draft head in
    block 40.
    """

    name: str
    folder: Path
    api: int
    given: Mapping[str, tuple[str, ...]]
    rules: Mapping[str, Mapping[str, str]]
    plugins: Plugins = field(repr=False)

    def role_of(self, architecture: str, tensor: str) -> str | Part | None:
        """The roles that the plugin gives to tensors of this architecture."""
        return self.plugins.role_of(architecture, tensor)


def plugin_folder(folder: Path) -> Path:
    """The folder that holds plugin.py: the one given, or the one such folder in it, for a project around a plugin."""
    below = sorted(path.parent for path in folder.glob("*/plugin.py"))
    return below[0] if not (folder / "plugin.py").is_file() and len(below) == 1 else folder


def check_plugin(folder: Path) -> CheckedPlugin:
    """Load the plugin of a folder, call its hooks, and render its policies for sample models.

    Raises PluginFailed, PluginIncompatible, and what a policy's template raises (TemplateFailed, TemplateUnsafe).
    """
    folder = plugin_folder(Path(folder)).resolve()
    plugins = load_plugins([folder])
    name = folder.name
    given = plugins.given(name)
    if not any(given.values()) and not plugins.has_hook(name, "apex_tensor_roles"):
        raise PluginFailed(
            f"plugin '{name}' ({folder}) provides nothing: it has no function with a hook's name and the mark @hookimpl"
        )
    _check_roles(plugins)
    policies = plugins.policies()
    rules = {policy: _check_policy(name, policies[policy], plugins) for policy in given["policies"]}
    evaluators = plugins.evaluators()
    for evaluator in given["evaluators"]:
        _check_evaluator(name, evaluators[evaluator])
    targets = plugins.gpu_targets()
    for gpu in given["gpus"]:
        _check_gpu(name, targets[gpu])
    return CheckedPlugin(name, folder, plugins.apis[name], given, rules, plugins)


def _check_policy(plugin: str, policy: LoadedPolicy, plugins: Plugins) -> dict[str, str]:
    """The rules for the sample with experts and a head; the other samples must only render."""
    types = _types()
    values = resolve(policy, {}, types)
    if policy.otherwise and policy.otherwise not in plugins.policies():
        raise PluginFailed(
            f"plugin '{plugin}': policy '{policy.name}' names the policy '{policy.otherwise}', which does not exist"
        )
    _check_parameters(plugin, policy)
    wanted: dict[str, str] = {}
    for model in (_sample(plugins, experts=True, head=True), *_others(policy, plugins)):
        quantized = [tensor.name for tensor in model.tensors if quantizable(tensor.name, tensor.shape)]
        if policy.compute is None:
            lines = render(policy, values, model, quantized)
        else:
            try:
                lines = compute(policy, task_of(policy, values, model, quantized, types, calibrated=True))[0].lines
            except (ParameterUnknown, PolicyUnfit):  # one that needs a setting, or a file: it says so
                return {}
        rules = parse_rules(lines, types)
        deciding = apply_rules(rules, model.tensors, quantized)
        wanted = wanted or {tensor: rule.type for tensor, rule in deciding.items()}
    return wanted


def _others(policy: PolicySpec, plugins: Plugins) -> list[Model]:
    return [] if "head" in policy.needs else [_sample(plugins, experts=True, head=False)]


def _check_parameters(plugin: str, policy: PolicySpec) -> None:
    types = _types()
    for name, parameter in policy.parameters.items():
        for value in parameter.measured:
            resolve(policy, {name: value}, types)
        if parameter.bound and parameter.bound not in policy.parameters:
            raise PluginFailed(
                f"plugin '{plugin}': parameter '{name}' of policy '{policy.name}' has the bound '{parameter.bound}', "
                "which is not a parameter of the policy"
            )


def _check_evaluator(plugin: str, evaluator: Evaluator) -> None:
    about = f"plugin '{plugin}': evaluator '{evaluator.name}'"
    for need in (*evaluator.needs, *evaluator.uses):
        if need not in _NEEDS:
            raise PluginFailed(f"{about} needs '{need}'{nearby(need, _NEEDS)}. There are: {', '.join(_NEEDS)}")
    values_of(f"evaluator '{evaluator.name}'", evaluator.parameters, {}, _types())
    purposes = get_args(get_type_hints(Service)["purpose"])
    for service in evaluator.serves:
        if service.purpose not in purposes:
            raise PluginFailed(
                f"{about} serves '{service.purpose}'{nearby(service.purpose, purposes)}. There are: "
                f"{', '.join(purposes)}"
            )
        if frozenset(service.figures) - _MORE.get(service.purpose, frozenset()) not in _FIGURES[service.purpose]:
            expected = " or ".join(", ".join(sorted(names)) or "none" for names in _FIGURES[service.purpose])
            found = ", ".join(sorted(service.figures)) or "none"
            raise PluginFailed(f"{about} serves '{service.purpose}' with figures for {found}: expected {expected}")
        values_of(f"evaluator '{evaluator.name}'", evaluator.parameters, dict(service.settings), _types())


def _check_gpu(plugin: str, gpu: GpuTarget) -> None:
    if not re.fullmatch(r"\d{2,3}[af]?(-real|-virtual)?", gpu.architecture):
        raise PluginFailed(
            f"plugin '{plugin}': GPU '{gpu.name}' has the architecture '{gpu.architecture}': expected one of "
            "CMake's, such as 89-real"
        )
    if gpu.memory_gib < 0:
        raise PluginFailed(f"plugin '{plugin}': GPU '{gpu.name}' has {gpu.memory_gib} GiB of memory")


def _check_roles(plugins: Plugins) -> None:
    """The roles that it gives to the tensors of samples are known ones."""
    plugins.roles()
    for experts in (True, False):
        _sample(plugins, experts=experts, head=True)


def _sample(plugins: Plugins, *, experts: bool, head: bool) -> Model:
    """A made-up model: names and shapes of a typical one, without weights."""
    width, rows = 512, 1024
    block = {"attn_norm": (width,), "attn_q": (width, rows), "attn_k": (width, width), "attn_v": (width, width)}
    block |= {"attn_output": (rows, width), "ffn_norm": (width,)}
    if experts:
        block |= {f"ffn_{part}_exps": (width, width, 8) for part in ("gate", "up", "down")} | {
            "ffn_gate_inp": (width, 8)
        }
        block |= {f"ffn_{part}_shexp": (width, width) for part in ("gate", "up", "down")}
    else:
        block |= {f"ffn_{part}": (width, rows) for part in ("gate", "up")} | {"ffn_down": (rows, width)}
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (width, 4096), "output_norm": (width,), "output": (width, 4096)}
    for number in range(_LAYERS + head):
        shapes |= {f"blk.{number}.{name}": shape for name, shape in block.items()}
    if head:
        shapes |= {f"blk.{_LAYERS}.nextn.eh_proj": (2 * width, width), f"blk.{_LAYERS}.nextn.enorm": (width,)}
    architecture = "qwen35moe" if experts else "qwen35"
    tensors = tuple(_tensor(f"{name}.weight", shape, architecture, plugins) for name, shape in shapes.items())
    path = Path("sample.gguf")
    return Model(path, (path,), architecture, "sample", _LAYERS, int(head), 8 * experts, 2 * experts, None, {}, tensors)


def _tensor(name: str, shape: Sequence[int], architecture: str, plugins: Plugins) -> Tensor:
    number = re.match(r"blk\.(\d+)\.", name)
    layer = int(number[1]) if number else None
    role = plugins.role_of(architecture, name) or "other"
    head = role.draft_head if isinstance(role, Part) else layer is not None and layer >= _LAYERS
    n_bytes = 2
    for extent in shape:
        n_bytes *= extent
    return Tensor(name, tuple(shape), "F16", n_bytes, role.role if isinstance(role, Part) else role, layer, head)


class _Types:
    """The tensor types of gguf-py, instead of a build's libggml, which an author may not have."""

    def type_traits(self, name: str) -> TypeTraits:
        try:
            found = gguf.GGMLQuantizationType[name.upper()]
        except KeyError:
            known = [one.name for one in gguf.GGMLQuantizationType]
            raise TypeUnknown(f"{name!r} is not a tensor type of GGUF{nearby(name.upper(), known)}") from None
        block, size = gguf.GGML_QUANT_SIZES[found]
        return TypeTraits(found.name, block, size, block > 1, False, False)

    def row_bytes(self, name: str, ne0: int) -> int:
        traits = self.type_traits(name)
        if ne0 % traits.block_size:
            raise ShapeUnfit(f"a row of {ne0} values cannot be {traits.name}: its blocks hold {traits.block_size}")
        return ne0 // traits.block_size * traits.type_size

    def needs_imatrix(self, name: str, tensor: str, file_type: str = "") -> bool:
        return self.type_traits(name).requires_imatrix


def _types() -> Ggml:
    return cast(Ggml, _Types())
