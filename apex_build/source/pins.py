"""Pins: the upstream commit of a tree, and the digest of its content, whatever its origin."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apex_build import places
from apex_build.errors import PinUnknown
from apex_build.near import no_such
from apex_build.places import DEFAULT_PIN as DEFAULT_PIN
from apex_build.source.serves import Serves, read_serves

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_HEX40, _HEX64 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FOLDER = re.compile(r"(?!.*\.\.)[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")


@dataclass(frozen=True)
class Pin:
    """One upstream commit.

    `requirement`, `file`, `size` and `sha256` describe the sdist that contains it, `folder` is the tree inside; all are
    empty for a pin that comes from git only. `tree_digest` is the digest of the files that a build uses (see
    source/tree_digest.py), the same from every origin. `patches` is the folder of its series and `own_file` its TOML
    file, if the pin is not shipped with apex-build. `serves`: what its tools can do, if the file says so.
    """

    name: str
    commit: str
    repository: str
    requirement: str
    file: str
    sha256: str
    folder: str
    tree_digest: str
    size: int | None = None
    patches: Path | None = None
    own_file: Path | None = None
    serves: Serves | None = None

    @property
    def option(self) -> str:
        """The option that selects this pin, for a hint: empty for the chosen one."""
        given = str(self.own_file or self.name)
        return "" if given == places.chosen_pin() else f" --pin {given}"

    @property
    def carrier(self) -> str:
        """What is fetched, for messages."""
        return self.requirement or f"git {self.commit[:12]}"

    @property
    def patches_folder(self) -> Path:
        return self.patches or places.patches_root() / self.name


def load_pin(name: str | None = None) -> Pin:
    """The pin with this name, or in this TOML file if `name` ends in `.toml`; without a name, the chosen one.

    Raises PinUnknown, also if the file lacks a key or has an invalid value.
    """
    name = name or places.chosen_pin()
    if name.endswith(".toml"):
        return replace(_read(Path(name)), own_file=Path(name))
    path = _folder() / f"{name}.toml"
    if not _NAME.fullmatch(name) or not path.is_file():
        known = [pin.name for pin in all_pins()]
        raise PinUnknown(no_such("pin", name, known), hint="apex source status")
    return _read(path)


def all_pins() -> list[Pin]:
    """The pins shipped with apex-build, the default one first."""
    pins = [_read(path) for path in sorted(_folder().glob("*.toml"))]
    return sorted(pins, key=lambda pin: pin.name != DEFAULT_PIN)


def _folder() -> Path:
    return places.data_root() / "vendor"


def _read(path: Path) -> Pin:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PinUnknown(f"pin file {path} not found", hint="apex source status") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PinUnknown(f"cannot read the pin file {path}: {error}") from None
    sdist = data.get("sdist", {})
    if not isinstance(sdist, dict):
        raise PinUnknown(f"{path}: `sdist` must be a table, found {sdist!r}")
    packaged = "sdist" in data or "origin" not in data
    if not packaged and data["origin"] != "git":
        raise PinUnknown(f"{path}: `origin` must be git, found {data['origin']!r}")
    size = sdist.get("size")
    if size is not None and not (isinstance(size, int) and size > 0):
        raise PinUnknown(f"{path}: `sdist.size` must be a number of bytes, not {size!r}")
    patches = data.get("patches")
    if patches is not None and not isinstance(patches, str):
        raise PinUnknown(f"{path}: `patches` must be a folder, not {patches!r}")
    return Pin(
        name=_text(path, data, "name", _NAME),
        commit=_text(path, data, "commit", _HEX40),
        repository=_text(path, data, "repository", re.compile(r"[^-\s]\S*")),
        requirement=_text(path, sdist, "requirement", re.compile(r"\S.*"), "sdist.") if packaged else "",
        file=_text(path, sdist, "file", re.compile(r"[A-Za-z0-9][^/\\\s]*"), "sdist.") if packaged else "",
        sha256=_text(path, sdist, "sha256", _HEX64, "sdist.") if packaged else "",
        folder=_text(path, sdist, "folder", _FOLDER, "sdist.") if packaged else "",
        tree_digest=_text(path, data, "tree_digest", _HEX64),
        size=size,
        patches=None if patches is None else (path.parent / patches).resolve(),
        serves=read_serves(path, data.get("serves")),
    )


def _text(path: Path, table: dict[str, Any], key: str, form: re.Pattern[str], prefix: str = "") -> str:
    value = table.get(key)
    if not isinstance(value, str) or not form.fullmatch(value):
        found = "nothing" if value is None else repr(value)
        raise PinUnknown(f"{path}: `{prefix}{key}` must match {form.pattern}, found {found}")
    return value
