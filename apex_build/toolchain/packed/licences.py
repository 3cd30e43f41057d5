"""The licence texts for the built tools: llama.cpp's own, and those of the code that it includes."""

from __future__ import annotations

import re
from pathlib import Path

_WHOLE = ("LICENSE", "AUTHORS", "licenses/*", "vendor/*/LICENSE*")
_CODE = frozenset({".c", ".cpp", ".cu", ".cuh", ".h", ".hpp"})
_COMPILED = ("common", "ggml/src/ggml-cpu", "ggml/src/ggml-cuda", "src", "tools", "vendor")
_COMMENT = re.compile(rb"/\*.*?\*/|(?:^[ \t]*//[^\n]*\n)+", re.DOTALL | re.MULTILINE)
_NOTICE = re.compile(rb"copyright[^\n]{0,20}(?:19|20)\d\d", re.IGNORECASE)


def licence_texts(source: Path) -> dict[str, bytes]:
    """Texts by their names in a packed build. Notices inside source files are collected into one text, without
    duplicates.
    """
    texts = {
        f"licenses/llama.cpp/{path.relative_to(source).as_posix()}": path.read_bytes()
        for pattern in _WHOLE
        for path in sorted(source.glob(pattern))
        if path.is_file()
    }
    notices: list[bytes] = []
    seen: set[bytes] = set()
    for folder in _COMPILED:
        for path in sorted((source / folder).rglob("*")):
            if path.suffix not in _CODE or not path.is_file():
                continue
            for comment in _COMMENT.findall(path.read_bytes()):
                lines = {line.strip(b" */") for line in comment.splitlines() if _NOTICE.search(line)}
                if not lines <= seen:
                    seen |= lines
                    notices.append(f"{'-' * 20} {path.relative_to(source).as_posix()}\n".encode() + comment.strip())
    if notices:
        texts["licenses/llama.cpp/NOTICES"] = b"\n\n".join(notices) + b"\n"
    return texts
