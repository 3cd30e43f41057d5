"""Identities and manifests: what went into an artifact, as sha256, in a small JSON file; and writing files whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apex_build.errors import OutputUnwritable
from apex_build.near import near_folder

_ADDED = len("..json.12345678.part")  # what the longest of the names beside an output adds to its own


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Digest of a JSON value in one canonical writing: keys sorted, no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to `path` when the block ends well, removed when it does not."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def beside(out: Path, suffix: str) -> Path:
    """The file that goes with an output: `out` + .json, its manifest, or + .log."""
    return out.with_name(out.name + suffix)


def check_place(out: Path, inputs: Iterable[Path]) -> None:
    """Raises OutputUnwritable where `out` could not be put in place in the end, or if it, its manifest or its log is an input."""
    folder = out.parent
    if out.is_dir():
        raise OutputUnwritable(f"{out} is a folder, expected the name of a file", hint="give a file name with -o")
    if not folder.is_dir():
        raise OutputUnwritable(f"{folder}: no such folder{near_folder(folder)}", hint=f"mkdir -p {shlex.quote(str(folder))}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputUnwritable(f"{folder}: the folder cannot be written", hint="give another place with -o")
    if len(os.fsencode(out.name)) + _ADDED > (longest := os.pathconf(folder, "PC_NAME_MAX")):
        raise OutputUnwritable(
            f"{out.name}: the name is too long, there is room for {longest - _ADDED} bytes", hint="give a shorter name with -o"
        )
    if out.exists() and not out.is_file():
        raise OutputUnwritable(f"{out} is not a regular file", hint="give another name with -o")
    for given in inputs:
        for written in (out, beside(out, ".json"), beside(out, ".log")):
            if written.exists() and written.samefile(given):
                raise OutputUnwritable(f"{written} is the input itself, and would be overwritten", hint="give another name with -o")


def write_json(path: Path, value: Any) -> None:
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
