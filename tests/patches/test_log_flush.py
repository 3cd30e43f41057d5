"""A tool prints its last lines, however slowly its output is read."""

from __future__ import annotations

import subprocess
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf_edit import changed
from waiting import until

from apex_build.native.toolset import Toolset


def read_late(tool: Path, *arguments: object) -> tuple[int, str]:
    """Exit code and output of a tool whose output is not read until it has exited or waits for the reader.

    The pipe holds one page: the log thread is stopped in the middle of its lines while the program runs to its end.
    """
    command = [str(part) for part in (tool, *arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pipesize=4096)
    assert process.stdout is not None
    try:
        until(lambda: process.poll() is not None or _rests(process.pid), seconds=300)
        said = process.stdout.read().decode(errors="replace")
        return process.wait(60), said
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _rests(pid: int) -> bool:
    """Whether each of its threads sleeps, and goes on sleeping: one that waits for a core does not."""
    before = _threads(pid)
    time.sleep(0.3)
    return before == _threads(pid) and all(state in "SZ" for state, _, _ in before)


def _threads(pid: int) -> list[tuple[str, str, str]]:
    """State and processor time of each thread."""
    found = []
    for path in sorted(Path(f"/proc/{pid}/task").glob("*/stat")):
        with suppress(OSError):  # ended since
            fields = path.read_text().rpartition(")")[2].split()
            found.append((fields[0], fields[11], fields[12]))
    return found


def test_the_tensor_whose_values_are_not_finite(tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path) -> None:
    """This calls exit() in the middle of the program."""

    def spoil(name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if name == "blk.2.post_attention_norm.weight":
            values[7] = np.nan
        return values

    model = changed(testbed, tmp_path / "spoilt.gguf", spoil)
    tool, out = tools.tool("llama-imatrix"), tmp_path / "out.gguf"
    code, said = read_late(tool, "-m", model, "-f", heldout / "code.txt", "-o", out, "--chunks", 1, "-lv", 5)
    assert code == 1 and "detected in blk.2.ffn_" in said


def test_the_estimate_of_perplexity(tools: Toolset, testbed: Path, heldout: Path) -> None:
    code, said = read_late(
        tools.tool("llama-perplexity"), "-m", testbed, "-f", heldout / "code.txt", "--chunks", 2, "-c", 256
    )
    assert code == 0 and "Final estimate: PPL = " in said


@pytest.mark.parametrize("context", [512, 4096])
def test_the_sizes_of_the_buffers(context: int, tools: Toolset, testbed: Path) -> None:
    code, said = read_late(tools.tool("llama-fit-params"), "-m", testbed, "-c", context, "--fit-print", "on", "-lv", 5)
    assert code == 0 and "compute buffer size" in said
