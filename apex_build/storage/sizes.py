"""Sizes as people write them, and disk usage of files."""

from __future__ import annotations

import os
import re
from pathlib import Path

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.ASCII | re.IGNORECASE)


def parse_bytes(text: str) -> int | None:
    """Parse 20GB, 500M, 1.5GiB or 123456 as bytes; None if it is not a size."""
    found = _SIZE.fullmatch(text)
    return int(float(found[1]) * _UNITS[(found[2] or "").lower()]) if found else None


def folder_size(folder: Path, seen: set[tuple[int, int]] | None = None) -> int:
    """Disk usage of all files below; skips those whose (device, inode) is in `seen`, adds the others to it."""
    seen = set() if seen is None else seen
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                about = os.lstat(os.path.join(where, name))  # noqa: PTH118  hundreds of thousands of files
            except OSError:  # just removed
                continue
            if (about.st_dev, about.st_ino) not in seen:
                seen.add((about.st_dev, about.st_ino))
                total += about.st_blocks * 512
    return total
