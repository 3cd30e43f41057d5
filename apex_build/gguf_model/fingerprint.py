"""The identity of a model, quickly: hashing 70 GB whole takes minutes, and is asked for at every run."""

from __future__ import annotations

import hashlib

from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.header import read_header
from apex_build.gguf_model.open_file import open_file

_SAMPLE = 4096  # bytes at the start and the end of each tensor


def fingerprint(model: Model) -> str:
    """sha256 over each file's size and header, and over the first and last 4 KiB of each tensor.

    It tells two conversions of two checkpoints apart, not a byte changed in the middle of a tensor: it guards against mixing
    things up, not against malice.
    """
    digest = hashlib.sha256()
    for path in model.files:
        header = read_header(path)
        with open_file(path) as file:
            digest.update(f"{header.file_size}\n".encode())
            digest.update(file.read(header.data_offset))
            for tensor in header.tensors:
                start = header.data_offset + tensor.offset
                for at in (start, start + max(0, tensor.n_bytes - _SAMPLE)):
                    file.seek(at)
                    digest.update(file.read(min(_SAMPLE, tensor.n_bytes)))
    return digest.hexdigest()
