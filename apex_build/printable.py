"""Text from outside, made safe to print: without what a terminal obeys instead of showing it."""

from __future__ import annotations

import re

# What a terminal obeys instead of showing it: control characters, and those that turn the direction of text or hide it.
HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e0fff]"
)
_CONTROL = re.compile(rf"\x1b\[[0-9;?]*[ -/]*[@-~]|{HARMFUL.pattern}")


def printable(text: str) -> str:
    """Without control characters and escapes: a model file can put anything into what a tool says, and so into our
    messages.
    """
    return _CONTROL.sub("", text)
