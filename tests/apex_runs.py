"""Run `apex` in tests as a user does."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any


def run_apex(*arguments: object, code: int = 0, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `apex` as a separate process. It must never print a traceback."""
    command = [sys.executable, "-m", "apex_build", *map(str, arguments)]
    settings: dict[str, Any] = {"timeout": 900, **options}
    ran: subprocess.CompletedProcess[str] = subprocess.run(command, capture_output=True, text=True, **settings)
    assert "Traceback" not in ran.stderr, ran.stderr
    assert ran.returncode == code, f"code {ran.returncode}, expected {code}\n{ran.stdout[-2000:]}\n{ran.stderr[-3000:]}"
    return ran


_ENDED = """
import importlib, os, signal, sys, time
module, name, calls, how = sys.argv[1:5]
*classes, name = name.split(".")
place = importlib.import_module(module)
for one in classes:
    place = getattr(place, one)
real, left = getattr(place, name), int(calls)
def counted(*arguments, **named):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), int(how))
        time.sleep(3)  # in a thread: the main one is interrupted meanwhile
    return real(*arguments, **named)
setattr(place, name, counted)
signal.signal(signal.SIGINT, signal.default_int_handler)
from apex_build.cli import main
main(sys.argv[5:])
"""


def ended_at(at: tuple[str, str], calls: int, how: signal.Signals, *arguments: object) -> tuple[str, str]:
    """Run `apex` to the n-th call of the function `at` (module, name), and end it there; what it said."""
    command = [sys.executable, "-c", _ENDED, *at, str(calls), str(int(how)), *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=900)
    ends = {signal.SIGINT: 130, signal.SIGTERM: 143}
    assert ran.returncode == ends.get(how, -how), (ran.returncode, ran.stderr)
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran.stdout, ran.stderr


# The shipped model has six trunk layers: with these, edge, near and middle all occur.
SMALL = ("--set", "edge=1", "--set", "near=1", "--set", "attention_edge=1")
