"""`apex calibrate --shards`: the same sums as a single run, whatever happens to a shard."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apex_runs import run_apex
from children import alive
from gates import Gate, gated, held_at_snapshot, is_whole, started
from waiting import until

from apex_build.calibration.run import Settings
from apex_build.calibration.shards import Shard, Task, make_shard, rounding, split
from apex_build.errors import CalibrationSetInvalid
from apex_build.gguf_model.imatrix import Imatrix, read_imatrix
from apex_build.gguf_model.model import read_model
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins

CHUNKS = 24


def in_shards(testbed: Path, out: Path, *more: object) -> list[object]:
    return ["calibrate", testbed, "-o", out, "--chunks", CHUNKS, "--shards", 4, "--no-rows-check", *more]


@pytest.fixture
def gate(tools: Toolset, tmp_path: Path) -> Iterator[Gate]:
    """The tool waits before each shard."""
    with gated(tools, tmp_path / "gate", "llama-imatrix", having="--chunks") as made:
        yield made


def same_sums(one: Imatrix, parts: Imatrix, chunks: int = CHUNKS) -> None:
    """Equal where sums are exact, and within the documented bound elsewhere."""
    assert set(one.entries) == set(parts.entries)
    for name, entry in one.entries.items():
        other = parts.entries[name]
        assert other.counts == entry.counts
        np.testing.assert_allclose(other.values(), entry.values(), rtol=rounding(chunks, 512), atol=0)
    assert (parts.chunk_count, parts.chunk_size) == (one.chunk_count, one.chunk_size)
    assert (parts.head_tokens, parts.head_rows, parts.datasets) == (one.head_tokens, one.head_rows, one.datasets)


@pytest.fixture(scope="module")
def four(tools: Toolset, testbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("four") / "four.gguf"
    run_apex("calibrate", testbed, "-o", out, "--chunks", CHUNKS, "--shards", 4)
    return out


def test_whole_chunks_as_even_as_can_be() -> None:
    assert split(24, 4) == (Shard(0, 6), Shard(6, 6), Shard(12, 6), Shard(18, 6))
    assert [shard.chunks for shard in split(25, 4)] == [6, 6, 6, 7]
    assert split(2, 1) == (Shard(0, 2),)
    with pytest.raises(
        CalibrationSetInvalid, match=r"too short for 4 shards: expected at least 12 chunks .*, found 11"
    ):
        split(11, 4)


def test_the_sums_of_one_run(four: Path, calibrated: Path, testbed: Path) -> None:
    same_sums(read_imatrix(calibrated), read_imatrix(four))
    assert not list(four.parent.glob(".*")), "nothing is left of the work"
    log = four.with_name("four.gguf.log").read_text()
    assert log.count("--chunks 6") == 4 and "--chunk 18" in log
    one = run_apex("calibrate", testbed, "-o", calibrated, "--chunks", CHUNKS, "--shards", 4, code=71)
    assert "made from something else" in one.stderr


def test_where_the_rounding_comes_from(tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path) -> None:
    """A run adds the sums of each chunk in single precision; shards are added in double precision and rounded."""
    folder = tmp_path / "text"
    folder.mkdir()
    text = folder / "chat.txt"
    text.write_bytes((heldout / "chat.txt").read_bytes())
    for count in (1, 2):
        run_apex(
            "calibrate", testbed, "-o", tmp_path / f"{count}.gguf", "--text", text, "--chunks", 6, "--shards", count
        )
    model = read_model(testbed, load_plugins().role_of)
    chunks = []
    for number in range(6):
        task = Task(text, "", Shard(number, 1), tmp_path / f"chunk-{number}.gguf")
        make_shard(model, task, tools, Settings(head=True))
        chunks.append(read_imatrix(task.out))
    one, two = read_imatrix(tmp_path / "1.gguf"), read_imatrix(tmp_path / "2.gguf")

    def in_turn(name: str, some: list[Imatrix]) -> np.ndarray[Any, np.dtype[np.float32]]:
        total = np.zeros_like(some[0].entries[name].values())
        for chunk in some:
            total = total + chunk.entries[name].values()
        return total

    for name, entry in one.entries.items():
        assert np.array_equal(in_turn(name, chunks), entry.values())
        halves = [in_turn(name, chunks[:3]).astype(np.float64), in_turn(name, chunks[3:]).astype(np.float64)]
        assert np.array_equal((halves[0] + halves[1]).astype(np.float32), two.entries[name].values())
    same_sums(one, two, chunks=6)


def test_a_killed_tool_is_run_again(four: Path, gate: Gate, testbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    child = started(gate, in_shards(testbed, out))
    gate.let(2)
    (tool,) = gate.next(child, after=2)
    os.kill(tool, signal.SIGKILL)
    gate.open()
    _, said = child.communicate(timeout=300)
    assert child.returncode == 0, said
    assert "running shard 3 of 4 again: llama-imatrix was ended by SIGKILL" in said
    assert out.read_bytes() == four.read_bytes()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_what_is_done_is_kept(
    how: signal.Signals, four: Path, gate: Gate, tools: Toolset, testbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    child = started(gate, in_shards(testbed, out))
    shards = tmp_path / ".out.gguf.work" / "shards"
    gate.let(1)
    until(lambda: (shards / "0001.gguf").exists() and gate.waiting(), child)
    child.send_signal(how)
    _, said = child.communicate(timeout=60)
    assert child.returncode in (130, 143, -how), said
    assert "Traceback" not in said and not out.exists()
    until(lambda: not gate.waiting())  # the tool ended with us
    assert [path.name for path in shards.glob("*.gguf")] == ["0001.gguf"]
    with gated(tools, tmp_path / "later", "llama-imatrix", having="--chunks") as later:
        later.open()
        resumed = started(later, in_shards(testbed, out))
        _, said = resumed.communicate(timeout=300)
        assert resumed.returncode == 0, said
        assert len(later.passed()) == 3, "none was made twice"
    assert out.read_bytes() == four.read_bytes()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_shard_resumes_from_its_snapshot(
    how: signal.Signals, gate: Gate, tools: Toolset, testbed: Path, tmp_path: Path
) -> None:
    """The same sums, to the byte, as without the interruption."""
    out, whole = tmp_path / "out.gguf", tmp_path / "whole.gguf"
    command = ["calibrate", testbed, "--context", 64, "--chunks", 46, "--shards", 2, "--no-rows-check", "-o"]
    child = started(gate, [*command, out])
    (tool,) = gate.next(child, after=0)
    shards = tmp_path / ".out.gguf.work" / "shards"
    with held_at_snapshot(shards / ".0001.gguf.work") as snapshot:
        gate.let(1)
        until(lambda: is_whole(snapshot), child)
        child.send_signal(how)
        _, said = child.communicate(timeout=60)
        until(lambda: not alive(tool))
    assert child.returncode in (130, -how) and "Traceback" not in said and not out.exists(), said
    gate.open()
    again = started(gate, [*command, out])
    _, said = again.communicate(timeout=300)
    assert again.returncode == 0 and "46/46 chunks" in said, said
    first, resumed, second = gate.passed()
    assert first.endswith("--chunks 23") and resumed.endswith(f"--in-file {snapshot} --chunk 10 --chunks 13")
    assert second.endswith("--chunk 23 --chunks 23")
    assert [path.name for path in tmp_path.glob(".*")] == [], "nothing is left of the work"
    run_apex(*command, whole)
    assert out.read_bytes() == whole.read_bytes()


def test_each_set_of_gpus_has_a_shard(four: Path, gate: Gate, testbed: Path, tmp_path: Path) -> None:
    """Each tool sees only the GPUs that it was given; two run at a time."""
    out = tmp_path / "out.gguf"
    child = started(gate, in_shards(testbed, out, "--devices", "0", "--devices", "1,2"))
    for done in range(3):
        pids = gate.next(child, after=done, waiting=2)
        environments = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in pids]
        seen = [[one for one in some if one.startswith(b"CUDA_VISIBLE_DEVICES=")] for some in environments]
        assert sorted(seen) == [[b"CUDA_VISIBLE_DEVICES=0"], [b"CUDA_VISIBLE_DEVICES=1,2"]]
        gate.let(1)
    gate.let(1)
    _, said = child.communicate(timeout=300)
    assert child.returncode == 0, said
    assert out.read_bytes() == four.read_bytes()


def test_bad_input(tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path) -> None:
    common = ["calibrate", testbed, "-o", tmp_path / "x.gguf", "--text", heldout / "chat.txt", "--no-rows-check"]
    ran = run_apex(*common, "--chunks", 8, "--shards", 3, code=50)
    assert "expected at least 9 chunks (3 each), found 8" in ran.stderr and "--shards 2" in ran.stderr
    assert "--shards" in run_apex(*common, "--devices", "0", code=2).stderr
    assert not (tmp_path / "x.gguf").exists()


def test_the_dry_run_says_how_long_it_takes(tools: Toolset, testbed: Path, tmp_path: Path) -> None:
    """A few chunks are timed and extrapolated: on this machine, and on several."""
    out = tmp_path / "out.gguf"
    common = ["calibrate", testbed, "-o", out, "--chunks", 100, "--dry-run"]
    told = json.loads(run_apex(*common, "--no-rows-check", "--json").stdout)["forecast"]
    assert told["chunks"] == 100 and told["measured_chunks"] >= 6 and told["seconds_a_chunk"] > 0
    seconds = told["seconds_by_workers"]
    assert list(seconds) == ["1", "2", "4", "8", "16", "32"]
    assert seconds["1"] == pytest.approx(told["seconds_to_start"] + 100 * told["seconds_a_chunk"])
    assert seconds["32"] == pytest.approx(told["seconds_to_start"] + 4 * told["seconds_a_chunk"])
    ran = run_apex(*common)
    assert "here (100 chunks, and 24 of the check of the hidden rows)" in ran.stdout
    assert "on N machines like this one (--shards N --cluster ADDRESS): " in ran.stdout and " on 32" in ran.stdout
    assert list(tmp_path.iterdir()) == []
