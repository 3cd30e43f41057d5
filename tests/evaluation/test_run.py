"""`apex evaluate`: what runs, what is refused, what is recorded, and what one failing evaluator does to the others."""

from __future__ import annotations

import json
import multiprocessing
import signal
import subprocess
from pathlib import Path

import gguf_edit
import pytest
from apex_runs import run_apex
from gates import ended_at_gate, gated

from apex_build.errors import (
    CalibrationSetInvalid,
    EvaluationRefused,
    EvaluatorUnknown,
    OutputUnwritable,
    ParameterUnknown,
    PluginFailed,
)
from apex_build.evaluation import run
from apex_build.native.toolset import Toolset

PLUGIN = """
from apex_build.hookspecs import Evaluator, Figure, Parameter, hookimpl

def size(task):
    with open(task.model.path.parent / "ran.txt", "a") as file:
        file.write("size\\n")
    return [Figure("bytes", float(task.model.path.stat().st_size) * task.number("times"), unit="B")]

def broken(task):
    raise ValueError("no such luck")

def odd(task):
    return ["seven"]

def numpy(task):
    import numpy
    return [Figure("share", numpy.float32(0.5), numpy.float64(0.25), n=numpy.int64(7))]

def infinite(task):
    return [Figure("ratio", float("nan"))]

def wordy(task):
    return [Figure("ratio", "much")]

def half(task):
    return [Figure("ratio", 1.0, note="half a character: \\udc80")]

@hookimpl
def apex_evaluators():
    return [
        Evaluator("broken", broken),
        *(Evaluator(function.__name__, function) for function in (half, infinite, numpy, wordy)),
        Evaluator("head-size", size, needs=("head",), parameters={"times": Parameter(1, "int")}),
        Evaluator("odd", odd),
        Evaluator("size", size, parameters={"times": Parameter(1, "int")}),
    ]
"""


@pytest.fixture
def place(tmp_path: Path, testbed: Path) -> Path:
    """A folder with a plugin `scales` and a link to the testbed."""
    (tmp_path / "scales").mkdir()
    (tmp_path / "scales" / "plugin.py").write_text(PLUGIN)
    (tmp_path / "model.gguf").symlink_to(testbed)
    return tmp_path


def evaluate(place: Path, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    return run_apex(
        "evaluate",
        place / "model.gguf",
        "--plugin",
        place / "scales",
        "--results",
        place / "r.jsonl",
        *arguments,
        code=code,
    )


def test_an_evaluator_that_raises_is_named_and_the_others_go_on(tools: Toolset, place: Path) -> None:
    ran = evaluate(place, "--only", "broken,odd,size", "--json", code=PluginFailed.exit_code)
    assert "failed: broken on model.gguf: plugin 'scales': ValueError: no such luck" in ran.stderr
    assert "plugin.py:10" in ran.stderr and "Traceback" not in ran.stderr
    assert "evaluator 'odd' must give a list of Figure" in ran.stderr
    assert "2 of 3 measurements failed" in ran.stderr
    assert [row["evaluator"] for row in json.loads(ran.stdout)] == ["size"]
    assert [json.loads(line)["evaluator"] for line in (place / "r.jsonl").read_text().splitlines()] == ["size"]


def test_what_is_recorded_is_not_measured_again(tools: Toolset, place: Path) -> None:
    first = json.loads(evaluate(place, "--only", "size", "--json").stdout)
    again = json.loads(evaluate(place, "--only", "size", "--json").stdout)
    assert (place / "ran.txt").read_text() == "size\n"
    assert first[0]["figures"] == again[0]["figures"] and first[0]["identity"] == again[0]["identity"]
    assert {"model", "tools", "settings", "plugin", "apex", "measured", "seconds"} <= set(first[0])
    evaluate(place, "--only", "size", "--set", "size.times=2")
    evaluate(place, "--only", "size", "--force")
    assert (place / "ran.txt").read_text() == "size\n" * 3
    assert len((place / "r.jsonl").read_text().splitlines()) == 3


def test_figures_that_are_no_figures_are_refused_and_numpys_are_taken(tools: Toolset, place: Path) -> None:
    """Figures go into JSON and tables: a plugin's NaN or text would fail there, after the work was done."""
    ran = evaluate(place, "--only", "half,infinite,wordy,numpy", code=PluginFailed.exit_code)
    assert "evaluator 'infinite' gave a figure whose value is nan, expected a finite number" in ran.stderr
    assert (
        "evaluator 'wordy' gave a figure whose value is 'much'" in ran.stderr
        and "3 of 4 measurements failed" in ran.stderr
    )
    assert (
        "evaluator 'half' gave a figure whose name, unit, domain, note, paired or label is not a string" in ran.stderr
    )
    (row,) = map(json.loads, (place / "r.jsonl").read_text().splitlines())
    assert row["figures"][0]["value"] == 0.5 and row["figures"][0]["n"] == 7
    assert json.loads(evaluate(place, "--only", "numpy", "--json").stdout)[0]["measured"]


def test_a_plugin_that_was_changed_measures_again(tools: Toolset, place: Path) -> None:
    evaluate(place, "--only", "size")
    (place / "scales" / "notes.txt").write_text("no code")
    evaluate(place, "--only", "size")
    assert (place / "ran.txt").read_text() == "size\n"
    (place / "scales" / "plugin.py").write_text(PLUGIN.replace('task.number("times")', 'task.number("times") / 1000'))
    kilo = json.loads(evaluate(place, "--only", "size", "--json").stdout)
    assert kilo[0]["figures"][0]["value"] == (place / "model.gguf").stat().st_size / 1000
    (place / "scales" / "plugin.py").write_text(
        PLUGIN.replace('Evaluator("size", size,', 'Evaluator("size", size, version=2,')
    )
    again = json.loads(evaluate(place, "--only", "size", "--json").stdout)
    assert again[0]["version"] == 2 and (place / "ran.txt").read_text() == "size\n" * 3


def test_files_of_one_name_have_columns_of_their_own(tools: Toolset, place: Path, testbed: Path) -> None:
    (place / "other").mkdir()
    gguf_edit.without_head(testbed, place / "other" / "model.gguf")
    ran = evaluate(place, place / "other" / "model.gguf", "--only", "size")
    for path in (testbed, place / "other" / "model.gguf"):
        assert f"{path.stat().st_size} B" in " ".join(ran.stdout.split())


@pytest.mark.slow
def test_runs_may_share_a_file_of_results(tmp_path: Path) -> None:
    """A line may be longer than one write, and what looks cut short may be another run's line."""
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.starmap(_append_many, [(tmp_path / "r.jsonl", name) for name in "abc"])
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert sorted(row["identity"] for row in rows) == sorted(f"{name}{n}" for name in "abc" for n in range(20))


def _append_many(path: Path, name: str) -> None:
    for number in range(20):
        run.append_record(path, {"identity": f"{name}{number}", "note": name * 30_000, "figures": [], "seconds": 0.0})


def test_a_line_that_a_crash_cut_short_goes(tools: Toolset, place: Path) -> None:
    evaluate(place, "--only", "size")
    with (place / "r.jsonl").open("a") as file:
        file.write('{"identity": "abc", "fig')
    evaluate(place, "--only", "size", "--set", "size.times=3")
    rows = [json.loads(line) for line in (place / "r.jsonl").read_text().splitlines()]
    assert [row["settings"]["times"] for row in rows] == [1, 3]


def test_a_last_record_without_a_line_end_stays(tools: Toolset, place: Path) -> None:
    evaluate(place, "--only", "size")
    whole = (place / "r.jsonl").read_bytes()
    (place / "r.jsonl").write_bytes(whole.removesuffix(b"\n"))
    evaluate(place, "--only", "size")
    assert (place / "ran.txt").read_text() == "size\n", "it counts as recorded"
    evaluate(place, "--only", "size", "--set", "size.times=3")
    now = (place / "r.jsonl").read_bytes()
    assert now.startswith(whole) and now.count(b"\n") == 2 and now.endswith(b"\n")


@pytest.mark.parametrize(
    "content",
    [
        "notes",
        "notes\n",
        "one\ntwo",
        "{ my notes",
        '{"a": 1}',
        '{"a": 1}\n',
        "[]",
        "\n",
        '{"identity": "x", "figures": []}',
    ],
)
def test_a_file_that_holds_no_results_is_refused_and_stays(content: str, tools: Toolset, place: Path) -> None:
    (place / "r.jsonl").write_text(content)
    said = evaluate(place, "--only", "size", code=OutputUnwritable.exit_code).stderr
    assert "r.jsonl:1: not a result of apex evaluate" in said and "--results" in said
    assert (place / "r.jsonl").read_text() == content and not (place / "ran.txt").exists()
    with pytest.raises(OutputUnwritable):
        run.append_record(place / "r.jsonl", {"figures": []})
    assert (place / "r.jsonl").read_text() == content and not list(place.glob(".r.jsonl*"))


def test_results_through_a_link_go_to_where_it_leads(tools: Toolset, place: Path) -> None:
    (place / "there").mkdir()
    (place / "r.jsonl").symlink_to("there/results.jsonl")
    evaluate(place, "--only", "size")
    assert (place / "r.jsonl").is_symlink() and (place / "there" / "results.jsonl").read_bytes().endswith(b"\n")


def test_dry_run_measures_nothing(tools: Toolset, place: Path) -> None:
    ran = evaluate(place, "--only", "size", "--dry-run")
    assert "size on " in ran.stdout and "times=1" in ran.stdout
    assert not (place / "r.jsonl").exists() and not (place / "ran.txt").exists()


def test_refusals(tools: Toolset, place: Path, testbed: Path) -> None:
    assert "near it: size" in evaluate(place, "--only", "sise", code=EvaluatorUnknown.exit_code).stderr
    alone = evaluate(place, "--only", "kld", code=EvaluationRefused.exit_code).stderr
    assert "kld cannot be run" in alone and "--reference F16.gguf" in alone
    assert "--data hellaswag=FILE" in evaluate(place, "--only", "hellaswag", code=EvaluationRefused.exit_code).stderr
    assert "EVALUATOR.PARAMETER" in evaluate(place, "--set", "times=2", code=ParameterUnknown.exit_code).stderr
    missing = evaluate(place, "--only", "size", "--set", "size.time=2", code=ParameterUnknown.exit_code).stderr
    assert "near it: times" in missing
    assert (
        "no.txt: no such file"
        in evaluate(place, "--text", place / "no.txt", code=CalibrationSetInvalid.exit_code).stderr
    )
    assert (
        "no such file" in evaluate(place, "--prompts", place / "no.jsonl", code=CalibrationSetInvalid.exit_code).stderr
    )
    (place / "p.jsonl").write_text('{"prompt": "x"}\n')
    assert (
        "p.jsonl:1: not a prompt"
        in evaluate(place, "--prompts", place / "p.jsonl", code=CalibrationSetInvalid.exit_code).stderr
    )
    (place / "r.jsonl").write_text("hello\nworld\n")
    assert "r.jsonl:1: not a result" in evaluate(place, "--only", "size", code=OutputUnwritable.exit_code).stderr
    assert (place / "r.jsonl").read_text() == "hello\nworld\n"
    nowhere = evaluate(place, "--only", "size", "--results", place / "no" / "r.jsonl", code=OutputUnwritable.exit_code)
    assert "no: no such folder" in nowhere.stderr and not (place / "ran.txt").exists(), "before anything is measured"
    gguf_edit.without_head(testbed, place / "trunk.gguf")
    ran = run_apex(
        "evaluate",
        place / "trunk.gguf",
        "--plugin",
        place / "scales",
        "--only",
        "head-size",
        code=EvaluationRefused.exit_code,
    )
    assert "trunk.gguf: the file has no draft head" in ran.stderr


def test_without_only_what_cannot_be_run_is_left_out_and_said(tools: Toolset, place: Path) -> None:
    ran = evaluate(place, "--dry-run")
    assert "kld: it needs a reference model" in ran.stderr and "built-in texts" in ran.stderr
    assert "size on " in ran.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_of_it_and_leaves_no_process(
    number: signal.Signals, tools: Toolset, place: Path, heldout: Path
) -> None:
    """Inside an evaluator, whose other errors do not stop the next one."""
    command = ["evaluate", place / "model.gguf", "--plugin", place / "scales", "--results", place / "r.jsonl"]
    command += ["--only", "perplexity,size", "--text", heldout / "chat.txt"]
    with gated(tools, place / "gate", "llama-perplexity", having="-f") as gate:
        assert "failed" not in ended_at_gate(gate, command, number)
    assert not (place / "ran.txt").exists()
