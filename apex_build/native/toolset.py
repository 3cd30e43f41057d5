"""The built tools: a folder with `bin/` and `manifest.json`, found in the cache or named by the user."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apex_build import places
from apex_build.errors import BuildMissing
from apex_build.storage.digests import sha256_file, sha256_json

_KINDS: Mapping[str, type | tuple[type, ...]] = {
    **{"backend": str, "built": str, "host": str, "key": str, "source": str, "compiler_cache": str},
    **{"compiler": dict, "cuda": dict, "files": dict, "options": dict, "environment": dict},
    **{"patches": list, "targets": list, "cpu_flags": list, "left_out": list},
    **{"pin": (dict, type(None)), "seconds": (int, float), "recipe": int},
}
_MOST_TYPES = 1024  # llama.cpp has some forty
_HINT = places.BUILD_HINT


@dataclass(frozen=True)
class Toolset:
    """One build of the tools: `root/bin/llama-*`, `root/bin/lib*.so`.

    `manifest` says what went into it; it is empty for a build that is not ours.
    """

    root: Path
    manifest: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def bin(self) -> Path:
        return self.root / "bin"

    def files(self) -> Iterator[Path]:
        """All files of the build: no output may replace them."""
        return (path for path in self.root.glob("*/*") if path.is_file())

    @property
    def identity(self) -> str:
        """The build's key; for a foreign build, the digest of its libraries and tools."""
        return str(self.manifest.get("key") or _digest(self.library("llama").parent))

    def tool(self, name: str) -> Path:
        """Path of a tool such as `llama-imatrix`. Raises BuildMissing."""
        path = self.bin / name
        if not os.access(path, os.X_OK) or not path.is_file():
            raise BuildMissing(f"the tools in {self.root} have no {name}", hint=_HINT)
        return path

    def library(self, name: str) -> Path:
        """Path of a shared library by its bare name, such as `ggml-base` or `llama`. Raises BuildMissing."""
        path = self.bin / f"lib{name}.so"
        if not path.is_file():
            raise BuildMissing(f"the tools in {self.root} have no library lib{name}.so", hint=_HINT)
        return path


@functools.lru_cache(maxsize=16)
def _digest(folder: Path) -> str:
    """Digest of what results depend on: backends are separate libraries, and tools may be rebuilt without them."""
    files = [*sorted(folder.glob("lib*.so")), *(folder / f"llama-{name}" for name in ("bench", "perplexity", "server"))]
    return sha256_json({path.name: sha256_file(path) for path in files if path.is_file()})


def find_toolset(path: Path | None = None) -> Toolset:
    """The tools to use: `path`, or the folder that APEX_TOOLS names, or the build of the chosen pin that was last asked
    for.

    A given folder is one that `apex build` made, or the CMake build folder or `bin` folder of any llama.cpp build.
    Raises BuildMissing if there is none, or if files of it are missing or cut short.
    """
    if path is None and (given := os.environ.get("APEX_TOOLS")):
        path = Path(given)
    if path is not None:
        return _given(path)
    current = current_build()
    if current is None:
        wrong, pin = _pointers()[1], places.chosen_pin()
        if pin == places.DEFAULT_PIN:
            raise BuildMissing("; ".join(wrong) or "the native tools have not been built", hint=_HINT)
        missing = (
            f"the native tools of the pin {pin} have not been built, and {places.PIN_VARIABLE} or apex.toml "
            "asks for them"
        )
        raise BuildMissing("; ".join(wrong) or missing, hint=f"apex build --pin {pin}")
    return open_build(current)


def current_build(pin: str = "") -> Path | None:
    """The folder of the build in use of the pin (the chosen one), if there is one.

    Each pin and backend has a pointer; the one last requested counts.
    """
    pointers = _pointers(pin)[0]
    return places.cache_root() / "builds" / max(pointers)[1] if pointers else None


def _pointers(pin: str = "") -> tuple[list[tuple[float, str]], list[str]]:
    """When each build of the pin that is in use was asked for last, with its key; and what is wrong with damaged
    pointers.
    """
    found, wrong, pin = [], [], pin or places.chosen_pin_name()
    for path in sorted((places.cache_root() / "builds").glob("current-*.json")):
        try:
            pointer = _json(path)
            at, key = pointer.get("at", 0), pointer.get("key")
            if pointer.get("pin", places.DEFAULT_PIN) != pin:
                continue
            if not isinstance(at, (int, float)) or not isinstance(key, str) or not re.fullmatch(r"[\w-]{1,64}", key):
                raise BuildMissing(f"{path} is damaged: it does not name a build")
            found.append((float(at), key))
        except (BuildMissing, OverflowError) as error:
            wrong.append(getattr(error, "message", f"{path} is damaged"))
    return found, wrong


def misshapen(manifest: Mapping[str, Any]) -> str:
    """What is wrong about the kinds of a manifest's values, of those that are there; empty if nothing is."""
    for name, kinds in _KINDS.items():
        if name in manifest and not isinstance(manifest[name], kinds):
            return f"'{name}' is of another kind"
    count = manifest.get("ggml_type_count")
    if count is not None and (type(count) is not int or not 0 < count <= _MOST_TYPES):
        return f"ggml_type_count is {count!r:.40}"
    for name, about in manifest.get("files", {}).items():
        if (
            not isinstance(about, dict)
            or type(about.get("size")) is not int
            or ".." in name.split("/")
            or name.startswith("/")
        ):
            return f"what it says of {name!r:.80}"
    return ""


def open_build(root: Path) -> Toolset:
    """A build that `apex build` made, checked cheaply: every file of its manifest is there with its size."""
    manifest = _json(root / "manifest.json")
    if wrong := misshapen(manifest):
        raise BuildMissing(f"{root / 'manifest.json'} is damaged: {wrong}", hint=_HINT)
    files = manifest.get("files")
    if not files:
        raise BuildMissing(f"{root / 'manifest.json'} lists no files", hint=_HINT)
    for name, about in files.items():
        try:
            size = (root / name).stat().st_size
        except OSError:
            raise BuildMissing(f"the build in {root} is damaged: {name} is gone", hint=_HINT) from None
        if size != about["size"]:
            raise BuildMissing(
                f"the build in {root} is damaged: {name} has {size} bytes, expected {about['size']}", hint=_HINT
            )
    return Toolset(root, manifest)


def _given(path: Path) -> Toolset:
    path = path.expanduser().absolute()
    if (path / "manifest.json").is_file():
        return open_build(path)
    for root in (path, path.parent):
        if (root / "bin" / "llama-quantize").is_file() and path in (root, root / "bin"):
            return Toolset(root, {})
    raise BuildMissing(f"{path} does not contain built tools: expected bin/llama-quantize", hint=_HINT)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise BuildMissing(f"the build in {path.parent} is incomplete: {path.name} is missing", hint=_HINT) from None
    except (ValueError, RecursionError):
        raise BuildMissing(f"{path} is damaged: not JSON", hint=_HINT) from None
    if not isinstance(value, dict):
        raise BuildMissing(f"{path} is damaged: not a JSON object", hint=_HINT)
    return value
