"""Kill a program at random moments of its run, however long a run takes on this machine."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

MOST = 60  # tries, for a few kills


def seconds_of(words: Sequence[str]) -> float:
    began = time.monotonic()
    subprocess.run(words, check=True, capture_output=True)
    return time.monotonic() - began


def kill_at_random(
    words: Sequence[str], takes: float, seed: int, kills: int, check: Callable[[], object] = lambda: None
) -> None:
    """Kill it that often, each time within the seconds that it takes. A try that ends by itself first does not count.

    `check` is called after each try.
    """
    chance, killed = random.Random(seed), 0
    for _ in range(MOST):
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        began = time.monotonic()
        try:
            child.wait(chance.uniform(0.05, 1.0) * takes)
            takes = min(takes, time.monotonic() - began)  # the machine was busier when it was timed
        except subprocess.TimeoutExpired:
            child.kill()
            killed += child.wait() == -signal.SIGKILL
        check()
        if killed == kills:
            return
    raise AssertionError(f"killed {killed} times in {MOST} tries, of which each takes {takes:.2f} s: {' '.join(words)}")
