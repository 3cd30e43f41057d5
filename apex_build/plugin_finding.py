"""Find and import plugins: folders, built in or named by the user, and installed packages."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from apex_build.errors import PluginFailed, PluginIncompatible
from apex_build.hookspecs import API_VERSION, OLDEST_API
from apex_build.places import data_root

GROUP = "apex_build"
PACKAGE = "package "  # what the origin of an installed plugin begins with
_API = "APEX_API"
_API_LINE = re.compile(rf"^{_API}\s*(?::\s*[\w.\[\]]+\s*)?=\s*(\d{{1,9}})\s*(?:#.*)?$", re.MULTILINE)

_VERB = re.compile(r'^@click\.command\("([a-z][a-z-]*)"\)', re.MULTILINE)
_SUMMARY = re.compile(r'^def command\(.*?^    """(.*?)(?:"""|\n\n)', re.DOTALL | re.MULTILINE)


def summary_in(source: str) -> str:
    """The first paragraph of the help of the verb that a file defines as `command`, without importing it."""
    found = _SUMMARY.search(source)
    return " ".join(found[1].split()) if found else ""


def verb_in(folder: Path) -> tuple[str, str] | None:
    """A built-in plugin's verb and its summary, where its file command.py defines it as our own verbs are defined."""
    path = folder / "command.py"
    source = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = _VERB.search(source)
    return (found[1], summary_in(source)) if found else None


def builtin_folders() -> list[Path]:
    return sorted(path.parent for path in (data_root() / "plugins").glob("*/plugin.py"))


def installed() -> list[importlib.metadata.EntryPoint]:
    return sorted(importlib.metadata.entry_points(group=GROUP), key=lambda entry: entry.name)


def package_of(entry: importlib.metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.value


def state_of(entry: importlib.metadata.EntryPoint) -> list[Any]:
    """What changes with an installed plugin's code, as far as can be seen without importing it."""
    try:
        spec = importlib.util.find_spec(entry.module.partition(".")[0])
        changed = Path(spec.origin).stat().st_mtime_ns if spec and spec.origin else None
    except (ImportError, OSError, ValueError):
        changed = None
    return [entry.dist.version if entry.dist else None, changed]


def switched_off() -> frozenset[str]:
    return frozenset(spelt(name) for name in os.environ.get("APEX_PLUGINS_OFF", "").split(",") if name.strip())


def spelt(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def module_of(folder: Path) -> ModuleType:
    """Import `folder/plugin.py` as a package with a unique name, so that its relative imports work."""
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


def code_of(origin: str) -> str:
    """Identifies a plugin's code: the digest of its Python files, or the version of its package. Empty for a

    built-in one, whose evaluators have their own versions.
    """
    if origin.startswith(PACKAGE):
        package = origin.removeprefix(PACKAGE)
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


def api_in_source(path: Path) -> int | None:
    """The API version that a file declares, without importing it: with another version its imports may fail."""
    try:
        found = _API_LINE.search(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return int(found[1]) if found else None


def entry_source(entry: importlib.metadata.EntryPoint) -> Path | None:
    """The file of an installed plugin's module, if it can be found without importing it."""
    try:
        spec = importlib.util.find_spec(entry.module)
        return Path(spec.origin) if spec and spec.origin else None
    except (ImportError, OSError, ValueError, AttributeError):
        return None


def api_of(module: Any, plugin: str, origin: str) -> int:
    """The API version that a loaded plugin was made for: 1 if it does not say. Raises PluginFailed."""
    declared = getattr(module, _API, 1)
    if not isinstance(declared, int) or isinstance(declared, bool):
        raise PluginFailed(
            f"plugin '{plugin}' ({origin}): {_API} is {declared!r:.80}, expected a whole number such as {API_VERSION}"
        )
    return declared


def check_api(api: int, plugin: str, origin: str) -> None:
    """Raises PluginIncompatible."""
    if OLDEST_API <= api <= API_VERSION:
        return
    ours = f"{API_VERSION}" if OLDEST_API == API_VERSION else f"{OLDEST_API} to {API_VERSION}"
    raise PluginIncompatible(
        f"plugin '{plugin}' ({origin}) was made for plugin API version {api}: this apex-build has version {ours}",
        hint="a newer apex-build, or an older release of the plugin"
        if api > API_VERSION
        else "a newer release of the plugin",
    )
