"""Find and load plugins: built-in folders, folders that the user names, and installed packages, all in the same way."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from apex_build import hookspecs
from apex_build.errors import ApexError, PluginFailed, PolicyUnknown
from apex_build.hookspecs import ROLES, Evaluator, GpuTarget, Part, PolicySpec, Role, Source
from apex_build.loaded import LoadedEvaluator, LoadedPolicy, loaded_evaluator, loaded_policy
from apex_build.near import nearby, no_such
from apex_build.places import cache_root, data_root
from apex_build.plugin_blame import blame, blaming, blaming_evaluator, blaming_pin
from apex_build.plugin_finding import (
    GROUP,
    PACKAGE,
    api_in_source,
    api_of,
    builtin_folders,
    check_api,
    code_of,
    entry_source,
    installed,
    module_of,
    package_of,
    spelt,
    state_of,
    switched_off,
    verb_in,
)
from apex_build.storage.json_files import write_json

if TYPE_CHECKING:
    import importlib.metadata

    import click

_log = logging.getLogger("apex_build")

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Plugins:
    """Loaded plugins. What they provide is asked for on use; an error inside one raises PluginFailed naming it."""

    manager: pluggy.PluginManager
    origins: Mapping[str, str]  # plugin name -> folder or distribution it came from
    apis: Mapping[str, int]  # plugin name -> version of the API that it was made for
    broken: Mapping[str, str] = field(default_factory=dict)  # installed plugins that were left out: name -> the reason

    def policies(self) -> dict[str, LoadedPolicy]:
        """Policies by name, sorted; two plugins with a policy of the same name are refused."""
        found = self._named("apex_policies", PolicySpec)
        library: dict[str, tuple[Path, ...]] = {}
        for name, (plugin, policy) in tuple(found.items()):
            try:
                _refuse_unusable(plugin, policy)
            except PluginFailed as error:
                self._leave_out(plugin, error)
                del found[name]
                continue
            if policy.template is None:
                continue
            folder = policy.template.resolve().parent
            library[plugin] = (*(f for f in library.get(plugin, ()) if f != folder), folder)
        return {name: loaded_policy(policy, plugin, library) for name, (plugin, policy) in sorted(found.items())}

    def policy(self, name: str) -> LoadedPolicy:
        """The policy of this name. Raises PolicyUnknown with names that are near."""
        known = self.policies()
        if name not in known:
            lost = f". Plugins that were left out: {', '.join(self.broken)}" if self.broken else ""
            raise PolicyUnknown(
                no_such("policy", name, known) + lost,
                hint=_policy_hint(name, known),
            )
        return known[name]

    def calibration_sources(self) -> dict[str, Source]:
        """Sources by name; reading from one blames its plugin for what it raises."""
        found = self._named("apex_calibration_sources", Source)
        return {
            name: replace(source, read=blaming(plugin, source.read), pin=source.pin and blaming_pin(plugin, source.pin))
            for name, (plugin, source) in sorted(found.items())
        }

    def evaluators(self) -> dict[str, LoadedEvaluator]:
        """Evaluators by name; an error inside one blames its plugin."""
        found = self._named("apex_evaluators", Evaluator)
        return {
            name: loaded_evaluator(
                evaluator, plugin, code_of(self.origins[plugin]), evaluate=blaming_evaluator(plugin, evaluator)
            )
            for name, (plugin, evaluator) in sorted(found.items())
        }

    def gpu_targets(self) -> dict[str, GpuTarget]:
        """GPUs to build for, by name, in the order that their plugins list them."""
        return {name: target for name, (_, target) in self._named("apex_gpu_targets", GpuTarget).items()}

    def commands(self) -> dict[str, click.Command]:
        """Further verbs of the command line, by name."""
        import click

        return {name: command for name, (_, command) in sorted(self._named("apex_commands", click.Command).items())}

    def roles(self) -> dict[str, Role]:
        """Roles by name: the built-in ones and those that plugins add."""
        return dict(_roles(self))

    def role_of(self, architecture: str, tensor: str) -> str | Part | None:
        """Role of a tensor, from the plugin loaded last that knows it (`gguf_model.catalogue.RoleOf`)."""
        for plugin, role in _role_functions(self, architecture):
            with blame(plugin):
                found = role(tensor)
            if found is not None:
                self._check_role(plugin, found, tensor)
                return found
        return None

    def _check_role(self, plugin: str, found: object, tensor: str) -> None:
        role = found.role if isinstance(found, Part) else found
        if role in _roles(self) or (
            isinstance(role, str) and self.apis[plugin] < 2
        ):  # before version 2 there was no list
            return
        near = nearby(role, _roles(self)) if isinstance(role, str) else ""
        raise PluginFailed(
            f"plugin '{plugin}': its role of {tensor} is {found!r:.80}, and there is no such role{near}. "
            f"There are: {', '.join(_roles(self))}",
            hint="the hook apex_roles adds one: docs/plugins.md",
        )

    def given(self, plugin: str) -> dict[str, tuple[str, ...]]:
        """What a plugin provides: kind -> names. Roles are those that it adds; `has_hook` tells whether it assigns
        roles.
        """
        return {
            kind: tuple(sorted(name for name, (owner, _) in self._named(hook, of).items() if owner == plugin))
            for kind, (hook, of) in _kinds().items()
        }

    def has_hook(self, plugin: str, hook: str) -> bool:
        return any(one.plugin_name == plugin for one in getattr(self.manager.hook, hook).get_hookimpls())

    def files(self) -> Iterator[Path]:
        """Code, templates and data of plugins in folders: no output may replace them."""
        for origin in self.origins.values():
            if not origin.startswith(PACKAGE):
                for pattern in ("*.py", "*.jinja", "*.toml", "*.jsonl"):
                    yield from Path(origin).rglob(pattern)

    def _call(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """(plugin, result) of each plugin that has the hook, the last loaded first."""
        for implementation in reversed(getattr(self.manager.hook, hook).get_hookimpls()):
            with blame(implementation.plugin_name):
                result = implementation.function(**{name: arguments[name] for name in implementation.argnames})
            yield implementation.plugin_name, result

    def _named(self, hook: str, kind: type[T]) -> dict[str, tuple[str, T]]:
        found: dict[str, tuple[str, T]] = {}
        # installed ones last: if a name is taken, they are left out
        hooks = list(reversed(getattr(self.manager.hook, hook).get_hookimpls()))
        for implementation in sorted(hooks, key=lambda one: self._installed(one.plugin_name)):
            plugin = implementation.plugin_name
            try:
                with blame(plugin):
                    results = implementation.function()
                if not isinstance(results, Sequence) or not all(isinstance(item, kind) for item in results):
                    raise PluginFailed(
                        f"plugin '{plugin}': {hook}() must give a list of {kind.__name__}, not {results!r:.200}"
                    )
                for item in results:
                    if (name := str(item.name)) in found:
                        raise PluginFailed(
                            f"{hook}(): '{name}' comes from two plugins, '{plugin}' ({self.origins[plugin]}) "
                            f"and '{found[name][0]}' ({self.origins[found[name][0]]})",
                            hint="rename one of the two",
                        )
            except PluginFailed as error:
                self._leave_out(plugin, error)
                continue
            found |= {str(item.name): (plugin, item) for item in results}
        return found

    def _installed(self, plugin: str) -> bool:
        return self.origins[plugin].startswith(PACKAGE)

    def _leave_out(self, plugin: str, error: PluginFailed) -> None:
        """A broken installed plugin is skipped; a built-in one, or one that was asked for, must work."""
        if not self._installed(plugin):
            raise error
        _warn_left_out(plugin, self.origins[plugin], error.message)


def load_plugins(folders: Sequence[Path] = ()) -> Plugins:
    """Built-in plugins, installed ones (entry points), then the folders given; each folder holds a `plugin.py`.

    The same folders give the same object. A broken installed plugin is left out with a warning; plugins or packages
    that APEX_PLUGINS_OFF names (separated by commas) are left out without one. For other broken plugins raises
    PluginFailed naming the plugin and the line of its code, or PluginIncompatible for one made for another version of
    the API.
    """
    return _load(tuple(dict.fromkeys(Path(folder).resolve() for folder in folders)), data_root(), switched_off())


@functools.lru_cache(maxsize=16)
def _load(folders: tuple[Path, ...], data: Path, off: frozenset[str]) -> Plugins:
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    origins: dict[str, str] = {}
    apis: dict[str, int] = {}

    def from_folder(folder: Path) -> None:
        load = functools.partial(module_of, folder)
        apis[folder.name] = _register(manager, origins, folder.name, str(folder), load, folder / "plugin.py")

    for folder in builtin_folders():
        from_folder(folder)
    broken: dict[str, str] = {}
    for entry in installed():
        if off & {spelt(entry.name), spelt(package_of(entry))}:
            continue
        origin = f"{PACKAGE}{package_of(entry)}"
        try:
            apis[entry.name] = _register(manager, origins, entry.name, origin, entry.load, entry_source(entry))
        except ApexError as error:
            broken[entry.name] = error.message
            _warn_left_out(entry.name, origin, error.message)
    for folder in folders:
        if not (folder / "plugin.py").is_file():
            raise PluginFailed(f"no plugin in {folder}: a plugin folder has a file plugin.py", hint="apex plugins new")
        if str(folder) not in origins.values():  # a built-in one, given again
            from_folder(folder)
    return Plugins(manager, origins, apis, broken)


def command_summaries() -> dict[str, str]:
    """Verbs that plugins add, with their summaries, without importing plugins that were imported before."""
    folders, entries = _with_commands()
    in_source = {path: verb_in(path.parent) for path in folders}
    ours = dict(verb for verb in in_source.values() if verb)
    built_in = [path for path, verb in in_source.items() if verb is None]
    if not built_in and not entries:
        return ours
    known = [[str(path), path.stat().st_mtime_ns] for path in built_in]
    key = [*known, *([entry.name, entry.value, package_of(entry), *state_of(entry)] for entry in entries)]
    cached = cache_root() / "plugin-verbs.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        before = json.loads(cached.read_text(encoding="utf-8"))
        if before["of"] == key:
            return ours | {str(name): str(text) for name, text in before["verbs"].items()}
    plugins = load_plugins()
    found = {name: command.get_short_help_str(500) for name, command in plugins.commands().items()}
    if not plugins.broken:  # broken plugins are reported each time
        with contextlib.suppress(OSError):
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_json(cached, {"of": key, "verbs": found})
    return found


def _with_commands() -> tuple[list[Path], list[importlib.metadata.EntryPoint]]:
    """Built-in plugins that name the hook, and all installed ones that are not switched off."""
    folders = sorted((data_root() / "plugins").glob("*/plugin.py"))
    off = switched_off()
    entries = [entry for entry in installed() if not off & {spelt(entry.name), spelt(package_of(entry))}]
    return [path for path in folders if "apex_commands" in path.read_text(encoding="utf-8")], entries


@functools.cache
def _warn_left_out(plugin: str, origin: str, why: str) -> None:
    said = why if origin in why else f"plugin '{plugin}' ({origin}): {why}"
    _log.warning(f"{said}; it is left out (APEX_PLUGINS_OFF={plugin} does that without this warning)")


def _register(
    manager: pluggy.PluginManager,
    origins: dict[str, str],
    name: str,
    origin: str,
    load: Callable[[], Any],
    source: Path | None,
) -> int:
    """Load a plugin; returns the API version that it was made for."""
    if name in origins:
        raise PluginFailed(f"two plugins are named '{name}': {origins[name]} and {origin}", hint="rename one of them")
    if source is not None and (declared := api_in_source(source)) is not None:
        check_api(declared, name, origin)  # before its imports fail because of another version
    try:
        with blame(name, origin):
            module = load()
            api = api_of(module, name, origin)
            check_api(api, name, origin)
            manager.register(module, name=name)
            # a function marked as a hook with an unknown name: misspelt, or made for another version
            manager.check_pending()
    except BaseException:
        if manager.has_plugin(name):
            manager.unregister(name=name)
        raise
    origins[name] = origin
    return api


def _policy_hint(name: str, known: Mapping[str, PolicySpec]) -> str:
    """llama-quantize takes a type where a policy is expected: a policy with one type has it as a parameter."""
    if given := _type_like(name):
        for policy in known.values():
            parameter = re.fullmatch(r"\{([\w.]+)\}", policy.base_type)
            if parameter and parameter[1] in policy.parameters and policy.parameters[parameter[1]].kind == "type":
                one = f"--policy {policy.name} --set {parameter[1]}={given}"
                return f"{one}, for every tensor of one type; apex policies lists the others"
    return "apex policies"


def _type_like(name: str) -> str:
    """The tensor type that a type's or a mixture's name stands for: Q4_K_M -> Q4_K, iq3_m -> IQ3_S; '' for any other
    name.
    """
    import gguf

    types = {one.name for one in gguf.GGMLQuantizationType}
    wanted = name.upper().replace("-", "_")
    bare = re.sub(r"_(XS|S|M|L|XL)$", "", wanted)
    return next((one for one in (wanted, bare, f"{bare}_S", f"{bare}_XS") if one in types), "")


@functools.lru_cache(maxsize=64)
def _role_functions(plugins: Plugins, architecture: str) -> tuple[tuple[str, Callable[[str], str | Part | None]], ...]:
    answers = plugins._call("apex_tensor_roles", architecture=architecture)
    return tuple((plugin, role) for plugin, role in answers if role is not None)


def _kinds() -> dict[str, tuple[str, type[Any]]]:
    """What plugins provide by name: kind -> its hook, and the class of its items."""
    import click

    return {
        "policies": ("apex_policies", PolicySpec),
        "roles": ("apex_roles", Role),
        "sources": ("apex_calibration_sources", Source),
        "evaluators": ("apex_evaluators", Evaluator),
        "gpus": ("apex_gpu_targets", GpuTarget),
        "commands": ("apex_commands", click.Command),
    }


@functools.lru_cache(maxsize=64)
def _roles(plugins: Plugins) -> Mapping[str, Role]:
    known = {role.name: role for role in ROLES}
    for name, (plugin, role) in plugins._named("apex_roles", Role).items():
        if name in known:
            raise PluginFailed(f"plugin '{plugin}': apex_roles() returns '{name}', which is a built-in role")
        known[name] = role
    return known


def _refuse_unusable(plugin: str, policy: PolicySpec) -> None:
    if (policy.template is None) == (policy.compute is None):
        has = "both a template and a function" if policy.compute else "neither a template nor a function"
        raise PluginFailed(f"plugin '{plugin}': its policy '{policy.name}' has {has} that gives the types")
    if policy.template is not None and (policy.template.suffix != ".jinja" or not policy.template.is_file()):
        wrong = "does not exist" if policy.template.suffix == ".jinja" else "is not named *.jinja"
        raise PluginFailed(f"plugin '{plugin}': the template of its policy '{policy.name}' {wrong}: {policy.template}")
    _refuse_ambiguous(plugin, policy)


def _refuse_ambiguous(plugin: str, policy: PolicySpec) -> None:
    """Parameters are variables of the template: none may collide with another, or with what every template gets."""
    taken = {"model", "layers", "tensors", "base_type"}
    for name in policy.parameters:
        variable = name.replace(".", "_")
        if variable in taken or not variable.isidentifier():
            what = "is taken" if variable in taken else "is not a valid name"
            raise PluginFailed(
                f"plugin '{plugin}': policy '{policy.name}' has a parameter '{name}', but the variable '{variable}' "
                f"{what}"
            )
        taken.add(variable)
