"""Disk usage of files."""

from __future__ import annotations

import os
from pathlib import Path


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
