"""The references of several texts as one file: which chunk lies where, and that a text scores as it does alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scoring import CONTEXT, SCORED, task_of

from apex_build.errors import DiskTooSmall
from apex_build.evaluation import joined
from apex_build.evaluation.joined import distinct_texts, first_chunks, joined_reference, known_chunks, places
from apex_build.evaluation.probes import Probe, run_probes
from apex_build.evaluation.reference import HEAD, logits_bytes, reference_logits
from apex_build.evaluation.task import Task, ToolOptions
from apex_build.native.toolset import Toolset
from apex_build.progress import Step

PLAIN = Probe("as it is")
LOW = Probe("experts", {"blk.2.ffn_down_exps.weight": "Q2_K", "blk.2.ffn_up_exps.weight": "Q3_K"})
VOCABULARY = 2048


@pytest.fixture
def task(tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """A short text and two longer ones, and an empty cache."""
    short = tmp_path / "short.txt"
    short.write_text((heldout / "chat.txt").read_text("utf-8")[:1500], "utf-8")
    texts = {"code": heldout / "code.txt", "short": short, "reasoning": heldout / "reasoning.txt"}
    task = task_of("kld", tools, testbed, texts, testbed, chunks=6)
    monkeypatch.setenv("APEX_CACHE_DIR", str(tmp_path / "cache"))
    return task


def files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.glob("cache/evaluation/*/*") if ".logits" in path.name)


def test_the_first_chunks_of_each_text_come_first() -> None:
    for chunks in ((3,), (2, 5, 3), (4, 4, 4, 4), (1, 7)):
        order = places(chunks)
        assert sorted(order) == [(text, number) for text, many in enumerate(chunks) for number in range(many)]
        for few in range(1, 9):
            first = order[: first_chunks(chunks, few)]
            assert sorted(first) == sorted(one for one in order if one[1] < few)
            assert first == places([min(many, few) for many in chunks]), "and at the places of a smaller reference"


def test_each_chunk_keeps_its_tokens_and_its_bytes(task: Task, tmp_path: Path) -> None:
    alone = {domain: reference_logits(task, domain).read_bytes() for domain in task.texts}
    found = joined_reference(task)
    order = sorted(task.texts, key=task.identity_of_text)
    heads = [HEAD.unpack_from(alone[domain]) for domain in order]
    assert found.chunks == tuple(head[3] for head in heads) == known_chunks(task)
    assert sorted(found.chunks)[1:] == [6, 6] and 2 <= min(found.chunks) < 6
    data, total = found.logits.read_bytes(), sum(found.chunks)
    assert HEAD.unpack_from(data) == (b"_logits_", CONTEXT, VOCABULARY, total)
    assert len(data) == logits_bytes(total, CONTEXT, VOCABULARY)
    tokens, scores = 4 * CONTEXT, logits_bytes(1, CONTEXT, VOCABULARY) - HEAD.size - 4 * CONTEXT
    for line, (text, number) in enumerate(places(found.chunks)):
        own, many = alone[order[text]], found.chunks[text]
        for size, here, there in ((tokens, 0, 0), (scores, total * tokens, many * tokens)):
            piece = data[HEAD.size + here + line * size :][:size]
            assert piece == own[HEAD.size + there + number * size :][:size]
    assert files(tmp_path) == ["joined.logits", *["reference.logits"] * 3], "another evaluation's files stay"


def test_texts_score_together_as_they_do_alone(task: Task) -> None:
    """To the last bit if each batch of the tool holds one chunk. With several, how many there are in it changes the
    order in which a CPU adds.
    """
    one = replace(task, options=ToolOptions(arguments=("--batch-size", str(CONTEXT))))
    for depth in (0, 2):
        together = run_probes(one, [PLAIN, LOW], None, chunks=4, head_depth=depth)
        alone = [
            run_probes(replace(one, texts={domain: text}), [PLAIN, LOW], None, chunks=4, head_depth=depth)
            for domain, text in one.texts.items()
        ]
        for number, score in enumerate(together):
            parts = [scores[number] for scores in alone]
            assert score.text.tolist() == [text for text, part in enumerate(parts) for _ in part.kld]
            for name in ("n", "kld", "same_top", "head"):
                assert np.array_equal(getattr(score, name), np.concatenate([getattr(part, name) for part in parts]))
            assert score.head.shape == (len(score.kld), depth, 6)
    several = run_probes(task, [PLAIN, LOW], None, chunks=4)
    for few, many in zip(together, several, strict=True):
        assert few.kld / SCORED == pytest.approx(many.kld / SCORED, abs=1e-4)


def test_neither_order_nor_names_of_texts_count(task: Task) -> None:
    before = run_probes(task, [LOW], None, chunks=3)[0]
    steps: list[Step] = []
    code, short, reasoning = task.texts.values()
    texts = {"a": reasoning, "b": short, "c": reasoning, "d": code}
    after = run_probes(replace(task, texts=texts, report=steps.append), [LOW], None, chunks=3)[0]
    assert steps == []
    of = [before.kld[before.text == text].tolist() for text in range(3)]
    assert [after.kld[after.text == text].tolist() for text in range(4)] == [of[2], of[1], of[2], of[0]]


def test_a_larger_reference_keeps_what_was_scored(task: Task) -> None:
    few = run_probes(task, [LOW], None, chunks=6)[0]
    steps: list[Step] = []
    longer = replace(task, settings={**task.settings, "chunks": 9}, report=steps.append)
    many = run_probes(longer, [LOW], None, chunks=9)[0]
    for text in range(3):
        assert many.kld[many.text == text][:6].tolist() == few.kld[few.text == text].tolist()
    assert len(many.kld) == len(few.kld) + 2 * 3
    assert [(step.done, step.total) for step in steps if step.unit == "probes"] == [(0, 1), (1, 1)]


def test_only_the_joined_file_is_left(task: Task, tmp_path: Path) -> None:
    one = replace(task, texts={"code": task.texts["code"]})
    run_probes(one, [PLAIN], None, chunks=1)
    assert files(tmp_path) == ["reference.logits"], "nothing to join"
    run_probes(task, [PLAIN], None, chunks=1)
    assert files(tmp_path) == ["joined.logits", "reference.logits"], "that of the single text was read, and stays"
    assert len(list(tmp_path.glob("cache/evaluation/*/made-from.json"))) == 2
    joined._part(task, "short", distinct_texts(task))  # as after a kill just before it is removed
    assert files(tmp_path) == ["joined.logits", "reference.logits", "reference.logits"]
    run_probes(task, [PLAIN], None, chunks=1)
    assert files(tmp_path) == ["joined.logits", "reference.logits"]


_JOIN = """
import os, sys, time
from pathlib import Path
from scoring import task_of
from apex_build.evaluation import joined
from apex_build.native.toolset import find_toolset
root, testbed, cache, *texts = map(Path, sys.argv[1:])
task = task_of("kld", find_toolset(root), testbed, {text.stem: text for text in texts}, testbed, chunks=6)
os.environ["APEX_CACHE_DIR"] = str(cache)
copy, copied = joined._copy, []
def held(*arguments):
    copy(*arguments)
    copied.append(1)
    if len(copied) == 3:
        print("copied", flush=True)
        time.sleep(3600)
joined._copy = held
joined.joined_reference(task)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_joining_that_is_ended_leaves_nothing_half(how: signal.Signals, task: Task, tmp_path: Path) -> None:
    whole = joined_reference(task)
    data = whole.logits.read_bytes()
    whole.logits.unlink()
    command = [sys.executable, "-c", _JOIN, task.tools.root, task.model.path, tmp_path / "cache", *task.texts.values()]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    run = subprocess.Popen(
        list(map(str, command)), env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "copied\n"
    run.send_signal(how)
    run.communicate(timeout=60)
    assert not whole.logits.exists() and files(tmp_path).count("reference.logits") == 3
    assert known_chunks(task) is None
    steps: list[Step] = []
    assert joined_reference(replace(task, report=steps.append)) == whole
    assert whole.logits.read_bytes() == data
    assert {step.task for step in steps} == {"kld: joining the references of 3 texts"}, "none was made again"
    assert files(tmp_path) == ["joined.logits"]


def test_a_disk_too_small_for_the_joined_file(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = joined_reference(task).chunks
    for path in tmp_path.glob("cache/evaluation/*/joined.logits"):
        path.unlink()
    room = logits_bytes(sum(chunks), CONTEXT, VOCABULARY) + (64 << 20) - 1
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: type("Usage", (), {"free": room}))
    with pytest.raises(DiskTooSmall, match="the file with the log-probabilities of 3 texts") as caught:
        joined_reference(task)
    assert caught.value.hint == "fewer positions (--set kld.chunks=1), or APEX_CACHE_DIR=FOLDER on a larger disk"
    with pytest.raises(DiskTooSmall) as caught:
        joined_reference(replace(task, chunks_option="--chunks"))
    assert str(caught.value.hint).startswith("fewer positions (--chunks), or ")
    assert files(tmp_path) == ["reference.logits"] * 3, "what was made is there for the next run"
    room += 1
    steps: list[Step] = []
    assert joined_reference(replace(task, report=steps.append)).chunks == chunks
    assert all("joining" in step.task for step in steps)
