"""How much memory a tool may take: a limit, and a watch that ends a tool that exceeds it.

A limit enforced by the kernel would not work: RLIMIT_AS counts the model, which is only mapped, and the address
ranges that CUDA reserves. This counts what a process has written to: its own pages, including swapped-out ones.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from apex_build.errors import ToolKilled

# the option of every verb that runs a model
MEMORY = "Memory in GB that a tool may take beside the model's file.  [default: twice the model and 8.6]"

_BASE = 8 << 30
SHARE = 0.95  # of the machine's memory: the rest of the system needs some
_EVERY = 0.2  # seconds
_OWN_PAGES = re.compile(r"^(?:RssAnon|VmSwap):\s*(\d+) kB", re.MULTILINE)


@dataclass
class Guard:
    """The watch over one process. `exceeded`: the bytes it had when it was ended for that, else 0."""

    limit: int
    exceeded: int = 0

    def error(self, name: str, log: Path | None) -> ToolKilled:
        where = f"\n  all of its output: {log}" if log else ""
        return ToolKilled(
            f"{name} took {self.exceeded / 1e9:.1f} GB of memory, and was ended: its limit is {self.limit / 1e9:.1f} "
            f"GB{where}",
            hint=f"--memory {max(1, round(2 * self.limit / 1e9))} gives it more, in GB; is the file whole? apex "
            "inspect MODEL",
        )


def bytes_of(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * 1e9)


def memory_limit(n_bytes: int, context: int = 0, vocabulary: int = 0) -> int:
    """Bytes that a tool may take for a model of `n_bytes`: twice the model, which repacking for the CPU or --no-mmap
    copies, its probabilities for a context of `context` tokens (at most float64), and 8 GiB; but no more than the
    machine has.
    """
    return min(_BASE + 2 * n_bytes + 16 * context * vocabulary, int(SHARE * machine_memory()))


def machine_memory() -> int:
    """Bytes of memory and swap of the machine, or its container's limit."""
    text = _read("/proc/meminfo")
    total = sum(int(size) << 10 for size in re.findall(r"^(?:MemTotal|SwapTotal):\s*(\d+) kB", text, re.MULTILINE))
    limits = [int(text) for path in _CGROUP if (text := _read(path).strip()).isdecimal()]
    return min([total or 1 << 62, *limits])


_CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@contextmanager
def memory_guard(pid: int, limit: int | None) -> Iterator[Guard]:
    """Watch a process while the block runs: it is killed if it takes more than `limit`. None: no limit."""
    guard = Guard(limit or 0)
    if limit is None:
        yield guard
        return
    done = threading.Event()
    process = os.pidfd_open(pid)  # this very process, even if its number is reused

    def watch() -> None:
        while not done.wait(_EVERY):
            if (taken := own_memory(pid)) > guard.limit:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                    guard.exceeded = taken
                return

    thread = threading.Thread(target=watch, name="memory", daemon=True)
    thread.start()
    try:
        yield guard
    finally:
        done.set()
        thread.join()
        os.close(process)


def own_memory(pid: int) -> int:
    """Bytes that a process alone takes, in memory or swapped out; 0 if it is gone."""
    return sum(int(size) << 10 for size in _OWN_PAGES.findall(_read(f"/proc/{pid}/status")))


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
