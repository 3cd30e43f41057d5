"""Find processes that a test left running."""

from __future__ import annotations

import os
from pathlib import Path


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def servers() -> list[int]:
    """Our llama-server child processes that still run."""
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


def tool_of(parent: int) -> bool:
    """Whether a process is running one of the native tools."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, fields = stat.read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue
        if name.startswith("llama-") and int(fields.split()[1]) == parent:
            return True
    return False
