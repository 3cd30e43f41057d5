"""What we need from the operating system, which is Linux; an error elsewhere."""

from __future__ import annotations

import os
import platform
import sys

from apex_build.errors import SystemUnsupported

_SUPPORTED = "apex-build runs on Linux; on macOS and Windows in a container or virtual machine, and under WSL 2"


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_linux(what: str) -> None:
    """Raises SystemUnsupported. `what`: what needs Linux."""
    if sys.platform != "linux":
        raise unsupported(f"{what} needs Linux, and this is {platform.system()}")


def unsupported(message: str) -> SystemUnsupported:
    return SystemUnsupported(message, hint=_SUPPORTED)
