"""Open a file, and say what it is if it is not GGUF."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import BinaryIO

from apex_build.errors import ModelInvalid, ModelMissing

MAGIC = b"GGUF"

_CONVERT = "apex convert HF_DIR  makes a GGUF of a checkpoint's folder"
_OLD = "in one of ggml's formats before GGUF"
# a file's first bytes -> what it looks like, and what to do
_KNOWN: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "like a zip archive (PyTorch's .bin and .pt files are)", _CONVERT),
    (b"version https://git-lfs", "like a git-lfs pointer, not the file itself", "git lfs pull"),
    (b"\x1f\x8b", "compressed with gzip", "gunzip it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unzstd it first"),
    (b"\xfd7zXZ", "compressed with xz", "unxz it first"),
    (b"<", "like markup, perhaps an error page saved under the file's name", "download the file again"),
    *((magic, _OLD, "convert the original checkpoint again") for magic in (b"lmgg", b"fmgg", b"tjgg", b"algg")),
)


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises ModelMissing, with the system's reason if it exists but cannot be
    read.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ModelMissing(f"{path} is a folder, not a GGUF file")
        if not stat.S_ISREG(mode):
            raise ModelMissing(f"{path} is not a regular file")
        return path.open("rb")
    except FileNotFoundError:
        raise ModelMissing(f"no such file: {path}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ModelMissing(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def refuse_foreign(path: Path, start: bytes, size: int) -> None:
    """Raise ModelInvalid, saying what the file is, unless it starts like GGUF. `start` is the file's first bytes."""
    if size == 0:
        raise ModelInvalid(f"{path}: the file is empty")
    if start.startswith(MAGIC):
        return
    if not any(start):
        raise ModelInvalid(
            f"{path}: the header is all zeros: llama-quantize writes a zeroed header first and fills it in last, "
            "so a run that failed leaves such a file",
            hint="make the file again; apex quantize never leaves such files",
        )
    if size < len(MAGIC) or MAGIC.startswith(start):
        raise ModelInvalid(f"{path}: truncated: {size} bytes are not a GGUF header")
    what, hint = _guess(start)
    shown = f"{start[:8].hex(' ')} ({start[:8].decode('ascii', errors='replace')!r})"
    raise ModelInvalid(
        f"{path}: not a GGUF file: it begins with {shown}{f'; it looks {what}' if what else ''}", hint=hint
    )


def _guess(start: bytes) -> tuple[str, str | None]:
    for magic, what, hint in _KNOWN:
        if start.startswith(magic):
            return what, hint
    # safetensors: the length of a JSON object, 8 bytes, then the object
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32:
        return "like safetensors", _CONVERT
    return "", None
