"""A fast identity of a model: hashing all 70 GB would take minutes, at every run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from apex_build.errors import ModelMissing
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.header import Header
from apex_build.gguf_model.open_file import open_file

_SAMPLE = 4096  # bytes at the start and the end of each tensor

Files = tuple[tuple[str, int, int, int], ...]
_known: dict[Files, str] = {}


def files_of(model: Model) -> Files:
    """Name, inode, size and time of each file: while they stay the same, earlier findings about the files are valid."""
    try:
        states = [(str(path.absolute()), path.stat()) for path in model.files]
    except OSError as error:
        raise ModelMissing(f"{error.filename}: cannot be read: {error.strerror}") from None
    return tuple((path, state.st_ino, state.st_size, state.st_mtime_ns) for path, state in states)


def fingerprint(model: Model) -> str:
    """sha256 over each file's size and header, and over the first and last 4 KiB of each tensor.

    It distinguishes conversions of different checkpoints, but misses a byte changed in the middle of a tensor: it
    guards against mix-ups, not against malice.
    """
    files = files_of(model)
    if files not in _known:
        _known[files] = _digest(model.headers)
    return _known[files]


def _digest(headers: Sequence[Header]) -> str:
    digest = hashlib.sha256()
    for header in headers:
        with open_file(header.path) as file:
            digest.update(f"{header.file_size}\n".encode())
            digest.update(file.read(header.data_offset))
            for tensor in header.tensors:
                start = header.data_offset + tensor.offset
                for at in (start, start + max(0, tensor.n_bytes - _SAMPLE)):
                    file.seek(at)
                    digest.update(file.read(min(_SAMPLE, tensor.n_bytes)))
    return digest.hexdigest()
