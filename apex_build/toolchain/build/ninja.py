"""Parse what Ninja and CMake print: progress, and the relevant part of a failure."""

from __future__ import annotations

import re
from collections.abc import Sequence

STATUS = "[%f/%t] "
_PROGRESS = re.compile(r"\[(\d+)/(\d+)\] ")
_ERROR = re.compile(
    r"(?:fatal )?error: |: error:|undefined reference|cannot find -l|collect2: |ld: |Killed|internal compiler error|No "
    r"space left"
)
_MOST = 20  # lines shown


def steps_done(line: str) -> tuple[int, int] | None:
    """(finished, all) steps."""
    found = _PROGRESS.match(line)
    return (int(found[1]), int(found[2])) if found else None


def compile_errors(lines: Sequence[str]) -> list[str]:
    """For each `FAILED:` block: its first line, and the compiler's errors with the source line and the mark below them.

    The command line in between is left out; it is thousands of characters long, and in the log.
    """
    shown: list[str] = []
    block: list[str] = []
    inside = False
    for line in (*lines, "[0/0] "):
        if steps_done(line) or line.startswith(("ninja: ", "FAILED: ")):
            if block:
                shown += _essence(block)
            block, inside = [], line.startswith("FAILED: ")
        if inside:
            block.append(line)
    return shown[:_MOST] or [line for line in lines if line.startswith("ninja: ")][-3:]


def _essence(block: Sequence[str]) -> list[str]:
    said = block[2:]  # after FAILED: and the command
    errors = [index for index, line in enumerate(said) if _ERROR.search(line)]
    wanted = sorted({index + below for index in errors[:5] for below in range(3) if index + below < len(said)})
    return [block[0], *(said[index] for index in wanted)] if wanted else [block[0], *said[-8:]]


def configure_errors(lines: Sequence[str]) -> list[str]:
    """CMake's own error messages, each to its end."""
    shown: list[str] = []
    inside = False
    for line in lines:
        if line.startswith("CMake Error"):
            inside = True
        elif inside and line and not line.startswith(" "):
            inside = False
        if inside and line.strip():
            shown.append(line)
    return shown[:_MOST] or [line for line in lines if line.strip()][-5:]
