"""A calibration that has come to one of its snapshots, and stays there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gates import gated, started
from waiting import until

from apex_build.errors import ApexError
from apex_build.gguf_model.imatrix import read_imatrix
from apex_build.native.toolset import Toolset
from apex_build.storage.outputs import work_folder


@contextmanager
def stopped_at(chunks: int, tools: Toolset, out: Path, *command: object) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run `apex COMMAND`, whose tool waits where it would write its snapshot at so many chunks: that file is a pipe
    without a reader. The one before it, 10 chunks earlier, is whole. Yields the run and its tool's process id.
    """
    work = work_folder(out)
    pipe, before = work / f"imatrix.gguf.at_{chunks}", work / f"imatrix.gguf.at_{chunks - 10}"
    with gated(tools, out.parent / "gate", "llama-imatrix", having="--save-frequency") as gate:
        child = started(gate, command)
        (tool,) = until(gate.waiting, child)
        os.mkfifo(pipe)
        gate.let(1)
        until(lambda: _whole(before), child)
        try:
            yield child, tool
        finally:
            child.kill()
            child.wait()
            pipe.unlink(missing_ok=True)


def _whole(path: Path) -> bool:
    """Whether the tool has written all of it."""
    try:
        return path.exists() and bool(read_imatrix(path).entries)
    except ApexError:
        return False
