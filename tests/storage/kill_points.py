"""Kill a piece of Python before each of its system calls in turn: the kernel stops it there (ptrace), and it gets
SIGKILL.

Linux only, like all of apex-build; the child is a fork of this process, so that nothing is imported again.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_TRACEME, _SYSCALL, _SETOPTIONS = 0, 24, 0x4200
_EXITKILL = 0x100000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def run_until(work: Callable[[], object], stop: int | None) -> int | None:
    """Fork and do the work; kill it at the `stop`th stop (each call stops before and after it). Returns how many there
    were.

    None: the work ended before. Raises AssertionError if it failed by itself.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _libc.ptrace(_TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.waitpid(child, 0)
    _libc.ptrace(_SETOPTIONS, child, None, ctypes.c_void_p(_EXITKILL))
    count = 0
    while True:
        if count == stop:
            os.kill(child, signal.SIGKILL)
        _libc.ptrace(_SYSCALL, child, None, None)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return count
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the work failed by itself"
            return None if stop is not None else count
        count += 1


def traceable() -> bool:
    """Whether this machine lets a parent process trace its child."""
    try:
        return run_until(lambda: None, None) is not None
    except (OSError, AssertionError):
        return False
