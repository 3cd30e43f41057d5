"""Ctrl-C in `apex imatrix merge`, `apex imatrix diff` and `apex calibrate --until-experts`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from apex_runs import run_apex
from children import tool_of

from apex_build.native.toolset import Toolset


def started(*command: object) -> subprocess.Popen[str]:
    """In a session of its own, as in a terminal of its own."""
    whole = [sys.executable, "-m", "apex_build", *map(str, command)]
    return subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def interrupted(child: subprocess.Popen[str], when: Callable[[], object]) -> tuple[str, str]:
    """Ctrl-C to the whole session as soon as `when` says so."""
    deadline = time.monotonic() + 120
    while not when() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGINT)
    said = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in said[1], (child.returncode, said)
    return said


def opened(child: subprocess.Popen[str], path: Path) -> bool:
    for link in Path(f"/proc/{child.pid}/fd").glob("*"):
        try:
            if link.readlink() == path:
                return True
        except OSError:
            continue
    return False


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two imatrices of 100 MB, of a model of many experts: seconds of work."""
    folder = tmp_path_factory.mktemp("large")
    dice = np.random.default_rng(1)
    made = []
    for name in ("one", "two"):
        made.append(folder / f"{name}.imatrix.gguf")
        writer = gguf.GGUFWriter(made[-1], "")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [name])
        writer.add_uint32("imatrix.chunk_count", 8)
        writer.add_uint32("imatrix.chunk_size", 512)
        for layer in range(50):
            for part in ("gate", "up"):
                weight = f"blk.{layer}.ffn_{part}_exps.weight"
                writer.add_tensor(f"{weight}.in_sum2", dice.random((256, 1024), dtype=np.float32))
                writer.add_tensor(f"{weight}.counts", np.full((256, 1), 64, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return made


def test_merge(large: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    child = started("imatrix", "merge", *large, "-o", out)
    interrupted(child, lambda: list(tmp_path.glob(".out.gguf.*.part")))
    assert not list(tmp_path.iterdir()), "neither a part nor a manifest"
    out.write_bytes(b"an earlier one")
    child = started("imatrix", "merge", *large, "-o", out, "--force")
    interrupted(child, lambda: list(tmp_path.glob(".out.gguf.*.part")))
    assert out.read_bytes() == b"an earlier one" and [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_diff(large: list[Path]) -> None:
    child = started("imatrix", "diff", *large, "--json")
    said = interrupted(child, lambda: opened(child, large[1]))
    assert said[0] == "" and "interrupted" in said[1]


def test_until_experts(tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path) -> None:
    """In the second round: the first is kept, and the same command resumes after it."""
    out, whole = tmp_path / "out.gguf", tmp_path / "whole.gguf"
    command = ["calibrate", testbed, "--until-experts", 300, "--text", heldout / "chat.txt", "--no-rows-check"]
    shards = tmp_path / ".out.gguf.work" / "shards"
    child = started(*command, "-o", out)
    said = interrupted(child, lambda: (shards / "0001-1" / "1.gguf").exists() and tool_of(child.pid))
    assert not tool_of(child.pid) and not out.exists() and "resumes" in said[1]
    kept = {path: path.stat().st_mtime_ns for path in shards.glob("*/1.gguf")}
    assert kept and [path.name for path in tmp_path.iterdir()] == [".out.gguf.work"]
    assert not list(shards.rglob("*.part")), "nothing is half-written"
    again = started(*command, "-o", out, "--json")
    later: dict[Path, int] = {}
    while again.poll() is None and not later:
        later = {path: path.stat().st_mtime_ns for path in shards.glob("0002-1/1.gguf")} and {
            path: path.stat().st_mtime_ns for path in kept if path.exists()
        }
        time.sleep(0.005)
    done, problems = again.communicate(timeout=300)
    assert again.returncode == 0, problems
    assert later == kept, "the first round was not run again"
    straight = json.loads(run_apex(*command, "-o", whole, "--json").stdout)
    assert json.loads(done)["goal"] == straight["goal"] and straight["goal"]["rounds"] > 1
    assert out.read_bytes() == whole.read_bytes()
