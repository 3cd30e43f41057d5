"""Write imatrix files like llama-imatrix, and read models with the built-in roles."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np

from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.coverage import wants_data
from apex_build.gguf_model.imatrix import Imatrix, read_imatrix
from apex_build.gguf_model.model import read_model
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins

# name -> (row length, counts); the sums are 1, 2, 3...
Entries = Mapping[str, tuple[int, Sequence[float]]]


def read(path: Path) -> Model:
    return read_model(path, load_plugins().role_of)


def full_entries(model: Model, *, head: bool = True, tokens: float = 1024) -> dict[str, tuple[int, Sequence[float]]]:
    """What llama-imatrix would record for every weight: equal counts for dense ones, an even share for experts."""
    entries: dict[str, tuple[int, Sequence[float]]] = {}
    for tensor in model.tensors:
        if wants_data(tensor) and (head or not tensor.draft_head):
            experts = tensor.shape[2] if len(tensor.shape) > 2 else 1
            share = tokens * model.n_expert_used / experts if experts > 1 else tokens
            entries[tensor.name] = (tensor.shape[0], [share] * experts)
    return entries


def write_imatrix(
    path: Path,
    entries: Entries,
    *,
    head_tokens: int | None = None,
    change: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    """Write a GGUF imatrix like save_imatrix; `change` can add to the writer before it writes."""
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()  # an imatrix has no architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["chat.txt", "code.txt"])
    writer.add_uint32("imatrix.chunk_count", 4)
    writer.add_uint32("imatrix.chunk_size", 256)
    if head_tokens is not None:
        writer.add_uint32("imatrix.mtp_token_count", head_tokens)
    for name, (row, counts) in entries.items():
        sums = np.arange(1, row * len(counts) + 1, dtype=np.float32).reshape(len(counts), row)
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", np.array(counts, dtype=np.float32).reshape(len(counts), 1))
    if change:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_legacy(
    path: Path, entries: Mapping[str, tuple[int, Sequence[float]]], *, dataset: bytes | None = b"wiki.txt"
) -> Path:
    """Write a .dat imatrix like save_imatrix_legacy; (calls, values) for each name. Without `dataset`: as in 2023."""
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        data += np.array(values, dtype="<f4").tobytes()
    if dataset is not None:
        data += struct.pack("<ii", 7, len(dataset)) + dataset
    path.write_bytes(data)
    return path


def run_imatrix(tools: Toolset, model: Path, out: Path) -> Imatrix:
    """Calibrate on two chunks; the suffix of `out` selects GGUF or .dat."""
    text = out.with_name("text.txt")
    text.write_text(" ".join(f"line {index} of a text with words in it" for index in range(120)))
    options = ["-c", "128", "-b", "128", "--chunks", "2", "-t", "1"]
    command: list[str | Path] = [tools.tool("llama-imatrix"), "-m", model, "-f", text, "-o", out, *options]
    command += ["--output-format", "gguf" if out.suffix == ".gguf" else "dat"]
    subprocess.run(command, check=True, capture_output=True)
    return read_imatrix(out)
