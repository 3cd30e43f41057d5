"""Count what code costs: counts are the same on a busy machine, unlike seconds."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any


@dataclass
class Work:
    """What this process did in a `with counted()` block. Loops inside C code are not counted."""

    lines: int = 0  # of Python, run
    read: int = 0  # bytes that read calls returned, from files and pipes
    faults: int = 0  # pages touched for the first time, those of mapped files too


@contextmanager
def counted() -> Iterator[Work]:
    work = Work()

    def trace(_frame: FrameType, event: str, _argument: Any) -> Any:
        work.lines += event == "line"
        return trace

    read, faults, before = _bytes_read(), _faults(), sys.gettrace()
    sys.settrace(trace)
    try:
        yield work
    finally:
        sys.settrace(before)
        work.read, work.faults = _bytes_read() - read, _faults() - faults


def _bytes_read() -> int:
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


def _faults() -> int:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt + usage.ru_majflt
