"""Probes of a model: scored once, kept by what they are of, and continued where a run was cut short."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from gates import gated, make_endless
from scoring import SCORED, task_of
from waiting import until

from apex_build.errors import EvaluationRefused, ShapeUnfit, TypeUnknown
from apex_build.evaluation import probes as module
from apex_build.evaluation.probes import Probe, check_probes, probe_seconds, run_probes
from apex_build.evaluation.task import Task
from apex_build.native.toolset import Toolset
from apex_build.progress import Step

PLAIN = Probe("as it is")
LOW = Probe("experts", {"blk.2.ffn_down_exps.weight": "IQ2_XXS", "blk.2.ffn_up_exps.weight": "q3_K"})
HIGH = Probe("output", {"output.weight": "Q8_0"})


@pytest.fixture
def task(tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """With a cache of its own: what is measured here is there for no other test."""
    task = task_of("kld", tools, testbed, {"code": heldout / "code.txt", "chat": heldout / "chat.txt"})
    monkeypatch.setenv("APEX_CACHE_DIR", str(tmp_path / "cache"))
    return task


def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(probes, first chunk, chunks) of each run of the tool from now on."""
    found: list[tuple[int, int, int]] = []
    run = module._run

    def counted(*arguments: object) -> None:
        probes, chunks = arguments[1], arguments[5]
        assert isinstance(probes, list) and isinstance(chunks, range)
        found.append((len(probes), chunks.start, len(chunks)))
        run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_run", counted)
    return found


def test_what_was_scored_is_not_scored_again(task: Task, calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a probe is called and in which order they come; with more chunks, only these are scored."""
    runs = ran(monkeypatch)
    steps: list[Step] = []
    first = run_probes(replace(task, report=steps.append), [PLAIN, LOW], calibrated, chunks=4)
    assert runs == [(2, 0, 8)]
    said = [(step.done, step.total) for step in steps if step.unit == "probes"]
    assert said == [(0, 2), (1, 2), (2, 2)], "each is quantized once for both texts: the tool's own lines"
    plain, low = first
    assert plain.positions == 2 * 4 * SCORED and plain.text.tolist() == [0] * 4 + [1] * 4
    assert plain.mean.value < 1e-4 < low.mean.value and low.top1.value < plain.top1.value <= 1.0
    assert low.mean.low is None, "8 chunks of 2 texts are too few"
    runs.clear()
    renamed = Probe("other", {name: kind.lower() for name, kind in list(LOW.types.items())[::-1]})
    second = run_probes(task, [HIGH, renamed, LOW], calibrated, chunks=4)
    assert runs == [(1, 0, 8)]
    assert [score.probe.name for score in second] == ["output", "other", "experts"]
    assert second[1].kld.tolist() == second[2].kld.tolist() == low.kld.tolist()
    runs.clear()
    third = run_probes(task, [LOW, HIGH], calibrated, chunks=6)
    assert runs == [(2, 8, 4)]
    assert len(third[0].kld) == 12 and third[0].text.tolist() == [0] * 6 + [1] * 6
    assert third[0].kld[[0, 1, 2, 3, 6, 7, 8, 9]].tolist() == low.kld.tolist()
    assert (interval := third[0].mean).low is not None and 0 < interval.low < interval.value
    runs.clear()
    other = run_probes(task, [Probe("experts", {"blk.2.ffn_up_exps.weight": "q3_K"})], None, chunks=1)
    assert runs == [(1, 0, 2)] and other[0].mean.low is None, "without the imatrix nothing is known"


def test_the_time_that_is_left_counts_what_is_missing(task: Task, calibrated: Path) -> None:
    texts = {"code": task.texts["code"]}
    one = replace(task, texts=texts)
    before = probe_seconds(one, [PLAIN, LOW], calibrated, chunks=4)
    longer = probe_seconds(one, [PLAIN, LOW], calibrated, chunks=5)
    reference = one.number("chunks")
    run_probes(one, [PLAIN], calibrated, chunks=4)
    after = probe_seconds(one, [PLAIN, LOW], calibrated, chunks=4)
    if not after.measured:  # a run of less than a second is not remembered
        chunk = (longer.seconds - before.seconds) / 2
        assert before.seconds - after.seconds == pytest.approx((4 + reference) * chunk)
        assert after.seconds > 4.01 * chunk, "its tensors are quantized first"
    assert probe_seconds(one, [PLAIN], calibrated, chunks=4).seconds == 0


def test_quantizing_is_expected_once_for_all_texts(task: Task, calibrated: Path) -> None:
    def quantizing(some: Task) -> float:
        low, plain = (probe_seconds(some, [one], calibrated, chunks=4) for one in (LOW, PLAIN))
        return low.seconds - plain.seconds

    one = replace(task, texts={"code": task.texts["code"]})
    assert quantizing(task) == pytest.approx(quantizing(one)) and quantizing(one) > 0
    run_probes(task, [PLAIN, LOW], calibrated, chunks=4)
    assert probe_seconds(task, [PLAIN, LOW], calibrated, chunks=4).seconds == 0


def test_a_gpu_is_expected_to_be_quicker(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    here = probe_seconds(task, [PLAIN], None, chunks=4)
    monkeypatch.setattr(Task, "gpu", "NVIDIA H200")
    there = probe_seconds(task, [PLAIN], None, chunks=4)
    assert not here.measured and not there.measured and there.seconds < here.seconds


def test_the_time_of_short_texts_is_of_what_they_have(task: Task, tmp_path: Path) -> None:
    """Their length is known once their reference is there."""
    (tmp_path / "short.txt").write_text(task.texts["chat"].read_text("utf-8")[:1500], "utf-8")
    unequal = replace(task, texts={"short": tmp_path / "short.txt", "code": task.texts["code"]})
    assert probe_seconds(unequal, [PLAIN], None, chunks=10).seconds > 0
    (found,) = run_probes(unequal, [PLAIN], None, chunks=10)
    assert 2 <= (found.text == 0).sum() < 10 == (found.text == 1).sum()
    assert probe_seconds(unequal, [PLAIN], None, chunks=10).seconds == 0


_RUN = """
import os, sys
from pathlib import Path
from scoring import task_of
from apex_build.evaluation.probes import Probe, run_probes
from apex_build.native.toolset import find_toolset
root, testbed, cache, *texts = map(Path, sys.argv[1:])
task = task_of("kld", find_toolset(root), testbed, {text.stem: text for text in texts})
os.environ["APEX_CACHE_DIR"] = str(cache)
probes = [Probe(str(n), {f"blk.{n}.ffn_up_exps.weight": "Q2_K"}) for n in range(6)]
run_probes(task, probes, None, chunks=5)
"""


SIX = [Probe(str(n), {f"blk.{n}.ffn_up_exps.weight": "Q2_K"}) for n in range(6)]


def started(task: Task, cache: Path, root: Path | None = None) -> subprocess.Popen[str]:
    """A process that scores SIX on five chunks of each text."""
    command = [sys.executable, "-c", _RUN, root or task.tools.root, task.model.path, cache, *task.texts.values()]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    return subprocess.Popen(list(map(str, command)), env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_is_continued(how: signal.Signals, task: Task, tmp_path: Path) -> None:
    cache, files = tmp_path / "cache", "evaluation/*/probes-*.tsv"
    with (
        gated(task.tools, tmp_path / "gate", "llama-perplexity", having="--kl-divergence-probes") as gate,
        started(task, cache, gate.root) as run,
    ):
        make_endless(gate.next(run, after=0)[0], first=1)
        gate.let(1)
        until(lambda: sum(path.read_text().count("\n") for path in cache.glob(files)) > 11, run)
        run.send_signal(how)
        run.communicate(timeout=60)
    found = run_probes(task, SIX, None, chunks=5)
    kept = min(cache.glob(files))
    first = [line.split("\t") for line in kept.read_text().splitlines()[1:] if line.startswith(SIX[0].key)]
    assert len(first) == 10
    assert sorted(found[0].kld) == sorted(float(row[3]) for row in first), "taken as the first run wrote it"
    assert not list(cache.glob("evaluation/*/.*lock"))


def test_two_runs_at_once_score_a_probe_once(task: Task, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    runs = [started(task, cache) for _ in range(2)]
    for run in runs:
        assert run.wait(300) == 0, run.communicate()[1]
        assert run.stderr is not None
        run.stderr.close()
    rows = [
        tuple(line.split("\t")[:2])
        for path in cache.glob("evaluation/*/probes-*.tsv")
        for line in path.read_text().splitlines()[1:]
    ]
    assert len(rows) == len(set(rows)) == 6 * 10
    assert len(list(cache.glob("evaluation/*/*.logits"))) == 1


def test_what_the_tool_would_refuse_is_refused_before_it_is_run(
    task: Task, tools: Toolset, quantized_testbed: Path, calibrated: Path
) -> None:
    for types, error, said in (
        ({"blk.7.none.weight": "Q4_K"}, EvaluationRefused, "has no tensor blk.7.none.weight"),
        ({"output.weight": "Q4_X"}, TypeUnknown, "'Q4_X' is not a tensor type"),
        ({"blk.0.ssm_conv1d.weight": "Q4_0"}, ShapeUnfit, "a row of 4 values cannot be Q4_0"),
        ({"output.weight": "IQ2_XS"}, EvaluationRefused, "output.weight cannot be IQ2_XS without data"),
    ):
        with pytest.raises(error, match=said):
            run_probes(task, [PLAIN, Probe("bad", types)], calibrated, chunks=1)
    quantized = task_of("kld", tools, quantized_testbed, task.texts)
    with pytest.raises(EvaluationRefused, match=r"output\.weight is Q8_0, expected one of F32, F16, BF16"):
        check_probes(quantized, [Probe("a", {"output.weight": "Q4_K"})], None)


@pytest.fixture
def quantized_testbed(tools: Toolset, testbed: Path, tmp_path: Path) -> Path:
    out = tmp_path / "q8.gguf"
    command = [str(tools.tool("llama-quantize")), str(testbed), str(out), "Q8_0", "1"]
    subprocess.run(command, check=True, capture_output=True)
    return out


def test_a_line_that_was_cut_short_does_not_count(tmp_path: Path) -> None:
    header = "probe\tchunk\tn\tkld\tsame_top\n"
    (tmp_path / "probes-000000.tsv").write_text(f"{header}a\t0\t63\t0.5\t60\na\t1\t63\t1.25\t6")
    (tmp_path / "probes-000001.tsv").write_text(f"{header}a\t1\t63\t1.25\t61\nb\t0\t63\tspoilt\t1\n")
    (tmp_path / "probes-000002.tsv").write_text("probe\tch")
    assert module._read(tmp_path) == {"a": {0: (63, 0.5, 60), 1: (63, 1.25, 61)}}


def test_the_head_is_scored_where_it_is_asked_for(task: Task, calibrated: Path) -> None:
    one = replace(task, texts={"code": task.texts["code"]})
    head = Probe("head", {"blk.6.ffn_down_exps.weight": "IQ2_XXS", "blk.6.nextn.eh_proj.weight": "Q2_K"})
    plain, probed = run_probes(one, [PLAIN, head], calibrated, chunks=8, head_depth=2)
    assert plain.head.shape == probed.head.shape == (8, 2, 6)
    assert plain.kld.tolist() == probed.kld.tolist(), "the trunk is the same"
    for depth in (1, 2):
        assert 0 < plain.of_head("kld", depth).value < probed.of_head("kld", depth).value
        assert 0 < probed.of_head("agree", depth).value < 1
    tokens = probed.of_head("tokens", 2)
    assert tokens.low is not None and 1 < tokens.low < tokens.value < 3
    assert probed.of_head("tokens", 1).value == pytest.approx(1 + probed.of_head("agree", 1).value)
    (trunk,) = run_probes(one, [PLAIN], calibrated, chunks=8)
    assert trunk.head.shape == (8, 0, 6)
