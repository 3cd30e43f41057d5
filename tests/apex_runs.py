"""Run `apex` in tests as a user does."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import Any


def run_apex(*arguments: object, code: int = 0, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `apex` as a separate process. It must never print a traceback."""
    command = [sys.executable, "-m", "apex_build", *map(str, arguments)]
    settings: dict[str, Any] = {"timeout": 900, **options}
    ran: subprocess.CompletedProcess[str] = subprocess.run(command, capture_output=True, text=True, **settings)
    assert "Traceback" not in ran.stderr, ran.stderr
    assert ran.returncode == code, f"code {ran.returncode}, expected {code}\n{ran.stdout[-2000:]}\n{ran.stderr[-3000:]}"
    return ran


def killed(arguments: list[str], said: str, how: signal.Signals, *, wait: float = 4) -> str:
    """Run `apex` until it says something, and end it there; what it said."""
    command = [sys.executable, "-u", "-m", "apex_build", *arguments]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert run.stderr is not None
    lines = []
    try:
        for line in run.stderr:
            lines.append(line)
            if said in line:
                break
        time.sleep(wait)
        run.send_signal(how)
        rest = run.stderr.read()
    finally:
        run.kill()
        run.wait()
    assert any(said in line for line in lines), "".join(lines)
    return "".join(lines) + rest


# The shipped model has six trunk layers: with these, edge, near and middle all occur.
SMALL = ("--set", "edge=1", "--set", "near=1", "--set", "attention_edge=1")
