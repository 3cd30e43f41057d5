"""Finding and loading plugins: built-in folders, folders the user names, and installed packages, all by the same road."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from apex_build import hookspecs
from apex_build.errors import ApexError, PluginFailed, PolicyUnknown, Terminated
from apex_build.hookspecs import Document, Evaluator, Figure, GpuTarget, PolicySpec, Source
from apex_build.near import nearby
from apex_build.places import cache_root, data_root
from apex_build.storage.json_files import write_json

if TYPE_CHECKING:
    import click

    from apex_build.evaluation.task import Task

_log = logging.getLogger("apex_build")

GROUP = "apex_build"
_PACKAGE = "package "  # what the origin of an installed plugin begins with
T = TypeVar("T")
Read = Callable[[Mapping[str, Any], Path], Iterator[Document]]


@dataclass(frozen=True, eq=False)
class Plugins:
    """Loaded plugins. What they give is asked for when it is used; an error inside one raises PluginFailed naming it."""

    manager: pluggy.PluginManager
    origins: Mapping[str, str]  # plugin name -> folder or distribution it came from
    broken: Mapping[str, str] = field(default_factory=dict)  # installed plugins that were left out: name -> what is wrong with each

    def policies(self) -> dict[str, PolicySpec]:
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
            folder = policy.template.resolve().parent
            library[plugin] = (*(f for f in library.get(plugin, ()) if f != folder), folder)
        return {name: replace(policy, plugin=plugin, library=library) for name, (plugin, policy) in sorted(found.items())}

    def policy(self, name: str) -> PolicySpec:
        """The policy of this name. Raises PolicyUnknown with names that are near."""
        known = self.policies()
        if name not in known:
            lost = f". Left out, and not looked into: {', '.join(self.broken)}" if self.broken else ""
            raise PolicyUnknown(
                f"there is no policy '{name}'{nearby(name, known)}. There are: {', '.join(known)}{lost}",
                hint=_policy_hint(name, known),
            )
        return known[name]

    def calibration_sources(self) -> dict[str, Source]:
        """Sources by name; reading from one blames its plugin for what it raises."""
        found = self._named("apex_calibration_sources", Source)
        return {name: replace(source, read=_blaming(plugin, source.read)) for name, (plugin, source) in sorted(found.items())}

    def evaluators(self) -> dict[str, Evaluator]:
        """Evaluators by name; an error inside one blames its plugin."""
        found = self._named("apex_evaluators", Evaluator)
        return {
            name: replace(
                evaluator, plugin=plugin, code=_code_of(self.origins[plugin]), evaluate=_blaming_evaluator(plugin, evaluator)
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

    def role_of(self, architecture: str, tensor: str) -> str | None:
        """Role of a tensor, from the plugin loaded last that knows it (`gguf_model.catalogue.RoleOf`)."""
        for plugin, role in _role_functions(self, architecture):
            with _blame(plugin):
                found = role(tensor)
            if found is not None:
                return found
        return None

    def files(self) -> Iterator[Path]:
        """Code, templates and data of the plugins that are folders: what no output may replace."""
        for origin in self.origins.values():
            if not origin.startswith(_PACKAGE):
                for pattern in ("*.py", "*.jinja", "*.toml", "*.jsonl"):
                    yield from Path(origin).rglob(pattern)

    def _call(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """(plugin, result) of each plugin that has the hook, the last loaded first."""
        for implementation in reversed(getattr(self.manager.hook, hook).get_hookimpls()):
            with _blame(implementation.plugin_name):
                result = implementation.function(**{name: arguments[name] for name in implementation.argnames})
            yield implementation.plugin_name, result

    def _named(self, hook: str, kind: type[T]) -> dict[str, tuple[str, T]]:
        found: dict[str, tuple[str, T]] = {}
        # installed ones last: where a name is taken, it is they that are left out
        hooks = list(reversed(getattr(self.manager.hook, hook).get_hookimpls()))
        for implementation in sorted(hooks, key=lambda one: self._installed(one.plugin_name)):
            plugin = implementation.plugin_name
            try:
                with _blame(plugin):
                    results = implementation.function()
                if not isinstance(results, Sequence) or not all(isinstance(item, kind) for item in results):
                    raise PluginFailed(f"plugin '{plugin}': {hook}() must give a list of {kind.__name__}, not {results!r:.200}")
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
        return self.origins[plugin].startswith(_PACKAGE)

    def _leave_out(self, plugin: str, error: PluginFailed) -> None:
        """What an installed plugin gives is done without where it is broken; what is ours, or asked for, must be whole."""
        if not self._installed(plugin):
            raise error
        _warn_left_out(plugin, self.origins[plugin], error.message)


def load_plugins(folders: Sequence[Path] = ()) -> Plugins:
    """Built-in plugins, installed ones (entry points), then the folders given; each folder holds a `plugin.py`.

    The same folders give the same object. An installed plugin that is broken is left out with a warning, and so is, without
    one, what APEX_PLUGINS_OFF names: plugins or packages, with commas between them. Raises PluginFailed for any other, naming the
    plugin and the line of its code.
    """
    return _load(tuple(dict.fromkeys(Path(folder).resolve() for folder in folders)), data_root(), _switched_off())


@functools.lru_cache(maxsize=16)
def _load(folders: tuple[Path, ...], data: Path, off: frozenset[str]) -> Plugins:
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    origins: dict[str, str] = {}
    for path in sorted((data / "plugins").glob("*/plugin.py")):
        _register(manager, origins, path.parent.name, str(path.parent), functools.partial(_module_of, path.parent))
    broken: dict[str, str] = {}
    for entry in _installed():
        if off & {_spelt(entry.name), _spelt(_package(entry))}:
            continue
        try:
            _register(manager, origins, entry.name, f"{_PACKAGE}{_package(entry)}", entry.load)
        except ApexError as error:
            broken[entry.name] = error.message
            _warn_left_out(entry.name, f"{_PACKAGE}{_package(entry)}", error.message)
    for folder in folders:
        if not (folder / "plugin.py").is_file():
            raise PluginFailed(f"no plugin in {folder}: a plugin folder holds a file plugin.py")
        if str(folder) not in origins.values():  # a built-in one, named once more
            _register(manager, origins, folder.name, str(folder), functools.partial(_module_of, folder))
    return Plugins(manager, origins, broken)


def command_summaries() -> dict[str, str]:
    """Further verbs that plugins give, with what they say of themselves, without importing plugins that were looked into before."""
    built_in, entries = _with_commands()
    if not built_in and not entries:
        return {}
    known = [[str(path), path.stat().st_mtime_ns] for path in built_in]
    key = [*known, *([entry.name, entry.value, _package(entry), *_state(entry)] for entry in entries)]
    cached = cache_root() / "plugin-verbs.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        before = json.loads(cached.read_text(encoding="utf-8"))
        if before["of"] == key:
            return {str(name): str(text) for name, text in before["verbs"].items()}
    plugins = load_plugins()
    found = {name: command.get_short_help_str(500) for name, command in plugins.commands().items()}
    if not plugins.broken:  # what is broken is said each time
        with contextlib.suppress(OSError):
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_json(cached, {"of": key, "verbs": found})
    return found


def may_have_commands() -> bool:
    """Whether there is any plugin that could give further verbs, without importing one."""
    return any(_with_commands())


def _with_commands() -> tuple[list[Path], list[importlib.metadata.EntryPoint]]:
    """Built-in plugins that name the hook, and all that are installed and not switched off."""
    folders = sorted((data_root() / "plugins").glob("*/plugin.py"))
    off = _switched_off()
    entries = [entry for entry in _installed() if not off & {_spelt(entry.name), _spelt(_package(entry))}]
    return [path for path in folders if "apex_commands" in path.read_text(encoding="utf-8")], entries


def _installed() -> list[importlib.metadata.EntryPoint]:
    return sorted(importlib.metadata.entry_points(group=GROUP), key=lambda entry: entry.name)


def _package(entry: importlib.metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value


def _state(entry: importlib.metadata.EntryPoint) -> list[Any]:
    """What changes with the code of an installed plugin, as far as that is seen without importing it."""
    try:
        spec = importlib.util.find_spec(entry.module.partition(".")[0])
        changed = Path(spec.origin).stat().st_mtime_ns if spec and spec.origin else None
    except (ImportError, OSError, ValueError):
        changed = None
    return [entry.dist.version if entry.dist else None, changed]


def _switched_off() -> frozenset[str]:
    return frozenset(_spelt(name) for name in os.environ.get("APEX_PLUGINS_OFF", "").split(",") if name.strip())


def _spelt(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


@functools.cache
def _warn_left_out(plugin: str, origin: str, why: str) -> None:
    said = why if origin in why else f"plugin '{plugin}' ({origin}): {why}"
    _log.warning(f"{said}; it is left out (APEX_PLUGINS_OFF={plugin} does that without this warning)")


def _register(manager: pluggy.PluginManager, origins: dict[str, str], name: str, origin: str, load: Callable[[], Any]) -> None:
    if name in origins:
        raise PluginFailed(f"two plugins are named '{name}': {origins[name]} and {origin}", hint="rename one of them")
    try:
        with _blame(name, origin):
            manager.register(load(), name=name)
            manager.check_pending()  # a hook function of a name that is no hook: misspelt, or made for another version
    except BaseException:
        if manager.has_plugin(name):
            manager.unregister(name=name)
        raise
    origins[name] = origin


def _module_of(folder: Path) -> ModuleType:
    """Import `folder/plugin.py` as a package of a name of its own, so that its relative imports find the files beside it."""
    name = f"_apex_plugin_{folder.name}_{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, folder / "plugin.py", submodule_search_locations=[str(folder)])
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {folder / 'plugin.py'}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _code_of(origin: str) -> str:
    """What tells a plugin's code from what it was before: digest of its Python files, or version of its package.

    Empty for a built-in one, whose evaluators have versions of their own.
    """
    if origin.startswith(_PACKAGE):
        package = origin.removeprefix(_PACKAGE)
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            return package
    folder = Path(origin)
    if folder.parent == data_root() / "plugins":
        return ""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*.py") if path.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)}\0{len(content)}\0".encode(errors="surrogateescape") + content)
    return digest.hexdigest()


def _policy_hint(name: str, known: Mapping[str, PolicySpec]) -> str:
    """A type in place of a policy is what llama-quantize would take: 'uniform' has it as a parameter."""
    if "uniform" in known and (given := _type_like(name)):
        return f"--policy uniform --set type={given}, for every tensor of one type; apex policies lists the others"
    return "apex policies"


def _type_like(name: str) -> str:
    """The tensor type that a type's or a mixture's name stands for: Q4_K_M -> Q4_K, iq3_m -> IQ3_S; '' for any other name."""
    import gguf

    types = {one.name for one in gguf.GGMLQuantizationType}
    wanted = name.upper().replace("-", "_")
    bare = re.sub(r"_(XS|S|M|L|XL)$", "", wanted)
    return next((one for one in (wanted, bare, f"{bare}_S", f"{bare}_XS") if one in types), "")


@functools.lru_cache(maxsize=64)
def _role_functions(plugins: Plugins, architecture: str) -> tuple[tuple[str, Callable[[str], str | None]], ...]:
    answers = plugins._call("apex_tensor_roles", architecture=architecture)
    return tuple((plugin, role) for plugin, role in answers if role is not None)


def _refuse_unusable(plugin: str, policy: PolicySpec) -> None:
    if policy.template.suffix != ".jinja" or not policy.template.is_file():
        wrong = "does not exist" if policy.template.suffix == ".jinja" else "is not named *.jinja"
        raise PluginFailed(f"plugin '{plugin}': the template of its policy '{policy.name}' {wrong}: {policy.template}")
    _refuse_ambiguous(plugin, policy)


def _refuse_ambiguous(plugin: str, policy: PolicySpec) -> None:
    """A parameter is a variable of the template: no two may be the same one, nor hide what every template is given."""
    taken = {"model", "layers", "tensors", "base_type"}
    for name in policy.parameters:
        variable = name.replace(".", "_")
        if variable in taken or not variable.isidentifier():
            what = "is taken" if variable in taken else "is no name"
            raise PluginFailed(
                f"plugin '{plugin}': policy '{policy.name}' has a parameter '{name}', but the variable '{variable}' {what}"
            )
        taken.add(variable)


def _blaming(plugin: str, read: Read) -> Read:
    def blamed(options: Mapping[str, Any], folder: Path) -> Iterator[Document]:
        with _blame(plugin):
            yield from read(options, folder)

    return blamed


def _blaming_evaluator(plugin: str, evaluator: Evaluator) -> Callable[[Task], Sequence[Figure]]:
    def blamed(task: Task) -> Sequence[Figure]:
        with _blame(plugin):
            figures = list(evaluator.evaluate(task))
        if not all(isinstance(figure, Figure) for figure in figures):
            raise PluginFailed(f"plugin '{plugin}': evaluator '{evaluator.name}' must give a list of Figure, not {figures!r:.200}")
        return figures

    return blamed


@contextmanager
def _blame(plugin: str, origin: str = "") -> Iterator[None]:
    """Turn whatever a plugin raises into PluginFailed. Its own ApexErrors pass: they are meant for the user."""
    try:
        yield
    except (ApexError, Terminated):
        raise
    except (Exception, SystemExit) as error:
        source = f" ({origin})" if origin else ""
        raise PluginFailed(f"plugin '{plugin}'{source}: {type(error).__name__}: {error}{_where(error)}") from error


def _where(error: BaseException) -> str:
    """', at FILE:LINE' of the innermost frame that is neither ours nor a library's."""
    if isinstance(error, SyntaxError) and error.filename:
        return f", at {error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = (str(Path(__file__).parent), str(Path(traceback.__file__).parent), "<frozen")
    theirs = [frame for frame in frames if not frame.filename.startswith(own)] or frames
    return f", at {theirs[-1].filename}:{theirs[-1].lineno}" if theirs else ""
