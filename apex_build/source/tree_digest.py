"""Which files of llama.cpp a build uses, and a digest over them, which is the same for every origin of the tree."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

from apex_build.errors import ArchiveUnsafe

# The tools, the server without its web page, and the converter need only these. Documentation inside the folders stays,
# so that a patch to a tool can also patch its README.
_FILES = frozenset(
    {
        ".clang-format",
        ".editorconfig",
        ".gitignore",
        "AUTHORS",
        "CMakeLists.txt",
        "CMakePresets.json",
        "LICENSE",
        "convert_hf_to_gguf.py",
        "convert_hf_to_gguf_update.py",
        "convert_lora_to_gguf.py",
        "scripts/ui-assets.cmake",  # runs in every build of the server, even with nothing to embed
        "tools/ui/CMakeLists.txt",
        "tools/ui/embed.cpp",
        "tools/ui/sources.cmake",
        "tools/ui/ui.cpp.in",
        "tools/ui/ui.h.in",
    }
)
_FOLDERS = (
    "app/",
    "cmake/",
    "common/",
    "conversion/",
    "ggml/",
    "gguf-py/",
    "include/",
    "licenses/",
    "models/templates/",  # the converter falls back to these chat templates
    "requirements/",
    "src/",
    "tools/",
    "vendor/",
)
_LEFT_OUT = ("tools/ui/", "tools/server/bench/", "tools/server/tests/", "tools/mtmd/tests/")
_MEDIA = (".gif", ".jpeg", ".jpg", ".mp3", ".mp4", ".png", ".wav", ".webp")

_UNUSUAL = re.compile(r"[\x00-\x1f\x7f\"\\\ud800-\udfff]")


def wanted(path: str) -> bool:
    """Whether a build uses this file. `path` is relative to llama.cpp's top folder, with `/` between its parts."""
    if path in _FILES:
        return True
    if not path.startswith(_FOLDERS) or path.startswith(_LEFT_OUT) or path.endswith(_MEDIA):
        return False
    return ".git" not in path.lower().split("/")


def check_path(path: str, where: str) -> None:
    """Refuse names of wanted files that git, make or a terminal would misread."""
    if _UNUSUAL.search(path):
        raise ArchiveUnsafe(
            f"{where}: the file name {path!r} contains control characters, quotes or bytes that are not UTF-8"
        )


def is_executable(content: bytes) -> bool:
    """Whether the content starts with `#!`. Modes are not used: they differ between an sdist, a checkout and a file
    system.
    """
    return content.startswith(b"#!")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def tree_digest(hashes: Mapping[str, str]) -> str:
    """sha256 over `path NUL sha256(content) LF` of each file, sorted by the bytes of the path."""
    digest = hashlib.sha256()
    for path in sorted(hashes, key=str.encode):
        digest.update(f"{path}\0{hashes[path]}\n".encode())
    return digest.hexdigest()


def digest_of(files: Iterable[tuple[str, bytes]]) -> str:
    return tree_digest({path: sha256(content) for path, content in files})
