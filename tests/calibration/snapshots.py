"""A calibration that has come to one of its snapshots, and stays there."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gates import gated, held_at_snapshot, is_whole, started
from waiting import until

from apex_build.native.toolset import Toolset
from apex_build.storage.outputs import work_folder


@contextmanager
def stopped_at(chunks: int, tools: Toolset, out: Path, *command: object) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run `apex COMMAND`, whose tool waits where it would write its snapshot at so many chunks. The one before it, 10
    chunks earlier, is whole. Yields the run and its tool's process id.
    """
    with gated(tools, out.parent / "gate", "llama-imatrix", having="--save-frequency") as gate:
        child = started(gate, command)
        (tool,) = until(gate.waiting, child)
        with held_at_snapshot(work_folder(out), chunks) as before:
            gate.let(1)
            until(lambda: is_whole(before), child)
            try:
                yield child, tool
            finally:
                child.kill()
                child.wait()
