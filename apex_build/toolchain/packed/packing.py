"""A finished build as one file, to move to another machine.

A zstd-compressed tar of regular files in one folder: SHA256SUMS (as `sha256sum -c` reads it), manifest.json, bin/ and
licenses/. The same build always gives the same bytes. unpacking.py reads it.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from apex_build.errors import BuildMissing, OutputUnwritable
from apex_build.native.toolset import Toolset
from apex_build.progress import Report, Step, silent
from apex_build.storage.artifacts import Artifact, making
from apex_build.storage.digests import sha256_json
from apex_build.storage.disk import check_room
from apex_build.storage.manifest import PACKED, Parts, read_manifest
from apex_build.storage.outputs import MANIFEST as BESIDE
from apex_build.storage.outputs import beside, check_apart, check_place, with_manifest_and_log
from apex_build.toolchain.build import cache
from apex_build.toolchain.machine.cpu import cpu_flags
from apex_build.toolchain.packed.licences import licence_texts

SUFFIX = ".tar.zst"
_OTHER_NAME = "give another name with --export"
SUMS, MANIFEST = "SHA256SUMS", "manifest.json"
_LEVEL = 9  # of zstd: beyond it, seconds become minutes for a hundredth of the size
_WINDOW = 25  # bits; a library and its copy under another name are within this distance
# Keys of a manifest that are not parts of the build's key.
_RECORDED = frozenset(
    {"built", "compiler_cache", "cpu_flags", "files", "ggml_type_count", "host", "key", "patches", "recipe", "seconds"}
    | {"apex", "from", "identity", "kind", "schema"}
)
_OF_KEY = {"compiler": ("kind", "target", "version"), "cuda": ("origin", "packages", "version")}
_RUNTIME = "cuda-runtime"  # the `part` of files that are NVIDIA's


@dataclass(frozen=True)
class PackedRecord:
    """The manifest beside a packed build, beyond its head: which build it is, and what it is for."""

    key: str
    backend: str
    host: str
    files: int
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Packed:
    """A build as a file. `left_out`: libraries that the other machine must have itself."""

    path: Path
    sha256: str
    size: int
    manifest: Mapping[str, Any] = field(hash=False)
    left_out: tuple[str, ...] = ()


def pack(toolset: Toolset, source: Path, out: Path, *, cuda_runtime: bool = True, report: Report = silent) -> Packed:
    """Write the build `toolset`, made from `source`, to `out`, with its manifest and the licences of its contents.

    Without `cuda_runtime`, NVIDIA's libraries are left out; the packed build then has its own key. Raises
    BuildMissing (damaged, or without NVIDIA's licence), OutputUnwritable, DiskTooSmall.
    """
    check_out(out)
    check_apart(with_manifest_and_log(out), toolset.files(), _OTHER_NAME)
    check_room(
        out.parent, sum(path.stat().st_size for path in toolset.files()), f"the build {toolset.root.name}, unpacked,"
    )
    report(Step("checking the build", 0))
    cache.verify(toolset)
    manifest, left_out = _manifest_for(toolset, cuda_runtime)
    files: dict[str, Path | bytes] = {name: toolset.root / name for name in manifest["files"]}
    for name, text in licence_texts(source).items():
        if name not in files:
            files[name] = text
            manifest["files"][name] = {"sha256": hashlib.sha256(text).hexdigest(), "size": len(text)}
    listing = (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()
    sums = {name: about["sha256"] for name, about in manifest["files"].items()} | {
        MANIFEST: hashlib.sha256(listing).hexdigest()
    }
    text = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()
    went_in = {"build": manifest["key"], "manifest": sums[MANIFEST], "zstd": {"level": _LEVEL, "window": _WINDOW}}
    with making(Artifact(out, PACKED, went_in), inputs=toolset.files(), replace="anything", report=report) as draft:
        if not (made := draft.found):
            contents = {SUMS: text, MANIFEST: listing, **dict(sorted(files.items()))}
            _write(draft.part, f"apex-build-{manifest['key'][:12]}", contents, report)
            record = PackedRecord(manifest["key"], manifest["backend"], manifest["host"], len(files), left_out)
            made = draft.done(record)
    return Packed(out, made.sha256, out.stat().st_size, manifest, left_out)


def check_out(out: Path) -> None:
    """Raises OutputUnwritable if a build could not be packed to this file. Only packed builds are replaced."""
    if not out.name.endswith(SUFFIX):
        raise OutputUnwritable(f"{out}: expected a name that ends with {SUFFIX}", hint=f"--export {out.name}{SUFFIX}")
    check_place(out, _OTHER_NAME)
    if out.exists() and not _is_packed(out):
        raise OutputUnwritable(f"{out} exists and is not a packed build", hint=_OTHER_NAME)
    at = beside(out, BESIDE)
    if at.exists() and ((found := read_manifest(at)) is None or found.kind != PACKED):
        raise OutputUnwritable(f"{at} exists and is not the manifest of a packed build", hint=_OTHER_NAME)


def _is_packed(path: Path) -> bool:
    """Whether it starts like a file that `pack` wrote."""
    try:
        with (
            path.open("rb") as file,
            zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW).stream_reader(file) as stream,
            tarfile.open(fileobj=stream, mode="r|") as tar,
        ):
            first = tar.next()
    except (OSError, EOFError, ValueError, tarfile.TarError, zstandard.ZstdError):
        return False
    return first is not None and re.fullmatch(rf"apex-build-[0-9a-f]{{12}}/{SUMS}", first.name) is not None


def key_of(manifest: Mapping[str, Any]) -> str:
    """The build's key, recomputed from the inputs that the manifest lists."""
    return cache.key_of(_ingredients(manifest))


def parts_of(manifest: Mapping[str, Any]) -> Parts:
    """The parts of the build's identity: older builds, without a schema, do not list them."""
    return manifest["from"] if "from" in manifest else cache.parts_of(_ingredients(manifest))


def _ingredients(manifest: Mapping[str, Any]) -> dict[str, Any]:
    ingredients = {name: value for name, value in manifest.items() if name not in _RECORDED}
    for name, fields in _OF_KEY.items():
        if ingredients.get(name) is not None:
            ingredients[name] = {field: ingredients[name][field] for field in fields}
    return ingredients


def _manifest_for(toolset: Toolset, cuda_runtime: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    manifest: dict[str, Any] = {**toolset.manifest, "files": dict(toolset.manifest["files"])}
    if manifest.get("cpu") and "cpu_flags" not in manifest:  # made for this CPU: the other one needs the same features
        manifest["cpu_flags"] = sorted(cpu_flags())
    runtime = [name for name, about in manifest["files"].items() if about.get("part") == _RUNTIME]
    if runtime and not cuda_runtime:
        manifest["files"] = {name: about for name, about in manifest["files"].items() if name not in runtime}
        manifest["left_out"] = sorted(name.rpartition("/")[2] for name in runtime)
        if "from" in manifest:
            manifest["from"] = {**manifest["from"], "left_out": manifest["left_out"]}
            manifest["identity"] = sha256_json(manifest["from"])
        manifest["key"] = key_of(manifest)
    elif runtime and not any(name.startswith("licenses/nvidia-") for name in manifest["files"]):
        raise BuildMissing(
            f"{toolset.root} holds {', '.join(runtime)} without NVIDIA's licence, which has to go with them",
            hint="--no-cuda-runtime leaves them out; or apex build --cuda-toolchain pypi, whose wheels bring the "
            "licence",
        )
    return manifest, tuple(manifest.get("left_out", ()))


def _write(out: Path, folder: str, files: Mapping[str, Path | bytes], report: Report) -> None:
    settings = zstandard.ZstdCompressionParameters.from_level(_LEVEL, window_log=_WINDOW, threads=-1, write_checksum=1)
    with (
        out.open("wb") as file,
        zstandard.ZstdCompressor(compression_params=settings).stream_writer(file, closefd=False) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        for number, (name, content) in enumerate(files.items()):
            report(Step("packing", number, len(files), "files"))
            info = tarfile.TarInfo(f"{folder}/{name}")  # no time, owner or group
            info.mode = 0o755 if name.startswith("bin/") else 0o644
            with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as data:
                info.size = data.seek(0, io.SEEK_END)
                data.seek(0)
                tar.addfile(info, data)
