"""Remember results for a source, by its identity: whether it builds, and which of llama.cpp's own tests pass."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from apex_build import places
from apex_build.storage.json_files import read_json, write_json


def results_root() -> Path:
    return places.cache_root() / "patch-results"


def recall(identity: str) -> dict[str, Any]:
    """The results for a source; empty if there are none or the file is damaged."""
    try:
        found = read_json(_file(identity))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("source") == identity else {}


def remember(identity: str, key: str, value: dict[str, Any]) -> None:
    """Store `value` for `key` ("builds", "tests") with the time; keep other keys."""
    when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    path = _file(identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**recall(identity), "source": identity, key: {**value, "when": when}})


def _file(identity: str) -> Path:
    return results_root() / f"{identity[:32]}.json"
