"""`apex sweep --cluster` and `apex evaluate --cluster` where workers, schedulers and clients end on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from apex_runs import run_apex
from children import tool_of
from dask_processes import scheduler, wanted_by, worker
from gates import Gate, gated
from waiting import until

from apex_build import api
from apex_build.errors import EvaluationRefused
from apex_build.native.toolset import Toolset

pytestmark = pytest.mark.usefixtures("tools")
TIMES = ("seconds", "measured")


@pytest.fixture
def trunk(testbed: Path, heldout: Path) -> list[object]:
    """A sweep of three points, each of about a second."""
    sweep = ["sweep", testbed, "--policy", "uniform", "--over", "type=Q8_0,Q6_K,Q4_K", "--without-head"]
    return [*sweep, "--reference", testbed, *kld(heldout)]


def kld(heldout: Path) -> list[object]:
    return ["--only", "kld", "--set", "kld.chunks=1", "--threads", 1, "--text", heldout / "chat.txt"]


@pytest.fixture
def gate(tools: Toolset, tmp_path: Path) -> Iterator[Gate]:
    """For workers: each point waits for its measurement, and `--only kld` for that of the file."""
    with gated(tools, tmp_path / "gate", "llama-perplexity", having="--kl-divergence") as made:
        yield made


def client(*command: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "apex_build", *map(str, command)], env={**os.environ, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    """Whole ones: another process may be writing."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def points(folder: Path) -> list[str]:
    """The measured ones, in the order of the file."""
    return [row["values"]["type"] for row in lines(folder / "sweep.jsonl") if row["measured"]]


def check_same(there: Path, here: Path) -> None:
    """All that a sweep writes but for the times. Results are in the order in which they came."""
    assert timeless(lines(there / "sweep.jsonl")) == timeless(lines(here / "sweep.jsonl"))
    results = [timeless(lines(folder / "results.jsonl")) for folder in (there, here)]
    assert sorted(map(str, results[0])) == sorted(map(str, results[1]))
    one, two = (json.loads((folder / "sweep.json").read_text()) for folder in (there, here))
    assert [one[key] for key in ("kind", "identity", "from", "points")] == [
        two[key] for key in ("kind", "identity", "from", "points")
    ]
    assert (there / "table.md").read_text() == (here / "table.md").read_text()
    assert {path.name for path in there.iterdir()} == {path.name for path in here.iterdir()}


@pytest.fixture(scope="module")
def expected(tools: Toolset, testbed: Path, heldout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sweep `trunk` as one machine makes it."""
    out = tmp_path_factory.mktemp("expected") / "out"
    sweep = ["sweep", testbed, "--policy", "uniform", "--over", "type=Q8_0,Q6_K,Q4_K", "--without-head"]
    run_apex(*sweep, "--reference", testbed, *kld(heldout), "-o", out)
    return out


def test_a_sweep_is_that_of_one_machine(
    tools: Toolset, testbed: Path, calibrated: Path, heldout: Path, tmp_path: Path
) -> None:
    """Two curves, one shared trunk, a baseline, an imatrix that is sent; the worker has its own cache."""
    cache, here, there = tmp_path / "cache", tmp_path / "here", tmp_path / "there"
    imatrix = tmp_path / "away" / "testbed.imatrix.gguf"
    imatrix.parent.mkdir()
    imatrix.write_bytes(calibrated.read_bytes())
    sweep = ["sweep", testbed, "--over", "draft_head=Q4_K", *kld(heldout)]
    run_apex(*sweep, "--imatrix", imatrix, "-o", here)
    # /proc/self/cwd is another folder for the worker
    sweep += ["--imatrix", "/proc/self/cwd/testbed.imatrix.gguf", "-o", there, "--cluster"]
    with (
        scheduler(tmp_path) as (_, address),
        worker(address, tmp_path, APEX_CACHE_DIR=str(cache), APEX_TOOLS=str(tools.root)),
    ):
        dry = run_apex(*sweep, "tcp://127.0.0.1:9", "--dry-run", cwd=imatrix.parent)
        assert "room on each machine's disk" in dry.stdout and not there.exists()
        done = run_apex(*sweep, address, "--json", cwd=imatrix.parent)
        assert "3 of 3 points to do on 1 worker: about " in done.stderr and "[3/3] " in done.stderr
        assert "sending testbed.imatrix.gguf to" in done.stderr
        assert timeless(json.loads(done.stdout)["points"]) == timeless(lines(here / "sweep.jsonl"))
        check_same(there, here)
        assert not list((cache / "cluster" / "sweeps").glob("*")), "the workers keep nothing"
    again = run_apex(*sweep, "tcp://127.0.0.1:9", cwd=imatrix.parent)
    assert again.stderr.count("(measured before)") == 3, "with nothing to do no cluster is needed"


def test_a_killed_worker_loses_its_point_alone(trunk: list[object], expected: Path, gate: Gate, tmp_path: Path) -> None:
    out, tools = tmp_path / "out", str(gate.root)
    with (
        scheduler(tmp_path) as (_, address),
        worker(address, tmp_path, "--name", "one", APEX_TOOLS=tools) as one,
        worker(address, tmp_path, "--name", "two", APEX_TOOLS=tools),
        client(*trunk, "-o", out, "--cluster", address) as running,
    ):
        gate.let(1)
        until(lambda: len(points(out)) == 1 and len(gate.waiting()) == 2, running)
        before = lines(out / "sweep.jsonl")
        one.kill()
        until(lambda: len(gate.waiting()) == 1)
        gate.open()
        said = running.communicate(timeout=300)[1]
        assert running.returncode == 0, said
    assert len(gate.passed()) == 3, "what was measured is not measured again"
    assert all(row in lines(out / "sweep.jsonl") for row in before if row["measured"])
    check_same(out, expected)


def test_a_lost_scheduler_costs_no_measured_point(
    trunk: list[object], expected: Path, gate: Gate, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [*trunk, "-o", out, "--cluster"]
    with (
        scheduler(tmp_path) as (boss, address),
        worker(address, tmp_path, APEX_TOOLS=str(gate.root)),
        client(*command, address) as running,
    ):
        gate.let(1)
        until(lambda: points(out), running)
        boss.kill()
        said = running.communicate(timeout=120)[1]
    assert running.returncode == 83 and "the scheduler is gone" in said and "the same command" in said, said
    assert "Traceback" not in said
    assert len(points(out)) == 1
    with scheduler(tmp_path) as (_, address), worker(address, tmp_path):
        again = run_apex(*command, address)
    assert again.stderr.count("(measured before)") == 1
    check_same(out, expected)


def test_two_clients_at_once(trunk: list[object], expected: Path, gate: Gate, tmp_path: Path) -> None:
    """They want the same points. The same folder is refused to the second."""
    outs = [tmp_path / "one", tmp_path / "two"]
    with scheduler(tmp_path) as (_, address), worker(address, tmp_path, APEX_TOOLS=str(gate.root)):
        running = [client(*trunk, "-o", out, "--cluster", address) for out in outs]
        until(lambda: wanted_by(address) == 2, running[0])
        third = run_apex(*trunk, "-o", outs[0], "--cluster", address, code=71)
        assert "is being written by another run" in third.stderr
        gate.open()
        said = [one.communicate(timeout=300)[1] for one in running]
    assert [one.returncode for one in running] == [0, 0], said
    check_same(outs[0], expected)
    check_same(outs[1], expected)
    times = [{row["identity"]: row["seconds"] for row in lines(out / "sweep.jsonl")} for out in outs]
    assert set(times[0].items()) & set(times[1].items()), "what both wait for is measured once"


@pytest.mark.parametrize("local", [True, False])
def test_ctrl_c_in_a_sweep(local: bool, trunk: list[object], expected: Path, gate: Gate, tmp_path: Path) -> None:
    """To all processes of the terminal. Tools end at once, also those of workers that stay."""
    out, tools = tmp_path / "out", str(gate.root)
    with scheduler(tmp_path) as (_, address), worker(address, tmp_path, APEX_TOOLS=tools) as one:
        running = client(*trunk, "-o", out, "--cluster", "local:1" if local else address, APEX_TOOLS=tools)
        gate.let(1)
        until(lambda: len(points(out)) == 1 and gate.waiting(), running)
        os.killpg(running.pid, signal.SIGINT)
        said = running.communicate(timeout=60)[1]
        assert running.returncode == 130 and "Traceback" not in said, said
        assert len(points(out)) == 1 and f"kept: 1 measured points in {out / 'sweep.jsonl'}" in said
        assert not list(out.glob(".*")) and not (out / "files").exists()
        check_idle(one, gate)
        gate.open()
        again = run_apex(*trunk, "-o", out, "--cluster", address)
    assert again.stderr.count("(measured before)") == 1
    check_same(out, expected)


def test_ctrl_c_in_an_evaluation(testbed: Path, heldout: Path, gate: Gate, tmp_path: Path) -> None:
    """The first measurement is recorded, the second is ended on the worker."""
    results = tmp_path / "results.jsonl"
    common = ["evaluate", testbed, "--text", heldout / "chat.txt", "--only", "perplexity,kld", "--reference", testbed]
    common += ["--set", "perplexity.chunks=1", "--threads", 1, "--results", results, "--cluster"]
    with scheduler(tmp_path) as (_, address), worker(address, tmp_path, APEX_TOOLS=str(gate.root)) as one:
        running = client(*common, address)
        until(lambda: lines(results) and gate.waiting(), running)
        os.killpg(running.pid, signal.SIGINT)
        said = running.communicate(timeout=60)[1]
        assert running.returncode == 130 and "Traceback" not in said, said
        assert [row["evaluator"] for row in lines(results)] == ["perplexity"] and not list(tmp_path.glob(".res*"))
        check_idle(one, gate)
        gate.open()
        more = run_apex(*common, address, "--set", "kld.chunks=1", "--json")
    assert {row["evaluator"] for row in json.loads(more.stdout)} == {"perplexity", "kld"}
    assert len(lines(results)) == 2, "what was measured is not measured again"


def check_idle(worker: subprocess.Popen[bytes], gate: Gate) -> None:
    """The worker stays, and its tool ends."""
    until(lambda: not gate.waiting())
    assert not tool_of(worker.pid) and worker.poll() is None


def test_from_a_script(expected: Path, testbed: Path, heldout: Path, tmp_path: Path) -> None:
    """The cluster is one of the options of what is measured; rows are in the sweep's order."""
    said: list[api.Step] = []
    with scheduler(tmp_path) as (_, address), worker(address, tmp_path):
        measured = api.EvaluateOptions(
            reference=testbed, texts=(heldout / "chat.txt",), only=("kld",), settings={"kld.chunks": "1"}, threads=1,
            cluster=address,
        )  # fmt: skip
        types = {"type": ("Q8_0", "Q6_K", "Q4_K")}
        options = api.SweepOptions(types, policy="uniform", curves=(False,), measured=measured)
        swept = api.sweep(testbed, tmp_path / "out", options, place=api.workplace(report=said.append))
    assert [row.values["type"] for row in swept.rows] == ["Q8_0", "Q6_K", "Q4_K"] and not swept.errors
    assert any(step.task.startswith("quantizing") for step in said), "workers tell of their progress"
    check_same(tmp_path / "out", expected)


def test_what_a_cluster_cannot_do(trunk: list[object], tmp_path: Path) -> None:
    command = [*trunk, "-o", tmp_path / "out", "--cluster", "tcp://127.0.0.1:9"]
    code = EvaluationRefused.exit_code
    assert (
        "with --cluster the workers make the files, and delete them" in run_apex(*command, "--keep", code=code).stderr
    )
    assert "speed measures times" in run_apex(*command, "--only", "speed", code=code).stderr
