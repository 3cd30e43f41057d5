"""Check that the written file is as planned: types, sizes, metadata, every block of every tensor; against.py
compares with the source.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

from apex_build.errors import ModelInvalid, VerificationFailed
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.header import Header, read_header
from apex_build.gguf_model.imatrix import Imatrix
from apex_build.native.tensor_data import validator
from apex_build.native.toolset import Toolset
from apex_build.policy.plan import Plan
from apex_build.progress import Report, Step, silent
from apex_build.quantization.against import check_against

_BLOCK = 64 << 20  # bytes at once, cut to whole rows


def verify(
    path: Path,
    plan: Plan,
    keys: Mapping[str, str | int | float],
    n_bytes: int,
    tools: Toolset,
    *,
    source: Model,
    imatrix: Imatrix | None = None,
    report: Report = silent,
) -> None:
    """Raises VerificationFailed, naming the first tensor or key that is not as planned.

    `n_bytes`: the file's predicted size; `source`: the model it was made from; `imatrix`: the imatrix it was made with.
    """
    try:
        header = read_header(path)
    except ModelInvalid as error:
        raise VerificationFailed(f"the file that llama-quantize wrote cannot be read: {error.message}") from None
    if header.file_size != n_bytes:
        raise VerificationFailed(f"{path}: {header.file_size} bytes, expected {n_bytes}")
    for key, value in keys.items():
        if header.metadata.get(key) != value:
            raise VerificationFailed(f"{path}: metadata {key} is {header.metadata.get(key)!r}, expected {value!r}")
    written = {tensor.name: tensor for tensor in header.tensors}
    planned = {entry.name: entry for entry in plan.entries}
    if odd := sorted(written.keys() ^ planned.keys()):
        raise VerificationFailed(f"{path}: {odd[0]} is {'not planned' if odd[0] in written else 'missing'}")
    for name, entry in planned.items():
        found = written[name]
        if (found.type, found.n_bytes) != (entry.type, entry.n_bytes):
            raise VerificationFailed(
                f"{path}: {name} is {found.type} of {found.n_bytes} bytes, expected {entry.type} of {entry.n_bytes}"
            )
    _check_data(header, plan, tools, report)
    check_against(header, plan, source, imatrix, tools, report)


def _check_data(header: Header, plan: Plan, tools: Toolset, report: Report) -> None:
    is_valid = validator(tools)
    done, total = 0, plan.n_bytes
    rows = {entry.name: entry.n_elements // entry.shape[0] for entry in plan.entries}
    with (
        header.path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
    ):
        for tensor in header.tensors:
            start = header.data_offset + tensor.offset
            row = tensor.n_bytes // rows[tensor.name]
            step = max(row, _BLOCK // row * row)
            for at in range(start, start + tensor.n_bytes, step):
                with view[at : min(at + step, start + tensor.n_bytes)] as block:
                    if not is_valid(tensor.type, block):
                        raise VerificationFailed(
                            f"{header.path}: {tensor.name} ({tensor.type}) has values that are not numbers"
                        )
            done += tensor.n_bytes
            report(Step("verifying", done / 1e6, total / 1e6, "MB"))
