"""Names that are near one that is not known: said the same way wherever a name can be mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


def near(name: str, known: Iterable[str], *, n: int = 3, cutoff: float = 0.5) -> list[str]:
    """The names of `known` that look most like `name`, the nearest first. Case, and what joins words, do not count."""
    spelt: dict[str, str] = {}
    for one in known:
        spelt.setdefault(_plain(one), one)
    return [spelt[found] for found in difflib.get_close_matches(_plain(name), spelt, n=n, cutoff=cutoff)]


def nearby(name: str, known: Iterable[str]) -> str:
    """'; near it: i-nano, i-mini', for the middle of a message, or nothing."""
    found = near(name, known)
    return f"; near it: {', '.join(found)}" if found else ""


def near_hint(name: str, known: Iterable[str], otherwise: str, *, n: int = 3, cutoff: float = 0.5) -> str:
    """'near it: i-nano, i-mini', for a hint; `otherwise` where nothing is near."""
    found = near(name, known, n=n, cutoff=cutoff)
    return f"near it: {', '.join(found)}" if found else otherwise


def no_such(kind: str, name: str, known: Iterable[str]) -> str:
    """there is no policy 'i-nan'; near it: i-nano. There are: i-mini, i-nano"""
    listed = list(known)
    return f"there is no {kind} '{name}'{nearby(name, listed)}. There are: {', '.join(listed) or 'none'}"


def near_folder(folder: Path) -> str:
    """'; near it: models', for a missing folder: similar names beside the first missing part of its path."""
    missing = folder
    while not missing.parent.is_dir() and missing.parent != missing:
        missing = missing.parent
    try:
        beside = sorted(path.name for path in missing.parent.iterdir() if path.is_dir())
    except OSError:
        return ""
    found = near(missing.name, beside, cutoff=0.6)
    return f"; near it: {', '.join(str(missing.with_name(name)) for name in found)}" if found else ""


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
