"""The manifest of an artifact: what it is, what went in, what came out. One schema for all kinds, as JSON.

Every manifest has `schema`, `kind`, `identity`, `from` (what went in; its sha256 is the identity) and `apex`; a
file's also `sha256` and `bytes`. The rest depends on the kind: a dataclass in the room that makes it. Older manifests
without a schema count as schema 0: their kind is derived from their keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from apex_build import __version__
from apex_build.storage.digests import sha256_file
from apex_build.storage.json_files import read_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
Parts: TypeAlias = Mapping[str, Json]  # what goes into an artifact

SCHEMA = 1
REPLACES = "replaces"  # while a file is being replaced: the previous file's manifest, or null if it had none
IMATRIX, MERGED, QUANTIZED, CONVERTED = "imatrix", "merged-imatrix", "quantized-model", "converted-model"
BUILD, TOOLKIT, ENVIRONMENT, KEPT = "build", "cuda-toolkit", "converter-environment", "evaluation-data"
PACKED, SWEEP = "packed-build", "sweep"
KINDS: Mapping[str, str] = {
    IMATRIX: "imatrix",
    MERGED: "imatrix merged or converted from others",
    QUANTIZED: "quantized model",
    CONVERTED: "model converted from a checkpoint",
    BUILD: "build of the tools",
    TOOLKIT: "CUDA toolkit from the package index",
    ENVIRONMENT: "Python environment of the converter",
    KEPT: "file kept for evaluations",
    PACKED: "build packed into a file",
    SWEEP: "results of a sweep",
}
_HEAD = ("schema", "kind", "identity", "from", "provenance", "sha256", "bytes", "apex", REPLACES)
# Schema 0: the first of these keys in a manifest tells its kind.
_KIND_OF_KEY = {
    "over": SWEEP, "policy": QUANTIZED, "text": IMATRIX, "merged": MERGED, "converter": CONVERTED, "backend": BUILD,
    "packages": TOOLKIT,
    "requirements": ENVIRONMENT,
}  # fmt: skip


@dataclass(frozen=True)
class Manifest:
    """`parts` is what went in; `sha256` and `n_bytes` are for a file; `details` is specific to the kind."""

    kind: str
    identity: str
    parts: Parts = field(hash=False)
    sha256: str = ""
    n_bytes: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict, hash=False)
    apex: str = __version__
    schema: int = SCHEMA

    @property
    def usable(self) -> bool:
        """Whether this version of apex understands it."""
        return self.schema <= SCHEMA

    def json(self) -> dict[str, Json]:
        head: dict[str, Json] = {
            "schema": self.schema, "kind": self.kind, "identity": self.identity, "from": self.parts, "apex": self.apex,
        }  # fmt: skip
        if self.sha256:
            head |= {"sha256": self.sha256, "bytes": self.n_bytes}
        return {**self.details, **head}

    def is_of_size(self, path: Path) -> bool:
        return self.n_bytes is not None and path.is_file() and path.stat().st_size == self.n_bytes

    def describes(self, path: Path) -> bool:
        """Whether the manifest describes this file, by size and sha256."""
        try:
            return bool(self.sha256) and path.stat().st_size == self.n_bytes and sha256_file(path) == self.sha256
        except OSError:
            return False


def details_of(details: DataclassInstance) -> dict[str, Json]:
    """A kind's dataclass as JSON. Fields with the default None are left out if they are None."""
    values = ((one, getattr(details, one.name)) for one in fields(details))
    return {one.name: _plain(value) for one, value in values if value is not None or one.default is not None}


def _plain(value: Any) -> Json:
    if is_dataclass(value) and not isinstance(value, type):
        return details_of(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    found: Json = value
    return found


def parse(value: object) -> Manifest | None:
    """A JSON value as a manifest of any schema; None if it is not one."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return None
    kind = value.get("kind", next((kind for name, kind in _KIND_OF_KEY.items() if name in value), None))
    schema, identity = value.get("schema", 0), value.get("identity", value.get("key", ""))
    old_sweep = kind == SWEEP and "from" not in value  # before schema 1 it consisted only of its parts
    parts = value if old_sweep else value.get("from", value.get("provenance", {}))
    sha256, n_bytes = value.get("sha256", ""), value.get("bytes", value.get("size"))
    if (
        not isinstance(kind, str)
        or type(schema) is not int
        or not isinstance(identity, str)
        or not isinstance(parts, dict)
    ):
        return None
    if not isinstance(sha256, str) or (n_bytes is not None and type(n_bytes) is not int):
        return None
    details = {} if old_sweep else {name: one for name, one in value.items() if name not in _HEAD}
    return Manifest(kind, identity, parts, sha256, n_bytes, details, str(value.get("apex", "")), schema)


def read_manifest(path: Path) -> Manifest | None:
    """The manifest in this file; None if there is none, or it is damaged."""
    return parse(raw_json(path))


def manifest_of(out: Path, at: Path) -> Manifest | None:
    """The manifest of the file `out`, at `at`: also during a replacement, or after an interrupted one."""
    value = raw_json(at)
    found = parse(value)
    if found is not None and REPLACES in value and not found.describes(out):
        return parse(value[REPLACES])
    return found


def raw_json(path: Path) -> Mapping[str, object]:
    """The JSON object in a file; empty if there is none."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
