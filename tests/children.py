"""Processes that a test has left running."""

from __future__ import annotations

import os
from pathlib import Path


def servers() -> list[int]:
    """Our own children that are llama-server and have not ended."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, fields = entry.read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue
        state, parent = fields.split()[:2]  # proc(5)
        if name == "llama-server" and int(parent) == os.getpid() and state != "Z":
            found.append(int(entry.parent.name))
    return found
