"""Defaults from apex.toml: the user's own file, and the one in the folder where apex is run.

    threads = 8                # at the top: for every verb that has the option
    cache_dir = "/big/apex"    # as APEX_CACHE_DIR
    quantized_by = "me"        # as APEX_QUANTIZED_BY: who made the files

    [plugins]
    off = ["some-package"]     # as APEX_PLUGINS_OFF

    [quantize]                 # a verb's options, by their long names
    policy = ["i-nano"]

The command line comes first, then the environment, then the folder's file, then the user's. A folder's file may have
come with a download, so settings that decide which code runs (tools, plugins, caches) or replace files are accepted
only from the user's own file.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import platformdirs

from apex_build.cli.verbs import VERBS, all_verbs
from apex_build.errors import ConfigInvalid
from apex_build.near import nearby
from apex_build.places import PIN_VARIABLE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NAME = "apex.toml"
VARIABLE = "APEX_CONFIG"
FOLDERS = {"cache_dir": "APEX_CACHE_DIR", "source_dir": "APEX_SOURCE_DIR"}
AT_TOP = {**FOLDERS, "quantized_by": "APEX_QUANTIZED_BY", "pin": PIN_VARIABLE}
PLUGINS_OFF = "APEX_PLUGINS_OFF"
_EVERYWHERE = ("threads", "gpu-layers", "tools", "quiet", "verbose")  # options that may be at the top
_PLUGINS = ("off", "folders")
# The environment overrides a file; these options have a variable.
_VARIABLES = {"tools": "APEX_TOOLS", "python": "APEX_CONVERT_PYTHON"}
# Settings not allowed in a folder's file: its author could choose what is run or overwritten, or in whose name files
# are made.
_USERS_OWN = {
    *("cache-dir", "source-dir", "quantized-by", "tools", "plugin", "python", "tool-argument"),
    *("repository", "archive", "from", "import"),
    *("force", "make-current", "allow-uncalibrated", "allow-fallback", "allow-requantize", "no-load-check", "folders"),
    *("output", "export", "write-text", "memory"),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One value of a file. `section` is empty at the top; `key` with the option's dashes."""

    path: Path
    own: bool  # the user's own file
    section: tuple[str, ...]
    key: str
    value: Any

    @property
    def name(self) -> str:
        return ".".join((*self.section, self.key))


def user_file() -> Path:
    given = os.environ.get(VARIABLE)
    return Path(given).expanduser() if given else platformdirs.user_config_path("apex-build") / NAME


def files() -> tuple[tuple[Path, bool], ...]:
    """Existing files, the user's first, each with whether it is the user's own."""
    own, here = user_file(), Path.cwd() / NAME
    found = [(own, True)] if own.is_file() else []
    if here.is_file() and not (found and here.samefile(own)):
        found.append((here, False))
    return tuple(found)


def settings() -> tuple[Setting, ...]:
    """All settings of all files; later ones override earlier ones. Raises ConfigInvalid."""
    return tuple(setting for path, own in files() for setting in _read(path, own, path.stat().st_mtime_ns))


_SET_HERE: set[str] = set()  # variables set by a file, not by the user


def by_user(variable: str) -> bool:
    """Whether an environment variable was set before any file was read."""
    return variable in os.environ and variable not in _SET_HERE


def _export(variable: str, value: str) -> None:
    if not by_user(variable):
        os.environ[variable] = value  # a later file counts more
        _SET_HERE.add(variable)


def apply() -> None:
    """Set environment variables for the files' folders and plugins; the user's own variables take precedence."""
    for setting in settings():
        where = (*setting.section, setting.key)
        if where == ("plugins", "off"):
            _export(PLUGINS_OFF, ",".join(_texts(setting)))
        elif (name := setting.key.replace("-", "_")) in AT_TOP and not setting.section:
            text = _text(setting)
            _export(
                AT_TOP[name],
                _path(setting, text) if name in FOLDERS or (name == "pin" and text.endswith(".toml")) else text,
            )


def defaults(verb: str, command: click.Command) -> dict[str, Any]:
    """Defaults of a verb's options, by parameter, for click's default_map. Raises ConfigInvalid for unknown options."""
    given = [setting for setting in settings() if not setting.section or setting.section[0] in (verb, "plugins")]
    return _defaults((verb,), command, given)


def _defaults(section: tuple[str, ...], command: click.Command, given: list[Setting]) -> dict[str, Any]:
    if isinstance(command, click.Group):
        for setting in given:
            if setting.section[: len(section)] == section and len(setting.section) <= len(section):
                raise _unknown(setting, setting.key, command.commands, f"apex {' '.join(section)} has no options, only")
            if (
                setting.section[: len(section)] == section
                and (below := setting.section[len(section)]) not in command.commands
            ):
                raise _unknown(setting, below, command.commands, f"apex {' '.join(section)} has")
        return {name: _defaults((*section, name), below, given) for name, below in command.commands.items()}
    options = {option: parameter for parameter in command.params for option in _long(parameter)}
    found: dict[str, Any] = {}
    for setting in given:
        if setting.section == ("plugins",):
            if setting.key == "folders" and isinstance(options.get("plugin"), click.Option):
                found[str(options["plugin"].name)] = [_path(setting, text) for text in _texts(setting)]
            continue
        if setting.section not in ((), section):
            continue
        option = options.get(setting.key)
        if option is None:
            if setting.section:
                raise _unknown(setting, setting.key, options, f"apex {' '.join(section)} has the options")
            continue
        if (variable := _VARIABLES.get(setting.key)) and os.environ.get(variable):
            continue
        assert isinstance(option, click.Option)
        found[str(option.name)] = _value(setting, option, command)
    return found


def _long(parameter: click.Parameter) -> list[str]:
    """The names that a file may use for an option: `--gpu-layers` is gpu-layers."""
    if not isinstance(parameter, click.Option):
        return []
    return [name.removeprefix("--") for name in parameter.opts if name.startswith("--") and name != "--help"]


def _value(setting: Setting, option: click.Option, command: click.Command) -> Any:
    value = setting.value
    if option.multiple:
        value = value if isinstance(value, list) else [value]
    elif isinstance(value, (list, dict)):
        raise ConfigInvalid(f"{setting.path}: {setting.name} is {value!r}, expected one value")
    if isinstance(option.type, click.Path):
        value = [_path(setting, str(one)) for one in value] if option.multiple else _path(setting, str(value))
    if option.is_flag and not isinstance(value, bool):
        raise ConfigInvalid(f"{setting.path}: {setting.name} is {value!r}, expected true or false")
    if option.is_flag and not option.is_bool_flag:
        return option.flag_value if value else None
    if not option.is_flag:
        value = [str(one) for one in value] if option.multiple else str(value)
    try:
        option.type_cast_value(click.Context(command), value)
    except click.UsageError as error:
        raise ConfigInvalid(f"{setting.path}: {setting.name} is {setting.value!r}: {error.message}") from None
    return value


@functools.lru_cache(maxsize=8)
def _read(path: Path, own: bool, _changed: int) -> tuple[Setting, ...]:
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigInvalid(f"{path}: not TOML: {error}") from None
    except OSError as error:
        raise ConfigInvalid(f"{path}: cannot be read: {error.strerror}") from None
    found = tuple(_flat(path, own, (), given))
    for setting in found:
        _check(setting)
    return found


def _flat(path: Path, own: bool, section: tuple[str, ...], table: Mapping[str, Any]) -> Iterator[Setting]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(path, own, (*section, key), value)
        else:
            yield Setting(path, own, section, key.replace("_", "-"), value)


def _check(setting: Setting) -> None:
    """Checks that need no import of a verb."""
    if not setting.section:
        known = [*(name.replace("_", "-") for name in AT_TOP), *_EVERYWHERE]
        if setting.key not in known:
            raise _unknown(setting, setting.key, [*known, *VERBS], "the top level takes")
    elif setting.section[0] == "plugins":
        if setting.key not in _PLUGINS or len(setting.section) > 1:
            raise _unknown(setting, setting.key, _PLUGINS, "[plugins] has")
    elif setting.section[0] not in VERBS:
        known = [*all_verbs(), "plugins"]
        if setting.section[0] not in known:
            raise _unknown(setting, setting.section[0], known, "the sections are")
    if setting.own:
        return
    pin_file = setting.key == "pin" and str(setting.value).endswith(".toml")
    if setting.key in _USERS_OWN or pin_file:
        raise ConfigInvalid(
            f"{setting.path}: {setting.name} may only be set in your own file, not in a folder's: "
            "a file that came with a download must not choose what is run or replaced",
            hint=f"move the line to {user_file()}",
        )


def _unknown(setting: Setting, name: str, known: Any, what: str) -> ConfigInvalid:
    names = sorted(known)
    return ConfigInvalid(
        f"{setting.path}: there is no '{name}'{nearby(name, names)}; {what}: {', '.join(names)}",
        hint="apex config show",
    )


def _text(setting: Setting) -> str:
    if not isinstance(setting.value, str) or not setting.value:
        raise ConfigInvalid(f"{setting.path}: {setting.name} is {setting.value!r}, expected a text")
    return setting.value


def _texts(setting: Setting) -> list[str]:
    values = setting.value if isinstance(setting.value, list) else [setting.value]
    if not all(isinstance(value, str) and value for value in values):
        raise ConfigInvalid(f"{setting.path}: {setting.name} is {setting.value!r}, expected a list of texts")
    return values


def _path(setting: Setting, text: str) -> str:
    """A path relative to the file that names it."""
    return str(setting.path.absolute().parent / Path(text).expanduser())


def told() -> list[str]:
    """For -v: where defaults come from."""
    return [f"defaults from {path}" for path, _ in files()]
