"""The CPU that the tools are built for: its instruction sets."""

from __future__ import annotations

import functools
import re
from pathlib import Path

# x86 CPU features that a compiler may use with -march=native, by the kernel's names.
_X86 = re.compile(r"(abm|adx|aes|amx|avx|bmi|f16c|fma|gfni|movbe|pclmul|popcnt|sse4_|ssse|vaes|vpclmul)\w*")


@functools.lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """The instruction sets of this machine's CPU, as /proc/cpuinfo names them; empty if it cannot be read."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    if found := re.search(r"^Features\s*: (.*)$", text, re.MULTILINE):  # ARM
        return frozenset(found[1].split())
    found = re.search(r"^flags\s*: (.*)$", text, re.MULTILINE)
    return frozenset(flag for flag in found[1].split() if _X86.fullmatch(flag)) if found else frozenset()
