"""A deadline for work that waits on servers: one that sends a byte now and then never exceeds a read timeout."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class OutOfTime(BaseException):
    """The time for the work is over. Not an Exception: the waiting code must not catch it as its own."""


@contextmanager
def deadline(seconds: float) -> Iterator[Callable[[], None]]:
    """Raise OutOfTime in the block after this many seconds, whatever it waits for. The yielded function restarts the
    time.

    Uses the process's timer, so it works only in the main thread; in others there is no deadline. A timer set by the
    caller, such as a test's time limit, still fires when it is due.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    left, _ = signal.getitimer(signal.ITIMER_REAL)
    callers = time.monotonic() + left if left else None  # when the caller's timer is due

    def until_callers() -> float:
        return max(callers - time.monotonic(), 0.001) if callers else seconds

    def ring(number: int, frame: FrameType | None) -> None:
        if callers and callers <= time.monotonic() and callable(before):
            before(number, frame)
        raise OutOfTime

    def again() -> None:
        signal.setitimer(signal.ITIMER_REAL, min(seconds, until_callers()))

    before = signal.signal(signal.SIGALRM, ring)
    again()
    try:
        yield again
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if callers:
            signal.setitimer(signal.ITIMER_REAL, until_callers())
