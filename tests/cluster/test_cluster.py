"""`apex calibrate --cluster` with real Dask schedulers and workers, some killed in between."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from apex_runs import run_apex
from children import alive, tool_of
from dask_processes import other_build, other_version, scheduler, wanted_by, worker
from gates import Gate, gated, held_at_snapshot, is_whole, started
from waiting import until

import apex_build
from apex_build import api
from apex_build.native.toolset import Toolset

pytestmark = pytest.mark.usefixtures("tools")
SHARDS = ("--chunks", "24", "--shards", "4", "--no-rows-check")


def client(
    model: Path, out: Path, address: str, shards: Sequence[str] = SHARDS, **environment: str
) -> subprocess.Popen[str]:
    command = ["calibrate", model, "-o", out, *shards, "--cluster", address]
    return subprocess.Popen(
        [sys.executable, "-m", "apex_build", *map(str, command)], env={**os.environ, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def kept(out: Path) -> list[Path]:
    """Its finished shards."""
    return sorted(out.with_name(f".{out.name}.work").glob("shards/*.gguf"))


@pytest.fixture
def gate(tools: Toolset, tmp_path: Path) -> Iterator[Gate]:
    """For workers: the tool waits before each shard."""
    with gated(tools, tmp_path / "gate", "llama-imatrix", having="--chunks") as made:
        yield made


@pytest.fixture(scope="module")
def expected(tools: Toolset, testbed: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The result of the same shards without a cluster."""
    out = tmp_path_factory.mktemp("expected") / "out.gguf"
    run_apex("calibrate", testbed, "-o", out, *SHARDS)
    return out.read_bytes()


def test_two_processes_here(expected: bytes, testbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    ran = run_apex("calibrate", testbed, "-o", out, *SHARDS, "--cluster", "local:2")
    assert out.read_bytes() == expected
    assert "calibrating: 24/24 chunks" in ran.stderr and not list(tmp_path.glob(".*"))


def test_a_killed_worker_loses_its_shard_alone(
    expected: bytes, gate: Gate, tools: Toolset, testbed: Path, tmp_path: Path
) -> None:
    """The shard that it made before is not made again, though its memory is lost."""
    out = tmp_path / "out.gguf"
    with (
        gated(tools, tmp_path / "second-gate", "llama-imatrix", having="--chunks") as second,
        scheduler(tmp_path) as (_, address),
        worker(address, tmp_path, "--name", "one", APEX_TOOLS=str(gate.root)) as one,
        worker(address, tmp_path, "--name", "two", APEX_TOOLS=str(second.root)),
        client(testbed, out, address) as running,
    ):
        gate.let(1)
        until(lambda: len(kept(out)) == 1 and gate.waiting() and second.waiting(), running)
        one.kill()
        until(lambda: not gate.waiting(), running)
        second.open()
        said = running.communicate(timeout=300)[1]
        assert running.returncode == 0, said
        assert (len(gate.passed()), len(second.passed())) == (1, 3)
    assert out.read_bytes() == expected


def test_a_killed_shard_resumes_from_its_snapshot(gate: Gate, testbed: Path, tmp_path: Path) -> None:
    """On another worker that has the same cache; the sums are those of a run to which nothing happened."""
    out, whole, cache = tmp_path / "out.gguf", tmp_path / "whole.gguf", tmp_path / "cache"
    shards = ("--context", "64", "--chunks", "46", "--shards", "2", "--no-rows-check")
    places = {"APEX_TOOLS": str(gate.root), "APEX_CACHE_DIR": str(cache)}
    with scheduler(tmp_path) as (_, address):
        with worker(address, tmp_path, **places) as one:
            running = client(testbed, out, address, shards)
            (tool,) = gate.next(running, after=0)
            (work,) = (cache / "cluster" / "shards").glob(".*.work")
            with held_at_snapshot(work) as snapshot:
                gate.let(1)
                until(lambda: is_whole(snapshot), running)
                one.kill()
                until(lambda: not alive(tool))
        listed = run_apex("cache", "list", "--kind", "calibrations", env={**os.environ, **places}).stdout
        assert work.name in listed
        gate.open()
        with worker(address, tmp_path, **places):
            said = running.communicate(timeout=300)[1]
            assert running.returncode == 0, said
    resumed = [line for line in gate.passed() if f"--in-file {snapshot} --chunk" in line]
    assert len(gate.passed()) == 3 and len(resumed) == 1 and resumed[0].endswith("--chunks 13")
    assert not list((cache / "cluster" / "shards").iterdir()), "nothing is left on the worker"
    run_apex("calibrate", testbed, "-o", whole, *shards)
    assert out.read_bytes() == whole.read_bytes()


def test_a_lost_scheduler_costs_no_finished_shard(
    expected: bytes, gate: Gate, tools: Toolset, testbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    with (
        scheduler(tmp_path) as (boss, address),
        worker(address, tmp_path, APEX_TOOLS=str(gate.root)),
        client(testbed, out, address) as running,
    ):
        gate.let(2)
        until(lambda: len(kept(out)) == 2, running)
        boss.kill()
        said = running.communicate(timeout=120)[1]
    assert running.returncode == 83 and "the scheduler is gone" in said and "the same command" in said, said
    assert "Traceback" not in said and not out.exists()
    assert len(kept(out)) == 2
    with (
        gated(tools, tmp_path / "later", "llama-imatrix", having="--chunks") as later,
        scheduler(tmp_path) as (_, address),
        worker(address, tmp_path, APEX_TOOLS=str(later.root)),
    ):
        later.open()
        run_apex("calibrate", testbed, "-o", out, *SHARDS, "--cluster", address)
        assert len(later.passed()) == 2, "none was made twice"
    assert out.read_bytes() == expected


def test_another_build_is_refused_by_name(expected: bytes, tools: Toolset, testbed: Path, tmp_path: Path) -> None:
    foreign, out = other_build(tools, tmp_path), tmp_path / "out.gguf"
    with scheduler(tmp_path) as (_, address), worker(address, tmp_path, APEX_TOOLS=str(foreign)):
        ran = run_apex("calibrate", testbed, "-o", out, *SHARDS, "--cluster", address, code=84)
        assert "has another build of the tools" in ran.stderr and "127.0.0.1" in ran.stderr
        with worker(address, tmp_path), worker(address, tmp_path, "--nthreads", 4):
            ran = run_apex("calibrate", testbed, "-o", out, *SHARDS, "--cluster", address)
            assert ran.stderr.count("a worker is not used") == 2 and "would run 4 tasks at a time" in ran.stderr
    assert out.read_bytes() == expected


def test_another_version_is_refused_by_name(testbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with scheduler(tmp_path) as (_, address), worker(address, tmp_path, PYTHONPATH=str(other_version(tmp_path))):
        ran = run_apex("calibrate", testbed, "-o", out, *SHARDS, "--cluster", address, code=84)
    assert f"has apex-build 9.9.9, and this is {apex_build.__version__}" in ran.stderr and "127.0.0.1" in ran.stderr
    assert f"pip install 'apex-build[cluster]=={apex_build.__version__}'" in ran.stderr
    assert not out.exists()


def test_two_clients_at_once(expected: bytes, gate: Gate, testbed: Path, tmp_path: Path) -> None:
    """Two runs share their shards: those that both wait for are made once. A third may not write the same output."""
    outs = [tmp_path / "one.gguf", tmp_path / "two.gguf"]
    with scheduler(tmp_path) as (_, address), worker(address, tmp_path, APEX_TOOLS=str(gate.root)):
        running = [client(testbed, out, address) for out in outs]
        until(lambda: wanted_by(address) == 2, running[0])
        third = run_apex("calibrate", testbed, "-o", outs[0], *SHARDS, "--cluster", address, code=71)
        assert "is being written by another run" in third.stderr
        gate.open()
        said = [one.communicate(timeout=300)[1] for one in running]
        assert [one.returncode for one in running] == [0, 0], said
    assert [out.read_bytes() for out in outs] == [expected, expected]
    assert len(gate.passed()) == 4, "what both wait for is made once"


@pytest.mark.parametrize("local", [True, False])
def test_ctrl_c(local: bool, expected: bytes, gate: Gate, testbed: Path, tmp_path: Path) -> None:
    """To all processes of the terminal. Tools stop at once, even those of workers that keep running."""
    out, tools = tmp_path / "out.gguf", str(gate.root)
    with scheduler(tmp_path) as (_, address), worker(address, tmp_path, APEX_TOOLS=tools) as one:
        running = client(testbed, out, "local:2" if local else address, APEX_TOOLS=tools)
        gate.let(1)
        until(lambda: len(kept(out)) == 1 and len(gate.waiting()) == (2 if local else 1), running)
        os.killpg(running.pid, signal.SIGINT)
        said = running.communicate(timeout=60)[1]
        assert running.returncode == 130 and "Traceback" not in said, said
        assert "is kept" in said and kept(out) and not out.exists()
        until(lambda: not gate.waiting())
        assert not tool_of(one.pid) and one.poll() is None
        gate.open()
        run_apex("calibrate", testbed, "-o", out, *SHARDS, "--cluster", address)
        assert len(gate.passed()) == 4, "the finished shard was not made again"
    assert out.read_bytes() == expected


def test_the_model_is_sent_once(expected: bytes, tools: Toolset, testbed: Path, tmp_path: Path) -> None:
    """/proc/self/cwd is another folder for the worker, as if its machine had no such model."""
    here, out = tmp_path / "here", tmp_path / "out.gguf"
    here.mkdir()
    (here / "model.gguf").write_bytes(testbed.read_bytes())
    cache = tmp_path / "cache"
    with (
        scheduler(tmp_path) as (_, address),
        worker(address, tmp_path, APEX_CACHE_DIR=str(cache), APEX_TOOLS=str(tools.root)),
    ):
        command = ["calibrate", "/proc/self/cwd/model.gguf", *SHARDS, "--cluster", address]
        assert "sending model.gguf to" in run_apex(*command, "-o", out, cwd=here).stderr
        (sent,) = (cache / "cluster" / "models").glob("*/model.gguf")
        assert sent.read_bytes() == testbed.read_bytes()
        again = run_apex(*command, "-o", tmp_path / "again.gguf", cwd=here)
        assert "sending" not in again.stderr
    assert out.read_bytes() == (tmp_path / "again.gguf").read_bytes() == expected


def test_workers_that_come_later(expected: bytes, gate: Gate, tools: Toolset, testbed: Path, tmp_path: Path) -> None:
    """They are looked at first: one that is not fit gets nothing, one without the model gets that before. A shard that
    no worker has any more before it has arrived is made again.
    """
    here, out = tmp_path / "here", tmp_path / "out.gguf"
    here.mkdir()
    (here / "model.gguf").write_bytes(testbed.read_bytes())
    command = ["calibrate", "/proc/self/cwd/model.gguf", "-o", out, *SHARDS, "--cluster"]

    def places(name: str, root: Path) -> dict[str, str]:
        return {"APEX_TOOLS": str(root), "APEX_CACHE_DIR": str(tmp_path / name)}

    with scheduler(tmp_path) as (_, address):
        with worker(address, tmp_path, **places("one", gate.root)) as one:
            running = started(gate, [*command, address], cwd=here)
            gate.next(running, after=0)
            running.send_signal(signal.SIGSTOP)  # it takes no result
            gate.let(1)
            gate.next(running, after=1)
            one.kill()
            one.wait()
            running.send_signal(signal.SIGCONT)
        with (
            worker(address, tmp_path, **places("two", other_build(tools, tmp_path))),
            worker(address, tmp_path, **places("three", tools.root)),
        ):
            said = running.communicate(timeout=300)[1]
            assert running.returncode == 0, said
    assert said.count("a worker is not used") == 1 and "another build of the tools" in said
    assert list((tmp_path / "three" / "cluster" / "models").glob("*/model.gguf"))
    assert not list((tmp_path / "two").glob("cluster/*"))
    assert out.read_bytes() == expected


def test_a_worker_that_comes_later_helps(
    expected: bytes, gate: Gate, tools: Toolset, testbed: Path, tmp_path: Path
) -> None:
    """With what no other has begun, and what a lost one had begun."""
    out = tmp_path / "out.gguf"
    with (
        scheduler(tmp_path) as (_, address),
        worker(address, tmp_path, APEX_TOOLS=str(gate.root)),
        worker(address, tmp_path, APEX_TOOLS=str(gate.root)) as lost,
        client(testbed, out, address) as running,
    ):
        gate.next(running, after=0, waiting=2)
        lost.kill()
        until(lambda: len(gate.waiting()) == 1)
        with worker(address, tmp_path, APEX_TOOLS=str(tools.root)):
            until(lambda: len(kept(out)) == 3, running)
            gate.open()
            said = running.communicate(timeout=300)[1]
            assert running.returncode == 0, said
    assert len(gate.passed()) == 1, "the shard that had begun stayed where it was"
    assert out.read_bytes() == expected


def test_resources_that_workers_declare(expected: bytes, testbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with scheduler(tmp_path) as (_, address):
        with worker(address, tmp_path, "--resources", "MEMORY=1000"):
            ran = run_apex("calibrate", testbed, "-o", out, *SHARDS, "--cluster", address, code=84)
            assert "takes MEMORY=" in ran.stderr and "1000" in ran.stderr
        with worker(address, tmp_path, "--resources", "MEMORY=1000000000 GPU=1"):
            run_apex("calibrate", testbed, "-o", out, *SHARDS, "--cluster", address)
    assert out.read_bytes() == expected


def test_bad_input(testbed: Path, tmp_path: Path) -> None:
    command = ["calibrate", testbed, "-o", tmp_path / "x.gguf", *SHARDS, "--cluster"]
    assert "no Dask scheduler answers" in run_apex(*command, "tcp://127.0.0.1:9", code=83).stderr
    assert "not the address of a scheduler" in run_apex(*command, "somewhere", code=83).stderr
    with scheduler(tmp_path) as (_, address):
        assert "it has none" in run_apex(*command, address, code=84).stderr
    assert not (tmp_path / "x.gguf").exists()


def test_evaluations(testbed: Path, heldout: Path, tmp_path: Path) -> None:
    """One task per evaluator and file; the figures equal those of a single machine, and so does what is shown."""
    common = ["evaluate", testbed, "--text", heldout / "chat.txt", "--only", "perplexity,draft-head"]
    common += ["--set", "perplexity.chunks=2", "--set", "draft-head.chunks=2", "--set", "draft-head.depth=1", "--json"]
    common += ["--threads", 1]  # does not wait for what others evaluate on this machine
    here = json.loads(run_apex(*common, "--results", tmp_path / "here.jsonl").stdout)
    results = tmp_path / "there.jsonl"
    with scheduler(tmp_path) as (_, address), worker(address, tmp_path):
        ran = run_apex(*common, "--results", results, "--cluster", address)
        quiet = run_apex(*common, "--results", tmp_path / "quiet.jsonl", "--cluster", address, "-q")
    there = json.loads(ran.stdout)
    assert "2 of 2 measurements to do on 1 worker: about " in ran.stderr
    assert re.search(
        r"evaluating: \d+ % \(1 of 2, \S+: testbed-f16.gguf on chat 0/2 chunks\) \(0 s, \d+ s left\)", ran.stderr
    )
    assert "evaluating: 100 % (" in ran.stderr and not quiet.stderr
    assert [one["figures"] for one in json.loads(quiet.stdout)] == [one["figures"] for one in here]
    assert [one["figures"] for one in there] == [one["figures"] for one in here] and len(there) == 2
    assert [one["identity"] for one in there] == [one["identity"] for one in here]
    again = run_apex(*common, "--results", results, "--cluster", "tcp://127.0.0.1:9")
    assert "measurements to do" not in again.stderr, "recorded: nothing is measured again"
    assert [one["figures"] for one in json.loads(again.stdout)] == [one["figures"] for one in here]


def test_progress_of_an_evaluation_in_a_script(testbed: Path, heldout: Path, tmp_path: Path) -> None:
    """Every task tells of its chunks and prompts, in the script's own thread. What is timed comes last."""
    said: list[tuple[api.Step, int]] = []
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"domain": "chat", "prompt": "Hello"}\n{"domain": "chat", "prompt": "Who"}\n')
    options = api.EvaluateOptions(
        texts=(heldout / "chat.txt",), prompts=prompts, only=("draft-acceptance", "speed", "perplexity"),
        settings={
            "perplexity.chunks": "2", "draft-acceptance.lengths": "1", "draft-acceptance.n_predict": "8",
            "speed.prompt": "8", "speed.generate": "2", "speed.repetitions": "1", "speed.n_max": "0",
        }, threads=1,
    )  # fmt: skip
    place = api.workplace(report=lambda step: said.append((step, threading.get_ident())))
    with scheduler(tmp_path) as (_, address), worker(address, tmp_path):
        results = api.evaluate([testbed], replace(options, cluster=address), place=place)
    assert [one.work.evaluator.name for one in results] == ["draft-acceptance", "perplexity", "speed"]
    counted = {(step.task, step.done, step.total, step.unit) for step, _ in said}
    assert {("perplexity: testbed-f16.gguf on chat", done, 2, "chunks") for done in (0, 2)} <= counted
    assert {step.unit for step, _ in said if step.task.startswith("draft-acceptance: ")} >= {"prompts"}
    assert {thread for _, thread in said} == {threading.get_ident()}
