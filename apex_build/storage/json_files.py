"""Our JSON files: written whole or not at all; every fault in reading is a ValueError or OSError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from apex_build.storage.outputs import whole_file


def write_json(path: Path, value: Any) -> None:
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises OSError, and ValueError for anything that is not JSON or is nested too deeply."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
