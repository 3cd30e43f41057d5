"""What a task gives its evaluator: tools with the user's arguments, exclusive use of the machine, files made once,
prompts.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from apex_runs import run_apex
from waiting import BOUND

from apex_build.errors import CalibrationSetInvalid, ParameterUnknown, ToolFailed
from apex_build.evaluation.run import Inputs, Work, plan_work
from apex_build.evaluation.task import ToolOptions, read_prompts
from apex_build.gguf_model.model import read_model
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins
from apex_build.progress import Step

WorkOf = Callable[..., Work]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("APEX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_arguments_for_the_tools(tools: Toolset) -> None:
    options = ToolOptions(
        99, ("--no-mmap", "-ot", "exps=CPU", "llama-bench:-mmp", "llama-bench:0", "llama-server:--no-warmup")
    )
    assert options.of("llama-perplexity") == ["--no-mmap", "-ot", "exps=CPU"]
    assert options.of("llama-server") == [*options.of("llama-perplexity"), "--no-warmup"]
    assert options.of("llama-bench") == ["-mmp", "0"]
    assert options.of("llama-tokenize") == [] == ToolOptions().of("llama-server")
    assert options.parts(tools)["gpu_layers"] == 99 and ToolOptions().parts(tools) == {}
    with pytest.raises(ParameterUnknown, match="llama-perplexity, llama-server, llama-bench, not llama-quantize"):
        ToolOptions(None, ("llama-quantize:--pure",))


def test_they_reach_the_tool_and_are_part_of_the_identity(
    tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path
) -> None:
    wanted = [
        "evaluate", testbed, "--only", "perplexity", "--text", heldout / "chat.txt", "--set", "perplexity.chunks=2",
        "--set", "perplexity.context=64", "--threads", 1, "--results", tmp_path / "r.jsonl", "--json",
    ]  # fmt: skip
    plain = json.loads(run_apex(*wanted).stdout)[0]
    assert "gpu_layers" not in plain and "tool_arguments" not in plain
    placed = json.loads(run_apex(*wanted, "--gpu-layers", 0, "--tool-argument=--no-mmap").stdout)[0]
    assert (
        placed["gpu_layers"] == 0
        and placed["tool_arguments"] == ["--no-mmap"]
        and placed["identity"] != plain["identity"]
    )
    assert placed["figures"] == plain["figures"]
    unknown = run_apex(*wanted, "--tool-argument=--no-such", code=ToolFailed.exit_code)
    assert "does not know --no-such" in unknown.stderr
    run_apex(*wanted, "--tool-argument", "llama-quantize:-x", code=ParameterUnknown.exit_code)


def test_the_server_and_llama_bench_get_them_too(tools: Toolset, testbed: Path) -> None:
    options = ToolOptions(0, ("--no-warmup", "llama-bench:-mmp", "llama-bench:0"))
    plugins = load_plugins()
    work = plan_work(
        plugins.evaluators()["speed"], read_model(testbed, plugins.role_of), Inputs(options=options), tools, threads=1
    )
    with work.task.serve("--ctx-size", "256") as server:
        assert isinstance(server.process.args, list)
        assert server.process.args[-5:] == ["--n-gpu-layers", "0", "--no-warmup", "--threads", "1"]
        assert server.ready_within > 600, "a large model takes longer to load"
    bench = ("--model", testbed, "--n-prompt", "8", "--n-gen", "0", "--repetitions", "1", "--output", "jsonl")
    rows = [json.loads(line) for line in work.task.run("llama-bench", *bench).lines if line.startswith("{")]
    assert [(row["n_gpu_layers"], row["use_mmap"]) for row in rows] == [(0, False)]


def test_a_tool_beside_a_server_of_the_same_task(work_of: WorkOf, testbed: Path, cache: Path) -> None:
    """The task itself already holds the machine's lock."""
    task = replace(work_of("speed").task, threads=None)
    with task.serve("--ctx-size", "256", "--threads", "1", "--no-warmup"):
        ran = task.run(
            "llama-bench", "--model", testbed, "--n-prompt", "8", "--n-gen", "0", "--repetitions", "1", "--threads", "1"
        )
    assert ran.returncode == 0


def test_two_evaluations_wait_for_each_other(work_of: WorkOf, cache: Path) -> None:
    """The waiting one says so; with a given number of threads it does not wait."""
    said: list[str] = []
    held, over = threading.Event(), threading.Event()
    task = replace(work_of("speed").task, threads=None)

    def other() -> None:
        with task._machine():
            held.set()
            over.wait(BOUND)

    def report(step: Step) -> None:
        said.append(step.task)
        over.set()

    with ThreadPoolExecutor() as pool:
        running = pool.submit(other)
        assert held.wait(BOUND)
        with replace(task, threads=1)._machine():
            assert not said and not running.done()
        with replace(task, report=report)._machine():
            assert said == ["waiting for another evaluation on this machine (--threads N: do not wait)"]


def test_a_file_that_is_made_once(work_of: WorkOf, cache: Path) -> None:
    """Leftovers of a killed run are removed by the next one; other code or arguments make another file."""
    task, made = work_of("speed").task, []

    def make(part: Path) -> None:
        made.append(part)
        part.write_text("numbers")

    path = task.kept("numbers.txt", {"seed": 1}, make)
    assert task.kept("numbers.txt", {"seed": 1}, make) == path and len(made) == 1
    path.rename(path.with_name(".numbers.txt.abcdef.part"))
    path.with_name(".numbers.txt.abcdef.part.csv").write_text("half")
    task.kept("numbers.txt", {"seed": 1}, make)
    assert {one.name for one in path.parent.iterdir()} == {"numbers.txt", "made-from.json"}
    others = (
        replace(task, code="abc"),
        replace(task, code="abc", evaluator="x"),
        replace(task, options=ToolOptions(0)),
    )
    assert len({path, *(other.kept("numbers.txt", {"seed": 1}, make) for other in others)}) == 4


def test_prompts_as_json_writes_them(tmp_path: Path) -> None:
    """Texts may contain line breaks other than the line feed; a byte order mark is not part of the text."""
    path = tmp_path / "p.jsonl"
    rows = [{"domain": "chat", "prompt": "one\u2028two\x85three"}, {"domain": "code", "prompt": "x"}]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert [(one.domain, one.text, one.origin) for one in read_prompts(path)] == [
        ("chat", "one\u2028two\x85three", "p.jsonl:1"),
        ("code", "x", "p.jsonl:2"),
    ]
    for bad in ('{"domain": "x", "prompt": "\\ud800"}', '{"domain": "\\udc80", "prompt": "x"}', "[" * 200_000):
        path.write_text(f"{json.dumps(rows[1])}\n{bad}\n")
        with pytest.raises(CalibrationSetInvalid, match=r"p\.jsonl:2: not a prompt"):
            read_prompts(path)
