"""What the tools of a pin can do, from [serves] in its TOML file; checked before running a model for hours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_build.errors import PinUnknown


@dataclass(frozen=True)
class Serves:
    """`architectures`: the supported architectures.

    `heads`: those whose draft head runs; `heads_idle`: those whose head is loaded but not run. With any other, a head
    in the file may prevent loading.
    """

    architectures: frozenset[str]
    heads: frozenset[str]
    heads_idle: frozenset[str]


def read_serves(path: Path, table: Any) -> Serves | None:
    """Read the table; None if it is missing. Raises PinUnknown if it is invalid."""
    if table is None:
        return None
    if not isinstance(table, dict):
        raise PinUnknown(f"{path}: [serves] must be a table, found {table!r}")
    return Serves(*(_names(path, key, table.get(key)) for key in ("architectures", "heads", "heads_idle")))


def _names(path: Path, key: str, value: Any) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise PinUnknown(f"{path}: `serves.{key}` must be a list of names, found {value!r}")
    return frozenset(value)
