"""Identities and manifests: what went into an artifact, as sha256, in a small JSON file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from apex_build.outputs import whole_file


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Digest of a JSON value in one canonical writing: keys sorted, no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises OSError, and ValueError for what is no JSON, or JSON that is nested beyond reason."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
