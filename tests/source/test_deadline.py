"""Deadlines for waiting on others, which coexist with the caller's timers."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

from apex_build.fetching.deadline import OutOfTime, deadline


class Rang(Exception):
    """Raised by the caller's timer."""


@contextmanager
def callers_timer(seconds: float) -> Iterator[None]:
    """A timer of the caller; the timer of the test's time limit is suspended meanwhile."""

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise Rang

    left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)


def test_a_deadline_holds_under_a_later_timer_which_goes_on() -> None:
    with callers_timer(300):
        with pytest.raises(OutOfTime), deadline(0.05):
            time.sleep(3600)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 300
        with pytest.raises(Rang):
            signal.raise_signal(signal.SIGALRM)


def test_an_earlier_timer_rings_as_its_owner_wants() -> None:
    with pytest.raises(Rang), callers_timer(0.3), deadline(300):
        time.sleep(3600)


def test_what_is_in_time_leaves_the_callers_timer() -> None:
    for seconds in (0, 200):
        with callers_timer(seconds):
            with deadline(300) as again:
                again()
                assert signal.getitimer(signal.ITIMER_REAL)[0] <= (seconds or 300)
            left, _ = signal.getitimer(signal.ITIMER_REAL)
            assert 0 < left <= 200 if seconds else left == 0
