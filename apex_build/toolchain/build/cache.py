"""The cache of finished builds: their keys, manifests, and look-up.

Layout of `<cache>/builds/`: `<key>/bin/...` and `<key>/manifest.json`, and `current-<backend>.json`, which names the
key of the selected build of the default pin, and when it was last requested.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_build import places
from apex_build.errors import BuildFailed, BuildMissing
from apex_build.native.toolset import Toolset, current_build, open_build
from apex_build.source.pins import DEFAULT_PIN
from apex_build.storage.digests import sha256_file, sha256_json
from apex_build.storage.json_files import read_json, write_json
from apex_build.storage.manifest import Parts
from apex_build.toolchain.build.record import FileRecord

RECIPE = 1  # part of every key: raise it when this code makes a different build than before
_TYPE_COUNT = re.compile(r"\bGGML_TYPE_COUNT\s*=\s*(\d+)")


@dataclass(frozen=True)
class Build:
    """A finished build in the cache. `current`: the selected one."""

    key: str
    root: Path
    manifest: Mapping[str, Any]
    current: bool


def builds_root() -> Path:
    return places.cache_root() / "builds"


def work_root() -> Path:
    return places.cache_root() / "work"


def parts_of(ingredients: Parts) -> Parts:
    """The parts of a build's identity."""
    return {"recipe": RECIPE, **ingredients}


def key_of(ingredients: Parts) -> str:
    """32 hexadecimal digits of the digest of all parts."""
    return sha256_json(parts_of(ingredients))[:32]


def look_up(key: str) -> Toolset | None:
    """The finished build of this key, None if there is none or it is damaged."""
    return _opened(key)[0]


def damage(key: str) -> str:
    """What is wrong with the finished build of this key; empty if it is whole, or there is none."""
    return _opened(key)[1]


def _opened(key: str) -> tuple[Toolset | None, str]:
    root = builds_root() / key
    try:
        return open_build(root) if root.is_dir() else None, ""
    except BuildMissing as error:
        return None, error.message


def make_current(toolset: Toolset, *, prefer: bool = True) -> None:
    """Select this build for `find_toolset`, if its pin is the chosen one.

    With `prefer` False a selected build of another backend stays selected.
    """
    manifest = toolset.manifest
    pin = (manifest.get("pin") or {}).get("name")
    if not isinstance(pin, str) or current_build(pin) == toolset.root:
        return
    pointer = builds_root() / f"current-{manifest['backend']}{'' if pin == DEFAULT_PIN else f'-{pin}'}.json"
    try:
        at = time.time() if prefer else float(read_json(pointer).get("at", 0))
    except (OSError, ValueError, AttributeError, TypeError, OverflowError):
        at = 0.0
    write_json(pointer, {"key": manifest["key"], "pin": pin, "at": at})


def all_builds() -> list[Build]:
    """The complete builds in the cache, newest first. Damaged ones are left out."""
    builds: list[Build] = []
    current = current_build()
    for path in builds_root().glob("*/manifest.json"):
        if path.parent.name.startswith("."):
            continue
        toolset = look_up(path.parent.name)
        if toolset is not None:
            builds.append(Build(path.parent.name, path.parent, toolset.manifest, current == path.parent))
    return sorted(builds, key=lambda build: str(build.manifest.get("built")), reverse=True)


def collect(
    binaries: Path,
    targets: Sequence[str],
    folder: Path,
    runtime: Mapping[str, Path] | None = None,
    licences: Path | None = None,
) -> dict[str, FileRecord]:
    """Copy the targets and the shared libraries (links kept as links) into `folder`/bin; returns the manifest's
    `files`.

    `runtime`: libraries that are not ours, by the names they get in bin/, marked `"part": "cuda-runtime"` in the
    manifest. `licences` is copied to licenses/. Raises BuildFailed if Ninja succeeded without making a target.
    """
    (folder / "bin").mkdir(parents=True)
    for target in targets:
        if not os.access(binaries / target, os.X_OK):
            raise BuildFailed(f"the build succeeded, but made no {target} in {binaries}")
    for path in sorted(binaries.iterdir()):
        if path.name in targets or re.search(r"\.so(\.\d+)*$", path.name):
            shutil.copy2(path, folder / "bin" / path.name, follow_symlinks=False)
    for name, path in (runtime or {}).items():
        _link_or_copy(path, folder / "bin" / name)
    if licences and licences.is_dir():
        shutil.copytree(licences, folder / "licenses")
    hashes: dict[Path, str] = {}
    files: dict[str, FileRecord] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        real = path.resolve()
        if real not in hashes:
            hashes[real] = sha256_file(real)
        name = path.relative_to(folder).as_posix()
        part = "cuda-runtime" if path.name in (runtime or {}) else None
        files[name] = FileRecord(hashes[real], real.stat().st_size, part)
    return files


def _link_or_copy(path: Path, target: Path) -> None:
    try:
        target.hardlink_to(path)
    except OSError:  # another disk, or another user's file
        shutil.copy2(path, target)


def verify(toolset: Toolset) -> int:
    """Hash every file of a build again; returns how many. Raises BuildMissing naming the ones that changed."""
    files = toolset.manifest.get("files")
    if not files:
        raise BuildMissing(
            f"{toolset.root} has no manifest to compare with: it is not a build of apex", hint="unset APEX_TOOLS"
        )
    changed = [name for name, about in files.items() if sha256_file(toolset.root / name) != about["sha256"]]
    if changed:
        raise BuildMissing(
            f"files in {toolset.root} were changed since the build: {', '.join(changed)}", hint="apex build --force"
        )
    return len(files)


def ggml_type_count(source: Path) -> int | None:
    """GGML_TYPE_COUNT of this source: libggml does not export it, and must not be asked about types beyond it."""
    try:
        found = _TYPE_COUNT.search((source / "ggml/include/ggml.h").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return int(found[1]) if found else None
