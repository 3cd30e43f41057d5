"""The cache of finished builds: what a build's key is made of, its manifest, and finding builds again.

Layout of `<cache>/builds/`: `<key>/bin/...` and `<key>/manifest.json`, and `current-<backend>.json`, which names the key of the
newest build of the default pin.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_build import places
from apex_build.errors import BuildFailed, BuildMissing
from apex_build.identity import sha256_file, sha256_json, write_json
from apex_build.native.toolset import Toolset, open_build
from apex_build.source.pins import DEFAULT_PIN

RECIPE = 1  # part of every key: raise it when a build made by this code differs from what the code before would have made
_TYPE_COUNT = re.compile(r"\bGGML_TYPE_COUNT\s*=\s*(\d+)")


@dataclass(frozen=True)
class Build:
    """A finished build in the cache. `current`: the one that the tools are taken from."""

    key: str
    root: Path
    manifest: Mapping[str, Any]
    current: bool


def builds_root() -> Path:
    return places.cache_root() / "builds"


def work_root() -> Path:
    return places.cache_root() / "work"


def key_of(ingredients: Mapping[str, Any]) -> str:
    """32 hexadecimal digits over everything that went in."""
    return sha256_json({"recipe": RECIPE, **ingredients})[:32]


def look_up(key: str) -> Toolset | None:
    """The finished build of this key, None where there is none or it is damaged."""
    root = builds_root() / key
    try:
        return open_build(root) if root.is_dir() else None
    except BuildMissing:
        return None


def make_current(toolset: Toolset) -> None:
    """Let `find_toolset` take this build, if it is one of the default pin."""
    manifest = toolset.manifest
    if (manifest.get("pin") or {}).get("name") == DEFAULT_PIN:
        pointer = builds_root() / f"current-{manifest['backend']}.json"
        if not _is_current(toolset):
            write_json(pointer, {"key": manifest["key"], "pin": DEFAULT_PIN})


def all_builds() -> list[Build]:
    """The complete builds in the cache, newest first. Damaged ones are left out."""
    builds: list[Build] = []
    for path in builds_root().glob("*/manifest.json"):
        if path.parent.name.startswith("."):
            continue
        toolset = look_up(path.parent.name)
        if toolset is not None:
            builds.append(Build(path.parent.name, path.parent, toolset.manifest, _is_current(toolset)))
    return sorted(builds, key=lambda build: str(build.manifest.get("built")), reverse=True)


def _is_current(toolset: Toolset) -> bool:
    try:
        text = (builds_root() / f"current-{toolset.manifest['backend']}.json").read_text(encoding="utf-8")
    except (OSError, KeyError):
        return False
    return f'"{toolset.root.name}"' in text


def collect(binaries: Path, targets: Sequence[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Copy the targets and the shared libraries (links kept as links) into `folder`/bin; returns the manifest's `files`.

    Raises BuildFailed where Ninja succeeded without making a target.
    """
    (folder / "bin").mkdir(parents=True)
    for target in targets:
        if not os.access(binaries / target, os.X_OK):
            raise BuildFailed(f"the build ended well, but made no {target} in {binaries}")
    for path in sorted(binaries.iterdir()):
        if path.name in targets or re.search(r"\.so(\.\d+)*$", path.name):
            shutil.copy2(path, folder / "bin" / path.name, follow_symlinks=False)
    hashes: dict[Path, str] = {}
    files = {}
    for path in sorted((folder / "bin").iterdir()):
        real = path.resolve()
        if real not in hashes:
            hashes[real] = sha256_file(real)
        files[f"bin/{path.name}"] = {"sha256": hashes[real], "size": real.stat().st_size}
    return files


def verify(toolset: Toolset) -> int:
    """Hash every file of a build again; returns how many. Raises BuildMissing naming the ones that changed."""
    files = toolset.manifest.get("files")
    if not files:
        raise BuildMissing(f"{toolset.root} has no manifest to compare with: it is not a build of apex", hint="unset APEX_TOOLS")
    changed = [name for name, about in files.items() if sha256_file(toolset.root / name) != about["sha256"]]
    if changed:
        raise BuildMissing(f"files in {toolset.root} are not as they were built: {', '.join(changed)}", hint="apex build --force")
    return len(files)


def ggml_type_count(source: Path) -> int | None:
    """GGML_TYPE_COUNT of this source: libggml does not tell it, and whoever asks libggml about types must not ask beyond."""
    try:
        found = _TYPE_COUNT.search((source / "ggml/include/ggml.h").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return int(found[1]) if found else None
