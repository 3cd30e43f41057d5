"""A tool's bytes as lines of text: complete ones, and the unfinished one while it grows."""

from __future__ import annotations

import codecs
from collections.abc import Callable

_LONGEST = 1 << 20  # characters of one line; a longer one is cut into pieces


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
