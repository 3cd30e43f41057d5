"""Make foreign text safe to print: remove what a terminal would obey instead of showing."""

from __future__ import annotations

import re

# What a terminal obeys instead of showing: control characters, and characters that change text direction or hide text.
HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e0fff]"
)
_CONTROL = re.compile(rf"\x1b\[[0-9;?]*[ -/]*[@-~]|{HARMFUL.pattern}")


def printable(text: str) -> str:
    """The text without control characters and escapes: a model file can put anything into a tool's output, and so
    into ours.
    """
    return _CONTROL.sub("", text)
