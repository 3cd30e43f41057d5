"""A tool's bytes as lines of text: complete ones, and the unfinished one while it grows."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable

_LONGEST = 1 << 20  # characters of one line; a longer one is cut into pieces
# What a terminal obeys instead of showing it: control characters, and those that turn the direction of text or hide it.
HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e0fff]")
_CONTROL = re.compile(rf"\x1b\[[0-9;?]*[ -/]*[@-~]|{HARMFUL.pattern}")


class Lines:
    """Splits a stream.

    `keep` gets each line that `\\n` (or the end) closed; `show` gets those too, the ones that `\\r` closed,
    and the unfinished one as it grows.
    """

    def __init__(self, keep: Callable[[str], object], show: Callable[[str], object] | None = None) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._keep = keep
        self._show = show or (lambda _line: None)
        self._open = ""

    def feed(self, block: bytes) -> None:
        self._take(self._decoder.decode(block))

    def close(self) -> None:
        self._take(self._decoder.decode(b"", final=True))
        if self._open:
            self._finish(self._open, kept=True)
            self._open = ""

    def _take(self, text: str) -> None:
        if not text:
            return
        *complete, rest = (self._open + text).split("\n")
        for line in complete:
            self._finish(line, kept=True)
        # a '\r' at the very end may be half of '\r\n': it stays with the unfinished line
        while (cut := rest.find("\r", 0, len(rest) - 1)) >= 0:
            self._finish(rest[:cut], kept=False)
            rest = rest[cut + 1 :]
        while len(rest) > _LONGEST:
            self._finish(rest[:_LONGEST], kept=True)
            rest = rest[_LONGEST:]
        self._open = rest
        if rest:
            self._show(rest.rstrip("\r"))

    def _finish(self, line: str, *, kept: bool) -> None:
        *rewritten, last = line.rstrip("\r").split("\r")
        for piece in rewritten:
            self._show(piece)
        if kept:
            self._keep(last)
        self._show(last)


def printable(text: str) -> str:
    """Without control characters and escapes: a model file can put anything into what a tool says, and so into our messages."""
    return _CONTROL.sub("", text)
