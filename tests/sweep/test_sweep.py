"""`apex sweep`: points and baseline, what is recorded and reused, what an interruption leaves, what is rejected."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_edit
import pytest
from apex_runs import SMALL, run_apex
from kills import kill_at_random, seconds_of
from waiting import until

from apex_build.errors import (
    DataMissing,
    DiskTooSmall,
    EvaluationRefused,
    ImatrixInvalid,
    ImatrixMismatch,
    OutputUnwritable,
    ParameterUnknown,
    PluginFailed,
    TypeUnknown,
)
from apex_build.evaluation.run import Inputs
from apex_build.gguf_model.model import read_model
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins
from apex_build.storage.digests import sha256_file
from apex_build.storage.locks import locked
from apex_build.storage.manifest import manifest_of
from apex_build.sweep.plan import Request, plan_sweep
from apex_build.sweep.rows import MANIFEST, RESULTS

# An evaluator that costs nothing: the sweep's own doings are what is looked at.
PLUGIN = """
import time
from pathlib import Path
from apex_build.hookspecs import Evaluator, Figure, Parameter, hookimpl

def weigh(task):
    here = Path(__file__).parent
    if (here / "slow").exists() and (here / "slow").read_text() in task.model.path.name:
        (here / "waits").touch()
        time.sleep(3600)
    if (here / "broken").exists() and task.settings["fails_on"] in task.model.path.name:
        raise ValueError("no such luck")
    with open(here / "ran.txt", "a") as file:
        file.write(task.model.path.name + " against " + task.reference.path.name + "\\n")
    size = sum(tensor.n_bytes for tensor in task.model.tensors if tensor.draft_head) / 1e4
    other = sum(tensor.n_bytes for tensor in task.reference.tensors if tensor.draft_head) / 1e4
    difference = size - other
    return [
        Figure("score", size, size - 1, size + 1, "%", 100, better="higher", paired="score.difference"),
        Figure("score.difference", difference, difference - 1, difference + 1, "points", 100),
    ]

@hookimpl
def apex_evaluators():
    return [Evaluator("weight", weigh, uses=("reference",), parameters={"fails_on": Parameter("Q3", "text")})]
"""


@pytest.fixture
def scales(tmp_path: Path) -> Path:
    (tmp_path / "scales").mkdir()
    (tmp_path / "scales" / "plugin.py").write_text(PLUGIN)
    return tmp_path / "scales"


@pytest.fixture
def command(tools: Toolset, testbed: Path, calibrated: Path, scales: Path, tmp_path: Path) -> list[object]:
    return ["sweep", testbed, "--imatrix", calibrated, "--plugin", scales, "--only", "weight", "-o", tmp_path / "out"]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sweep.jsonl").read_text().splitlines()]


def ran(scales: Path) -> list[str]:
    return (scales / "ran.txt").read_text().splitlines()


def test_both_curves_scored_and_shown(
    tools: Toolset, testbed: Path, calibrated: Path, heldout: Path, tmp_path: Path
) -> None:
    """With the evaluator that sweeps are for: paired with Q8_0, refused where the tools refuse, plotted."""
    out = tmp_path / "out"
    over, small = (
        "draft_head=Q8_0,q4_k,IQ2_XXS",
        ["--set", "draft-head.depth=1", "--set", "draft-head.context=128", "--set"],
    )
    small += ["draft-head.chunks=16", "--text", str(heldout / "reasoning.txt")]
    done = run_apex("sweep", testbed, "--over", over, "--imatrix", calibrated, *small, "-o", out, "--bound", 100)
    found = {(row["values"]["draft_head"], row["head_data"]): row for row in rows(out)}
    assert list(found) == [(kind, data) for data in (True, False) for kind in ("Q8_0", "Q4_K", "IQ2_XXS")]
    figures = {
        key: {figure["name"]: figure for figure in row["figures"]["draft-head"]}
        for key, row in found.items()
        if row["measured"]
    }
    score, paired = "depth1.agreement", "depth1.agreement.difference"
    assert all(figure[score]["n"] > 900 for figure in figures.values())
    assert figures["Q8_0", True][paired]["value"] == 0.0 == figures["Q8_0", False][paired]["value"], (
        "Q8_0 uses no calibration data"
    )
    assert figures["IQ2_XXS", True][score]["value"] < figures["Q8_0", True][score]["value"]
    difference = figures["IQ2_XXS", True][score]["value"] - figures["Q8_0", True][score]["value"]
    assert figures["IQ2_XXS", True][paired]["value"] == pytest.approx(difference)
    refused = found["IQ2_XXS", False]
    assert (
        not refused["measured"]
        and "IQ2_XXS: testbed.imatrix-without-head.gguf has no calibration data" in refused["refused"]
    )
    assert refused["head_bytes"] == found["IQ2_XXS", True]["head_bytes"] and refused["file_bytes"] is None
    assert [found[kind, False]["uncalibrated"] for kind in ("Q8_0", "Q4_K")] == [False, True]
    assert {path.name for path in out.iterdir()} == {
        "results.jsonl", "sweep.json", "sweep.jsonl", "sweep.png", "sweep.svg", "table.md",
        "testbed.imatrix-without-head.gguf",
    }  # fmt: skip
    for text in (done.stdout, (out / "table.md").read_text()):
        assert "baseline" in text and "refused" in text and "without calibration data for the head" in text
        assert (
            "with head data: the smallest head that loses less than 100 points of depth1.agreement is IQ2_XXS" in text
        )
        assert (
            "without head data: the smallest head that loses less than 100 points of depth1.agreement is Q4_K" in text
        )
    assert "[1/6] draft_head=Q8_0, with head data: depth1.agreement" in done.stderr and "s left" in done.stderr
    again = run_apex(
        "sweep", testbed, "--over", over, "--imatrix", calibrated, *small, "-o", out, "--json", "--score", "depth1.p"
    )
    assert json.loads(again.stdout)["points"] == rows(out) and again.stderr.count("(measured before)") == 5
    assert "depth1.p" in (out / "table.md").read_text()


def test_the_files_are_those_of_apex_quantize(
    command: list[object], testbed: Path, calibrated: Path, tmp_path: Path
) -> None:
    run_apex(*command, "--over", "draft_head=Q8_0,IQ2_XXS", "--with-head", "--keep")
    files = tmp_path / "out" / "files"
    found = {path.name.split("-")[2]: path for path in files.glob("*.gguf")}  # the trunk is Q8_0 in both
    assert set(found) == {"Q8_0", "IQ2_XXS"}
    for kind, path in found.items():
        assert re.fullmatch(rf"testbed-draft_head-{kind}-with-head-data-Q8_0_DRAFTHEADONLYX[A-Z]{{4}}\.gguf", path.name)
    more = ["--set", "draft_head=IQ2_XXS", "--imatrix", calibrated, "-o", tmp_path / "x.gguf"]
    run_apex("quantize", testbed, "--policy", "draft-head-only", *more)
    assert sha256_file(tmp_path / "x.gguf") == sha256_file(found["IQ2_XXS"])
    for row in rows(tmp_path / "out"):
        path = found[row["values"]["draft_head"]]
        assert row["file_bytes"] == path.stat().st_size
        assert json.loads((files / f"{path.name}.json").read_text())["identity"] == row["file"]


def test_mixtures_against_a_baseline_of_their_own(command: list[object], scales: Path, tmp_path: Path) -> None:
    over = ["--over", "draft_head.routed=Q2_K,Q3_K", "--over", "draft_head.other=Q4_K,Q6_K", "--with-head"]
    done = run_apex(*command, *over, "--policy", "compact", *SMALL, "--json")
    points = json.loads(done.stdout)["points"]
    assert [tuple(point["values"].values()) for point in points] == [
        ("Q8_0", "Q8_0"), ("Q2_K", "Q4_K"), ("Q2_K", "Q6_K"), ("Q3_K", "Q4_K"), ("Q3_K", "Q6_K"),
    ]  # fmt: skip
    assert [point["baseline"] for point in points] == [True, False, False, False, False]
    baseline = "testbed-draft_head.routed-Q8_0-draft_head.other-Q8_0-with-head-data-"
    assert all(f"against {baseline}" in line for line in ran(scales)) and len(ran(scales)) == 5
    other = tmp_path / "other"
    changed = ["--baseline", "draft_head.routed=Q2_K,draft_head.other=Q4_K", "-o", other]
    points = json.loads(run_apex(*command, *over, "--policy", "compact", *SMALL, "--json", *changed).stdout)["points"]
    assert [point["baseline"] for point in points] == [True, False, False, False], "one of the points themselves"


def test_a_sweep_of_the_trunk_against_a_reference(
    command: list[object], scales: Path, testbed: Path, tmp_path: Path
) -> None:
    points = json.loads(run_apex(*command, "--over", "trunk=Q6_K,Q4_K", "--reference", testbed, "--json").stdout)[
        "points"
    ]
    assert [(point["values"], point["head_data"], point["baseline"]) for point in points] == [
        ({"trunk": "Q6_K"}, True, False),
        ({"trunk": "Q4_K"}, True, False),
    ]
    assert points[0]["trunk_bytes"] > points[1]["trunk_bytes"] and points[0]["head_bytes"] == points[1]["head_bytes"]
    assert all(line.endswith("against testbed-f16.gguf") for line in ran(scales))
    assert "compared with testbed-f16.gguf, on the same positions" in (tmp_path / "out" / "table.md").read_text()
    assert not (tmp_path / "out" / "files").exists()


def test_more_values_are_added_and_nothing_is_done_twice(command: list[object], scales: Path, tmp_path: Path) -> None:
    run_apex(*command, "--over", "draft_head=Q8_0,Q4_K", "--with-head")
    run_apex(*command, "--over", "draft_head=Q4_K,Q6_K", "--with-head")
    assert [line.split("-")[2] for line in ran(scales)] == ["Q8_0", "Q4_K", "Q6_K"]
    assert [row["values"]["draft_head"] for row in rows(tmp_path / "out")] == ["Q8_0", "Q4_K", "Q6_K"]
    assert [line.split(" ")[1] for line in (tmp_path / "out" / "table.md").read_text().splitlines()[4:7]] == [
        "Q8_0",
        "Q4_K",
        "Q6_K",
    ]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_goes_on(how: signal.Signals, command: list[object], scales: Path, tmp_path: Path) -> None:
    wanted = [*command, "--over", "draft_head=Q8_0,Q4_K,Q3_K", "--with-head"]
    (scales / "slow").write_text("draft_head-Q4_K")
    child = subprocess.Popen([sys.executable, "-m", "apex_build", *map(str, wanted)], stderr=subprocess.PIPE, text=True)
    until((scales / "waits").exists, child)
    child.send_signal(how)
    _, said = child.communicate(timeout=60)
    assert child.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[how] and "Traceback" not in said
    assert how != signal.SIGINT or "the same command resumes from there" in said
    out = tmp_path / "out"
    assert [row["values"]["draft_head"] for row in rows(out)] == ["Q8_0"]
    (scales / "slow").unlink()
    again = run_apex(*wanted)
    assert again.stderr.count("(measured before)") == 1
    assert [row["values"]["draft_head"] for row in rows(out)] == ["Q8_0", "Q4_K", "Q3_K"]
    assert len(ran(scales)) == 3 and not (out / "files").exists()


def test_a_sweep_that_is_killed_resumes(command: list[object], scales: Path, tmp_path: Path) -> None:
    wanted, out = [*command, "--over", "draft_head=Q8_0,Q4_K,Q3_K", "--with-head"], tmp_path / "out"
    whole = [sys.executable, "-m", "apex_build", *map(str, wanted)]
    takes = seconds_of([*whole, "-o", str(tmp_path / "timed")])

    def check() -> None:
        if (out / RESULTS).exists():
            found = manifest_of(out / RESULTS, out / MANIFEST)
            assert found is not None and found.describes(out / RESULTS)
            if len(rows(out)) == 3:
                shutil.rmtree(out)

    kill_at_random(whole, takes, 7, 4, check)
    run_apex(*wanted)
    assert [row["values"]["draft_head"] for row in rows(out)] == ["Q8_0", "Q4_K", "Q3_K"]
    assert not (out / "files").exists() and not [path for path in out.iterdir() if path.name.startswith(".")]
    assert "results of a sweep" in run_apex("show", out, "--check").stdout


def test_a_point_that_failed_is_named_and_measured_when_asked_again(
    command: list[object], scales: Path, tmp_path: Path
) -> None:
    (scales / "broken").touch()
    wanted = [*command, "--over", "draft_head=Q8_0,Q3_K,Q6_K", "--with-head"]
    failed = run_apex(*wanted, code=PluginFailed.exit_code)
    assert "1 measurement failed; the first: plugin 'scales': ValueError: no such luck" in failed.stderr
    assert "failed" in failed.stdout and "Q6_K" in failed.stdout
    assert [row["values"]["draft_head"] for row in rows(tmp_path / "out")] == ["Q8_0", "Q6_K"]
    (scales / "broken").unlink()
    run_apex(*wanted)
    assert [line.split("-")[2] for line in ran(scales)] == ["Q8_0", "Q6_K", "Q3_K"]
    (scales / "broken").touch()
    other = run_apex(*wanted, "-o", tmp_path / "other", "--set", "weight.fails_on=Q8_0", code=PluginFailed.exit_code)
    assert "[2/3]" not in other.stderr, "without the baseline there is nothing to compare with"


def test_a_dry_run_writes_nothing(command: list[object], tmp_path: Path) -> None:
    ran = run_apex(*command, "--over", "draft_head=Q8_0,IQ2_XXS", "--dry-run")
    for said in (
        "Sweep, 4 points",
        "to do, the baseline",
        "refused",
        "room on the disk",
        "the trunk is quantized once",
    ):
        assert said in ran.stdout
    states = json.loads(run_apex(*command, "--over", "draft_head=Q8_0,IQ2_XXS", "--dry-run", "--json").stdout)
    assert [(state["head_data"], bool(state["refused"]), state["recorded"]) for state in states] == [
        (True, False, False), (True, False, False), (False, False, False), (False, True, False),
    ]  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_there_is_a_table_and_a_hint(command: list[object], tmp_path: Path) -> None:
    script = "import sys; sys.modules['matplotlib'] = None; from apex_build.cli import main; main(sys.argv[1:])"
    wanted = [*command, "--over", "draft_head=Q8_0,Q4_K", "--with-head"]
    done = subprocess.run([sys.executable, "-c", script, *map(str, wanted)], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "pip install 'apex-build[report]'" in done.stderr and "Q4_K" in done.stdout
    assert (tmp_path / "out" / "table.md").exists() and not (tmp_path / "out" / "sweep.png").exists()


@pytest.mark.parametrize(
    ("wrong", "code", "said"),
    [
        (["--over", "draft_had=Q8_0"], ParameterUnknown.exit_code, "has no parameter 'draft_had'; near it: draft_head"),
        (["--over", "draft_head=Q8_0,Q4_X"], TypeUnknown.exit_code, "Q4_X"),
        (["--over", "draft_head=Q8_0", "--set", "draft_head=Q4_K"], ParameterUnknown.exit_code, "both swept and set"),
        (
            ["--over", "draft_head=Q8_0", "--baseline", "trunk=Q8_0"],
            ParameterUnknown.exit_code,
            "the sweep is over draft_head",
        ),
        (
            ["--over", "draft_head=Q8_0", "--set", "weight.speed=1"],
            ParameterUnknown.exit_code,
            "'weight' has no parameter 'speed'",
        ),
        (["--over", "draft_head="], 2, "--over draft_head: expected NAME=VALUE,VALUE,..., found no value"),
        (["--over", "draft_head=,"], 2, "found no value"),
        (["--over", "Q8_0"], 2, "found no value"),
        (["--over", "draft_head=Q8_0", "--over", "draft_head=Q4_K"], 2, "--over draft_head is given twice"),
        (
            ["--over", "draft_head=Q8_0", "--score", "beauty"],
            EvaluationRefused.exit_code,
            "There are: score, score.difference",
        ),
        (["--over", "draft_head=Q8_0", "--only", "draft-head"], EvaluationRefused.exit_code, "it needs a text"),
        (
            ["--over", "draft_head=Q8_0,IQ2_XXS", "--baseline", "draft_head=IQ2_XXS", "--without-head"],
            DataMissing.exit_code,
            "the baseline, draft_head=IQ2_XXS, without head data, cannot be quantized",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_asked_wrongly(
    wrong: list[str], code: int, said: str, command: list[object], scales: Path, tmp_path: Path
) -> None:
    done = run_apex(*command, *wrong, code=code)
    assert said in done.stderr
    assert (tmp_path / "out").exists() == ("beauty" in wrong)
    assert (scales / "ran.txt").exists() == ("beauty" in wrong), (
        "a score is only known when the first point is measured"
    )


def test_a_model_without_a_head(command: list[object], testbed: Path, tmp_path: Path) -> None:
    headless = gguf_edit.without_head(testbed, tmp_path / "headless.gguf")
    done = run_apex(*[headless if part == testbed else part for part in command], "--over", "draft_head=Q8_0", code=77)
    assert (
        f"{headless} has no draft head, and the sweep is by policy 'draft-head-only', which is about it" in done.stderr
    )


def test_imatrices_that_will_not_do(
    command: list[object], calibrated: Path, headless_imatrix: Path, testbed: Path, tmp_path: Path
) -> None:
    def sweep(imatrix: Path | None, *more: object, code: int) -> str:
        at = command.index("--imatrix")
        given = [*command[:at], *(["--imatrix", imatrix] if imatrix else []), *command[at + 2 :]]
        return run_apex(*given, "--over", "draft_head=Q8_0,Q4_K", *more, code=code).stderr

    said = sweep(None, "--over", "trunk=IQ2_XXS", code=DataMissing.exit_code)
    assert "needs an imatrix, and none was given" in said and "apex calibrate" in said
    said = sweep(None, "--with-head", code=DataMissing.exit_code)
    assert "a curve with data for the draft head" in said and "--without-head" in said
    assert "no such file" in sweep(tmp_path / "gone.gguf", code=ImatrixInvalid.exit_code)
    assert "not an imatrix" in sweep(testbed, code=ImatrixInvalid.exit_code)
    said = sweep(headless_imatrix, code=DataMissing.exit_code)
    assert "has no data for the draft head" in said and "or --without-head" in said
    said = sweep(calibrated, "--imatrix-without-head", calibrated, code=ImatrixMismatch.exit_code)
    assert "it holds data for the draft head" in said
    other = _of_another_model(calibrated, tmp_path / "other.gguf")
    assert "belongs to another model" in sweep(other, code=ImatrixMismatch.exit_code)
    assert not (tmp_path / "out").exists()


def test_the_stock_imatrix_as_the_other_curve(
    command: list[object], headless_imatrix: Path, calibrated: Path, tmp_path: Path
) -> None:
    run_apex(*command, "--over", "draft_head=Q8_0,Q4_K", "--imatrix-without-head", headless_imatrix)
    found = rows(tmp_path / "out")
    assert [row["imatrix"] for row in found[:2]] == [sha256_file(calibrated)] * 2
    assert [row["imatrix"] for row in found[2:]] == [sha256_file(headless_imatrix)] * 2
    only = tmp_path / "only"
    at = command.index("--imatrix")
    run_apex(
        *command[:at],
        "--imatrix",
        headless_imatrix,
        *command[at + 2 :],
        "--over",
        "draft_head=Q4_K",
        "--without-head",
        "-o",
        only,
    )
    assert [row["head_data"] for row in rows(only)] == [False, False] and not list(only.glob("*-without-head.gguf"))


def test_a_folder_that_is_not_this_sweep_s(command: list[object], scales: Path, tmp_path: Path) -> None:
    out, wanted = tmp_path / "out", [*command, "--over", "draft_head=Q8_0"]

    def refused() -> str:
        return run_apex(*wanted, code=OutputUnwritable.exit_code).stderr

    out.write_text("a file")
    assert "is not a folder" in refused()
    out.unlink()
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert "is not empty and does not contain a sweep" in refused()
    (out / "mine.txt").unlink()
    run_apex(*wanted, "--with-head")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    done = run_apex(*wanted, "--set", "weight.fails_on=Q9", "--set", "trunk=Q6_K", code=OutputUnwritable.exit_code)
    assert "contains another sweep, which differs in: parameters, evaluators" in done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "sweep.jsonl").write_text('{"half": ')
    assert "sweep.jsonl is damaged" in refused()
    (out / "sweep.json").write_text("[]")
    assert "sweep.json is damaged" in refused()
    gone = run_apex(
        *command[:-1], tmp_path / "no" / "out", "--over", "draft_head=Q8_0", code=OutputUnwritable.exit_code
    )
    assert "no such folder" in gone.stderr


def test_another_sweep_at_work_in_the_folder(command: list[object], tmp_path: Path) -> None:
    with locked(tmp_path / "out"):
        done = run_apex(*command, "--over", "draft_head=Q8_0", code=OutputUnwritable.exit_code)
    assert "is being written by another run of apex" in done.stderr and not (tmp_path / "out").exists()


def test_the_disk_is_looked_at_before_the_first_file(
    testbed: Path, calibrated: Path, tools: Toolset, scales: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins = load_plugins((scales,))
    request = Request(
        model=read_model(testbed, plugins.role_of), policy=plugins.policy("draft-head-only"), parameters={},
        over={"draft_head": ("Q8_0", "Q6_K", "Q4_K", "Q3_K")}, imatrix=calibrated, folder=tmp_path / "out", tools=tools,
        evaluators=plugins.evaluators(), only=("weight",), inputs=Inputs(), curves=(True,),
    )  # fmt: skip
    room = plan_sweep(request).room
    assert 48_000_000 < room < 53_000_000, (
        "the trunk with the head as it is, the baseline and the largest file: 3 of 16 to 18 MB"
    )
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": room + (64 << 20)}))
    plan_sweep(request)
    with pytest.raises(DiskTooSmall, match="of other files"):
        plan_sweep(request, keep=True)


def test_what_the_values_change_is_seen_from_the_plans(
    testbed: Path, calibrated: Path, tools: Toolset, heldout: Path, tmp_path: Path
) -> None:
    """The policy printed in docs/policies.md has its own name for the head's experts, but this is still a sweep of the
    head.
    """
    page = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")
    code = page.partition("    # my-policies/plugin.py\n")[2].partition("    {# my-policies/")[0]
    template = page.partition("{# my-policies/nano-small-head.jinja")[2].partition("\n\n")[0]
    (tmp_path / "my-policies").mkdir()
    (tmp_path / "my-policies" / "plugin.py").write_text(textwrap.dedent(code))
    (tmp_path / "my-policies" / "nano-small-head.jinja").write_text(textwrap.dedent("    {#" + template))
    plugins = load_plugins((tmp_path / "my-policies",))
    # under other names: none of theirs is known
    evaluators = {f"x-{name}": replace(one, name=f"x-{name}") for name, one in plugins.evaluators().items()}
    asked = Request(
        model=read_model(testbed, plugins.role_of), policy=plugins.policy("nano-small-head"), parameters={},
        over={"routed_head": ("Q3_K", "IQ2_XXS")}, imatrix=calibrated, folder=tmp_path / "out", tools=tools,
        evaluators=evaluators, only=(), inputs=Inputs(texts={"chat": heldout / "chat.txt"}),
    )  # fmt: skip
    head = plan_sweep(asked)
    assert head.head_only and head.trunk_once and [one.name for one in head.evaluators] == ["x-draft-head"]
    assert [point.head_data for point in head.points] == [True, True, True, False, False]
    single = plan_sweep(replace(asked, over={"routed_head": ("Q8_0",)}, curves=(True,)))
    assert single.head_only and len(single.points) == 1, "seen even where there is one file"
    trunk = plan_sweep(replace(asked, policy=plugins.policy("draft-head-only"), over={"trunk": ("Q6_K", "Q4_K")}))
    assert not trunk.head_only and [one.name for one in trunk.evaluators] == ["x-kld"]
    assert [point.head_data for point in trunk.points] == [True] * 3
    with pytest.raises(EvaluationRefused, match="attention_edge: every value gives the same file"):
        plan_sweep(replace(asked, policy=plugins.policy("i-nano"), over={"attention_edge": ("3", "4")}))
    quiet = {name: replace(one, serves=()) for name, one in evaluators.items()}
    with pytest.raises(EvaluationRefused, match="no evaluator is meant for such a sweep"):
        plan_sweep(replace(asked, evaluators=quiet))


def test_imatrices_of_two_runs_have_a_trunk_each(
    testbed: Path, calibrated: Path, headless_imatrix: Path, tools: Toolset, scales: Path, tmp_path: Path
) -> None:
    plugins = load_plugins((scales,))
    derived = Request(
        model=read_model(testbed, plugins.role_of), policy=plugins.policy("draft-head-only"), parameters={},
        over={"draft_head": ("Q8_0", "Q4_K")}, imatrix=calibrated, folder=tmp_path / "out", tools=tools,
        evaluators=plugins.evaluators(), only=("weight",), inputs=Inputs(),
    )  # fmt: skip
    one, two = plan_sweep(derived), plan_sweep(replace(derived, imatrix_without_head=headless_imatrix))
    assert one.trunk_once and two.trunk_once and 16_000_000 < two.room - one.room < 20_000_000


def _of_another_model(imatrix: Path, out: Path) -> Path:
    """An imatrix with entries for layers that the testbed lacks."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(out, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["other"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for tensor in gguf.GGUFReader(imatrix).tensors:
        block, _, rest = tensor.name.removeprefix("blk.").partition(".")
        writer.add_tensor(f"blk.{6 if block == '6' else int(block) + 20}.{rest}", np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
