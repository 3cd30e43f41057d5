"""Make standard output and standard error usable, and harmless to a terminal.

Names of files and of models reach both. What could move a cursor, change a title or turn the direction of text is shown
as an escape; colours may pass on standard output, and the movements of the progress bars on standard error.
"""

from __future__ import annotations

import io
import os
import re
import sys
from typing import Any

from apex_build.printable import HARMFUL

_COLOURS = re.compile(r"(\x1b\[[0-9;]*m)")
_MOVEMENTS = re.compile(r"(\x1b\[[0-9;?]*[A-Za-z]|\r)")


def prepare() -> None:
    """Replace Python's own streams; if our caller closed one, its output is discarded."""
    for descriptor in (0, 1, 2):  # else the next opened file would become one of them
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _Text(
            _Output(1, "wb", closefd=False), _COLOURS, line_buffering=sys.stdout is not None and sys.stdout.isatty()
        )
    if sys.stderr is sys.__stderr__:
        sys.stderr = _Text(_Error(2, "wb", closefd=False), _MOVEMENTS, line_buffering=True)


def discard() -> None:
    """Discard output that is not printed yet: Python would retry at exit, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class _Output(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from None


class _Error(io.FileIO):
    def write(self, data: Any) -> int:
        """Write; if the stream is closed, the work continues without output."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


class _Text(io.TextIOWrapper):
    def __init__(self, raw: io.FileIO, allowed: re.Pattern[str], *, line_buffering: bool) -> None:
        super().__init__(
            io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=line_buffering
        )
        self._allowed = allowed

    def write(self, text: str) -> int:
        if HARMFUL.search(text):
            pieces = self._allowed.split(text)  # every second part is allowed
            text = "".join(piece if number % 2 else escaped(piece) for number, piece in enumerate(pieces))
        return super().write(text)


def escaped(text: str) -> str:
    """Escape what a terminal would obey: `\\x1b`, `\\u202e`."""
    return HARMFUL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
