"""Ctrl-C in `apex imatrix merge`, `apex imatrix diff` and `apex calibrate --until-experts`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import gguf
import numpy as np
import pytest
from apex_runs import ended_at, run_apex
from gates import gated, started
from waiting import until

from apex_build.native.toolset import Toolset


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two imatrices of one model."""
    folder = tmp_path_factory.mktemp("two")
    dice = np.random.default_rng(1)
    made = []
    for name in ("one", "two"):
        made.append(folder / f"{name}.imatrix.gguf")
        writer = gguf.GGUFWriter(made[-1], "")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [name])
        writer.add_uint32("imatrix.chunk_count", 8)
        writer.add_uint32("imatrix.chunk_size", 512)
        for layer in range(2):
            for part in ("gate", "up"):
                weight = f"blk.{layer}.ffn_{part}_exps.weight"
                writer.add_tensor(f"{weight}.in_sum2", dice.random((8, 64), dtype=np.float32))
                writer.add_tensor(f"{weight}.counts", np.full((8, 1), 64, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return made


@pytest.mark.parametrize("before", [None, b"an earlier one"])
def test_merge(before: bytes | None, two: list[Path], tmp_path: Path) -> None:
    """Where a part of the file is written."""
    out = tmp_path / "out.gguf"
    if before is not None:
        out.write_bytes(before)
    writing = ("gguf", "GGUFWriter.write_tensors_to_file")
    ended_at(writing, 1, signal.SIGINT, "imatrix", "merge", *two, "-o", out, "--force")
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left == ({} if before is None else {"out.gguf": before}), "neither a part nor a manifest"


def test_diff(two: list[Path]) -> None:
    comparing = ("apex_build.calibration.diff", "_role")
    said = ended_at(comparing, 1, signal.SIGINT, "imatrix", "diff", *two, "--json")
    assert said[0] == "" and "interrupted" in said[1]


def test_until_experts(tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path) -> None:
    """In the second round: the first is kept, and the same command resumes after it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    out, whole = folder / "out.gguf", tmp_path / "whole.gguf"
    command = ["calibrate", testbed, "--until-experts", 300, "--text", heldout / "chat.txt", "--no-rows-check"]
    shards = folder / ".out.gguf.work" / "shards"
    with gated(tools, tmp_path / "gate", "llama-imatrix", having="--chunks") as gate:
        child = started(gate, [*command, "-o", out])
        gate.let(1)
        until(lambda: (shards / "0001-1" / "1.gguf").exists() and gate.waiting(), child)
        os.killpg(child.pid, signal.SIGINT)
        _, said = child.communicate(timeout=60)
        assert child.returncode == 130 and "Traceback" not in said, said
        assert not gate.waiting() and not out.exists() and "resumes" in said
    assert [path.name for path in folder.iterdir()] == [".out.gguf.work"]
    assert list(shards.glob("*/1.gguf")) and not list(shards.rglob("*.part")), "nothing is half-written"
    with gated(tools, tmp_path / "later", "llama-imatrix", having="--chunks") as gate:
        gate.open()
        environment = {**os.environ, "APEX_TOOLS": str(gate.root)}
        done = json.loads(run_apex(*command, "-o", out, "--json", env=environment).stdout)
        rounds = len(gate.passed())
    straight = json.loads(run_apex(*command, "-o", whole, "--json").stdout)
    assert done["goal"] == straight["goal"] and straight["goal"]["rounds"] > 1
    assert rounds == straight["goal"]["rounds"] - 1, "the first round was not run again"
    assert out.read_bytes() == whole.read_bytes()
