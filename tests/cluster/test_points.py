"""`apex sweep --cluster` and `apex evaluate --cluster` where workers, schedulers and clients end on the way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from apex_runs import run_apex
from children import tool_of
from dask_processes import other_build, other_version, scheduler, wanted_by, worker
from gates import Gate, gated
from waiting import until

from apex_build import api
from apex_build.errors import EvaluationRefused, WorkersUnfit
from apex_build.native.toolset import Toolset

pytestmark = pytest.mark.usefixtures("tools")
TIMES = ("seconds", "measured")


TYPES = ("Q8_0", "Q6_K", "Q4_K")


@dataclass(frozen=True)
class Verb:
    """`apex sweep` or `apex evaluate` with three measurements, and the folder of what it makes on one machine."""

    options: Sequence[object]
    here: Path

    @property
    def sweeps(self) -> bool:
        return self.options[0] == "sweep"

    def to(self, folder: Path) -> list[object]:
        """The command whose results are in this folder."""
        if self.sweeps:
            return [*self.options, "-o", folder]
        folder.mkdir(exist_ok=True)
        return [*self.options, "--results", folder / "results.jsonl"]

    def measured(self, folder: Path) -> list[dict[str, Any]]:
        """The rows of what is measured, in the order of the file."""
        if self.sweeps:
            return [row for row in lines(folder / "sweep.jsonl") if row["measured"]]
        return lines(folder / "results.jsonl")

    def check_same(self, folder: Path) -> None:
        """All is as on one machine, but for the times. Results are in the order in which they came."""
        check_same(folder, self.here)

    def check_resumed(self, folder: Path, address: str) -> None:
        """The same command measures the other two."""
        again = run_apex(*self.to(folder), "--cluster", address).stderr
        if self.sweeps:
            assert again.count("(measured before)") == 1
        else:
            assert "2 of 3 measurements to do" in again and "1 of them recorded before" in again
        self.check_same(folder)


def made_here(options: Sequence[object], folder: Path) -> Verb:
    verb = Verb(options, folder)
    run_apex(*verb.to(folder))
    return verb


@pytest.fixture(scope="module")
def sweep(tools: Toolset, testbed: Path, heldout: Path, tmp_path_factory: pytest.TempPathFactory) -> Verb:
    points = ["--policy", "uniform", "--over", f"type={','.join(TYPES)}", "--without-head", "--reference", testbed]
    return made_here(["sweep", testbed, *points, *kld(heldout)], tmp_path_factory.mktemp("expected") / "sweep")


@pytest.fixture(scope="module")
def evaluation(tools: Toolset, testbed: Path, heldout: Path, tmp_path_factory: pytest.TempPathFactory) -> Verb:
    folder = tmp_path_factory.mktemp("expected")
    files = [folder / f"{name}.gguf" for name in TYPES]
    for name, file in zip(TYPES, files, strict=True):
        run_apex("quantize", testbed, "-o", file, "--policy", "uniform", "--set", f"type={name}", "--threads", 1)
    return made_here(["evaluate", *files, "--reference", testbed, *kld(heldout)], folder / "evaluation")


@pytest.fixture(params=["sweep", "evaluation"])
def verb(request: pytest.FixtureRequest) -> Verb:
    found: Verb = request.getfixturevalue(request.param)
    return found


def kld(heldout: Path) -> list[object]:
    return ["--only", "kld", "--set", "kld.chunks=1", "--threads", 1, "--text", heldout / "chat.txt"]


@pytest.fixture
def gate(tools: Toolset, tmp_path: Path) -> Iterator[Gate]:
    """For workers: each point waits for its measurement, and `--only kld` for that of the file."""
    with gated(tools, tmp_path / "gate", "llama-perplexity", having="--kl-divergence") as made:
        yield made


@pytest.fixture
def second_gate(tools: Toolset, tmp_path: Path) -> Iterator[Gate]:
    """For another worker."""
    with gated(tools, tmp_path / "second-gate", "llama-perplexity", having="--kl-divergence") as made:
        yield made


def client(*command: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "apex_build", *map(str, command)], env={**os.environ, **environment},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    """Whole ones: another process may be writing."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def check_same(there: Path, here: Path) -> None:
    """All that is written but for the times. Results are in the order in which they came."""
    assert {path.name for path in there.iterdir()} == {path.name for path in here.iterdir()}
    results = [timeless(lines(folder / "results.jsonl")) for folder in (there, here)]
    assert sorted(map(str, results[0])) == sorted(map(str, results[1]))
    if not (here / "sweep.json").exists():
        return
    assert timeless(lines(there / "sweep.jsonl")) == timeless(lines(here / "sweep.jsonl"))
    one, two = (json.loads((folder / "sweep.json").read_text()) for folder in (there, here))
    assert [one[key] for key in ("kind", "identity", "from", "points")] == [
        two[key] for key in ("kind", "identity", "from", "points")
    ]
    assert (there / "table.md").read_text() == (here / "table.md").read_text()


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


def test_a_killed_worker_loses_its_measurement_alone(verb: Verb, gate: Gate, second_gate: Gate, tmp_path: Path) -> None:
    """What it measured before is not measured again, though its memory is lost."""
    out = tmp_path / "out"
    with (
        scheduler(tmp_path) as (_, address),
        worker(address, tmp_path, "--name", "one", APEX_TOOLS=str(gate.root)) as one,
        worker(address, tmp_path, "--name", "two", APEX_TOOLS=str(second_gate.root)),
        client(*verb.to(out), "--cluster", address) as running,
    ):
        gate.let(1)
        until(lambda: len(verb.measured(out)) == 1 and gate.waiting() and second_gate.waiting(), running)
        before = verb.measured(out)
        one.kill()
        until(lambda: not gate.waiting(), running)
        second_gate.open()
        said = running.communicate(timeout=300)[1]
        assert running.returncode == 0, said
    assert (len(gate.passed()), len(second_gate.passed())) == (1, 2)
    assert all(row in verb.measured(out) for row in before)
    verb.check_same(out)


def test_a_lost_scheduler_costs_nothing_measured(verb: Verb, gate: Gate, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        scheduler(tmp_path) as (boss, address),
        worker(address, tmp_path, APEX_TOOLS=str(gate.root)),
        client(*verb.to(out), "--cluster", address) as running,
    ):
        gate.let(1)
        until(lambda: verb.measured(out), running)
        boss.kill()
        said = running.communicate(timeout=120)[1]
    assert running.returncode == 83 and "the scheduler is gone" in said and "the same command" in said, said
    assert "Traceback" not in said
    assert len(verb.measured(out)) == 1
    with scheduler(tmp_path) as (_, address), worker(address, tmp_path):
        verb.check_resumed(out, address)


def test_two_clients_at_once(verb: Verb, gate: Gate, tmp_path: Path) -> None:
    """They want the same: each is measured once, and both see how far it is. A sweep's folder is refused to a third."""
    outs = [tmp_path / "one", tmp_path / "two"]
    with scheduler(tmp_path) as (_, address), worker(address, tmp_path, APEX_TOOLS=str(gate.root)):
        running = [client(*verb.to(out), "--cluster", address) for out in outs]
        until(lambda: wanted_by(address) == 2, running[0])
        if verb.sweeps:
            third = run_apex(*verb.to(outs[0]), "--cluster", address, code=71)
            assert "is being written by another run" in third.stderr
        gate.open()
        said = [one.communicate(timeout=300)[1] for one in running]
    assert [one.returncode for one in running] == [0, 0], said
    for out, text in zip(outs, said, strict=True):
        verb.check_same(out)
        assert re.search(r" % \(\d of 3, .*\d\d?/\d+ \w+", text), text
    times = [{row["identity"]: row["seconds"] for row in verb.measured(out)} for out in outs]
    assert set(times[0].items()) & set(times[1].items()), "what both wait for is measured once"


@pytest.mark.parametrize("local", [True, False])
def test_ctrl_c(local: bool, verb: Verb, gate: Gate, tmp_path: Path) -> None:
    """To all processes of the terminal. Tools end at once, also those of workers that stay."""
    out, tools = tmp_path / "out", str(gate.root)
    with scheduler(tmp_path) as (_, address), worker(address, tmp_path, APEX_TOOLS=tools) as one:
        running = client(*verb.to(out), "--cluster", "local:1" if local else address, APEX_TOOLS=tools)
        gate.let(1)
        until(lambda: len(verb.measured(out)) == 1 and gate.waiting(), running)
        os.killpg(running.pid, signal.SIGINT)
        said = running.communicate(timeout=60)[1]
        assert running.returncode == 130 and "Traceback" not in said, said
        assert len(verb.measured(out)) == 1
        if verb.sweeps:
            assert f"kept: 1 measured points in {out / 'sweep.jsonl'}" in said
        assert not list(out.glob(".*")) and not (out / "files").exists()
        check_idle(one, gate)
        gate.open()
        verb.check_resumed(out, address)


def test_workers_that_are_not_fit(verb: Verb, tools: Toolset, tmp_path: Path) -> None:
    """They are named with what to do, get nothing to do, and the others do it."""
    out = tmp_path / "out"
    with (
        scheduler(tmp_path) as (_, address),
        worker(address, tmp_path, APEX_TOOLS=str(other_build(tools, tmp_path))),
        worker(address, tmp_path, PYTHONPATH=str(other_version(tmp_path))),
    ):
        ran = run_apex(*verb.to(out), "--cluster", address, code=WorkersUnfit.exit_code)
        assert "has another build of the tools" in ran.stderr and "has apex-build 9.9.9, and this is" in ran.stderr
        assert not verb.measured(out)
        with worker(address, tmp_path):
            ran = run_apex(*verb.to(out), "--cluster", address)
            assert ran.stderr.count("a worker is not used") == 2 and "to do on 1 worker" in ran.stderr
    verb.check_same(out)


def check_idle(worker: subprocess.Popen[bytes], gate: Gate) -> None:
    """The worker stays, and its tool ends."""
    until(lambda: not gate.waiting())
    assert not tool_of(worker.pid) and worker.poll() is None


def test_from_a_script(sweep: Verb, testbed: Path, heldout: Path, tmp_path: Path) -> None:
    """The cluster is one of the options of what is measured; rows are in the sweep's order."""
    said: list[api.Step] = []
    with scheduler(tmp_path) as (_, address), worker(address, tmp_path):
        measured = api.EvaluateOptions(
            reference=testbed, texts=(heldout / "chat.txt",), only=("kld",), settings={"kld.chunks": "1"}, threads=1,
            cluster=address,
        )  # fmt: skip
        options = api.SweepOptions({"type": TYPES}, policy="uniform", curves=(False,), measured=measured)
        swept = api.sweep(testbed, tmp_path / "out", options, place=api.workplace(report=said.append))
    assert [row.values["type"] for row in swept.rows] == [*TYPES] and not swept.errors
    assert any(step.task.startswith("quantizing") for step in said), "workers tell of their progress"
    sweep.check_same(tmp_path / "out")


def test_what_a_cluster_cannot_do(sweep: Verb, tmp_path: Path) -> None:
    command = [*sweep.to(tmp_path / "out"), "--cluster", "tcp://127.0.0.1:9"]
    code = EvaluationRefused.exit_code
    assert (
        "with --cluster the workers make the files, and delete them" in run_apex(*command, "--keep", code=code).stderr
    )
    assert "speed measures times" in run_apex(*command, "--only", "speed", code=code).stderr
