"""Wait for a state that another process or thread brings about, however fast the machine is."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
BOUND = 120.0  # seconds: only a failure takes that long


def until(what: Callable[[], T], child: subprocess.Popen[Any] | None = None, seconds: float = BOUND) -> T:
    """Ask again and again; returns the first true answer.

    Raises AssertionError where none has come in `seconds`, or before the child ended: what it said is in the message.
    The child is then killed, so that nothing waits for it.
    """
    deadline = time.monotonic() + seconds
    while True:
        ended = child is not None and child.poll() is not None
        if found := what():
            return found
        if ended and child is not None:
            raise AssertionError(f"the child ended before this was so, with code {child.returncode}: {_said(child)}")
        if time.monotonic() > deadline:
            said = ""
            if child is not None:
                child.kill()
                said = f"; the child said: {_said(child)}"
            raise AssertionError(f"this was not so within {seconds:.0f} s{said}")
        time.sleep(0.02)


def _said(child: subprocess.Popen[Any]) -> str:
    """What its pipes hold; a child of its own may have them open."""
    said = b""
    for stream in (child.stdout, child.stderr):
        if stream is not None:
            os.set_blocking(stream.fileno(), False)
            with suppress(BlockingIOError):
                said += os.read(stream.fileno(), 1 << 16)
    return said.decode(errors="replace")
