"""Packed builds, unchanged and tampered with."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from apex_build.fetching.archive import members_of, open_tar
from apex_build.toolchain.packed.packing import MANIFEST, SUMS

Files = dict[str, bytes]
Edit = Callable[[Files, list[tarfile.TarInfo]], object]


@dataclass(frozen=True)
class Origin:
    """The machine on which everything was built and packed."""

    cache: Path
    source: Path
    archive: Path


def contents(archive: Path) -> Files:
    """By their names in the archive's folder."""
    found = {}
    with open_tar(archive) as tar:
        for member in list(members_of(archive, tar)):
            file = tar.extractfile(member)
            assert file
            found[member.name.partition("/")[2]] = file.read()
    return found


def write(archive: Path, files: Files, more: list[tarfile.TarInfo]) -> Path:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"top/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in more:
            tar.addfile(info)
    archive.write_bytes(zstandard.ZstdCompressor().compress(raw.getvalue()))
    return archive


def edited(archive: Path, edit: Edit, *, sums: bool = True) -> Path:
    """A tampered copy; with `sums`, both lists are updated to match."""
    files, more = contents(archive), list[tarfile.TarInfo]()
    edit(files, more)
    if sums:
        manifest = json.loads(files[MANIFEST])
        if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict):
            for name, about in manifest["files"].items():
                if name in files and isinstance(about, dict):
                    about |= {"sha256": hashlib.sha256(files[name]).hexdigest(), "size": len(files[name])}
            files[MANIFEST] = json.dumps(manifest).encode()
        names = [name for name in files if name != SUMS]
        files[SUMS] = "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in names).encode()
    return write(archive.with_name("edited.tar.zst"), files, more)


def manifested(**changes: Any) -> Edit:
    def edit(files: Files, _: list[tarfile.TarInfo]) -> None:
        files[MANIFEST] = json.dumps(json.loads(files[MANIFEST]) | changes).encode()

    return edit
