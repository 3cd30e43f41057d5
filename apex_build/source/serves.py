"""What the tools of a pin can do, as its TOML file says under [serves]: asked before a model is run for hours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_build.errors import PinUnknown


@dataclass(frozen=True)
class Serves:
    """`architectures`: all that a model file may be of.

    `heads`: those whose draft head is run; `heads_idle`: those whose head is loaded and not run. Of any other a head in
    the file may keep the model from loading.
    """

    architectures: frozenset[str]
    heads: frozenset[str]
    heads_idle: frozenset[str]


def read_serves(path: Path, table: Any) -> Serves | None:
    """Raises PinUnknown for a table of another form; None if there is none."""
    if table is None:
        return None
    if not isinstance(table, dict):
        raise PinUnknown(f"{path}: [serves] must be a table, not {table!r}")
    return Serves(*(_names(path, key, table.get(key)) for key in ("architectures", "heads", "heads_idle")))


def _names(path: Path, key: str, value: Any) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise PinUnknown(f"{path}: `serves.{key}` must be a list of names, not {value!r}")
    return frozenset(value)
