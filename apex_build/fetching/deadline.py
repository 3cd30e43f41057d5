"""An end for work that waits on others: a server that sends a byte now and then passes every timeout of a single read."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class OutOfTime(BaseException):
    """The time that the work may take is over. No Exception: the code that waits must not take it for its own."""


@contextmanager
def deadline(seconds: float) -> Iterator[Callable[[], None]]:
    """Raise OutOfTime in the block after so many seconds, whatever it waits for. What is given starts the time again.

    By a timer of the process, and so in the main thread alone: in others there is no end.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield lambda: None
        return

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise OutOfTime

    def again() -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)

    before = signal.signal(signal.SIGALRM, ring)
    again()
    try:
        yield again
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
