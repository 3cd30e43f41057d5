"""The multiple-choice evaluators on the testbed, with valid files in each of the three formats, and invalid ones."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from apex_build.errors import EvaluationRefused, ToolFailed
from apex_build.evaluation.run import Inputs, Work
from apex_build.hookspecs import Figure

WorkOf = Callable[..., Work]


@pytest.fixture
def sentences(heldout: Path) -> list[tuple[str, str]]:
    """Held-out text in two halves: the second half is a far more likely continuation than its shuffled words."""
    text = (heldout / "chat.txt").read_text() + (heldout / "reasoning.txt").read_text()
    lines = [
        line
        for line in text.splitlines()
        if 60 < len(line) < 120 and "," not in line and line.isascii() and line.count(" ") > 9
    ]
    halves = [line.split() for line in dict.fromkeys(lines)]
    found = [(" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])) for words in halves]
    return [pair for pair in found if "_" not in "".join(pair) and '"' not in "".join(pair)][:24]


def wrong(ending: str, number: int) -> str:
    words = ending.split()
    random.Random(number).shuffle(words)
    return f"{number + 1} " + " ".join(words)


def hellaswag(sentences: Sequence[tuple[str, str]]) -> bytes:
    lines = []
    for number, (context, ending) in enumerate(sentences):
        endings = [wrong(ending, place) for place in range(4)]
        endings[number % 4] = ending
        lines += [context, str(number % 4), *endings]
    return "\n".join(lines).encode()  # no line feed at the end, which must not lose the last task


def winogrande(sentences: Sequence[tuple[str, str]]) -> bytes:
    rows = []
    for number, (context, ending) in enumerate(sentences):
        *before, word = context.split()
        choices = [word, f"{number}zq"] if number % 2 else [f"{number}zq", word]
        text = f"{' '.join(before)} _ {ending}"
        rows.append(f'{number},"{text}",{choices[0]},{choices[1]},{2 - number % 2}\r\n')
    return "".join(rows).encode().removesuffix(b"\r\n")


def binary(sentences: Sequence[tuple[str, str]], answers: int = 5) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<I", len(value.encode())) + value.encode()

    tasks = []
    for number, (question, answer) in enumerate(sentences):
        choices = [wrong(answer, place) for place in range(answers)]
        choices[number % answers] = answer
        labels = [int(place == number % answers) for place in range(answers)]
        one_right = struct.pack("<I", answers) + b"".join(map(text, choices)) + struct.pack(f"<{answers}i", *labels)
        tasks.append(text(question) + one_right + struct.pack("<I", 0))
    starts = [4 + 4 * len(tasks) + sum(map(len, tasks[:number])) for number in range(len(tasks))]
    return struct.pack(f"<{len(tasks) + 1}I", len(tasks), *starts) + b"".join(tasks)


def score(work_of: WorkOf, name: str, path: Path, **settings: str) -> Figure:
    work = work_of(name, Inputs(data={name: path}), **settings)
    (figure,) = work.evaluator.evaluate(work.task)
    assert figure.name == "accuracy" and figure.unit == "%"
    return figure


@pytest.mark.parametrize(
    ("name", "write"),
    [("hellaswag", hellaswag), ("winogrande", winogrande), ("mmlu", binary), ("arc", binary), ("truthfulqa", binary)],
)
def test_right_answers_are_found(
    work_of: WorkOf, tmp_path: Path, sentences: list[tuple[str, str]], name: str, write: Callable[..., bytes]
) -> None:
    """With misread labels or choices it would find one in two or one in five: 11 of 24 by chance at most once in 50."""
    path = tmp_path / "tasks"
    path.write_bytes(write(sentences))
    figure = score(work_of, name, path)
    assert figure.n == 24 and (figure.value or 0) >= (70 if name == "winogrande" else 45) and not figure.note
    assert figure.low is not None and figure.high is not None and figure.low < (figure.value or 0) <= figure.high
    fewer = score(work_of, name, path, tasks="7")
    assert fewer.n == 7 and (fewer.low or 0) < figure.low


def test_the_interval_is_wilsons(work_of: WorkOf, tmp_path: Path, sentences: list[tuple[str, str]]) -> None:
    """llama-perplexity prints the same interval for HellaSwag: [20.6549%, 100.0000%] for one of one."""
    path = tmp_path / "tasks"
    path.write_bytes(hellaswag([("He opened the door and", "went into the room.")]))
    figure = score(work_of, "hellaswag", path)
    bounds = {100: (20.6549, 100), 0: (0, 79.3451)}  # right or wrong
    assert figure.n == 1 and figure.value in bounds
    assert (figure.low, figure.high) == pytest.approx(bounds[int(figure.value)], abs=1e-4)


def test_tasks_that_the_tool_misreads_are_left_out_and_counted(
    work_of: WorkOf, tmp_path: Path, sentences: list[tuple[str, str]]
) -> None:
    """An ending that is a prefix of all others, and a gap at the very start: the tool would read past the end, or spoil
    the next task.
    """
    path = tmp_path / "tasks"
    path.write_bytes(hellaswag(sentences) + b"\nThe number is\n0\n5\n50\n500\n5000\n")
    figure = score(work_of, "hellaswag", path)
    assert figure.n == 24 and "1 tasks left out" in figure.note
    path.write_bytes(b"0,_ ran away because the cat was too large to go in.,dog,cat,1\n" + winogrande(sentences))
    figure = score(work_of, "winogrande", path)
    assert figure.n == 24 and "1 tasks left out" in figure.note
    path.write_bytes(b"0,_ ran away.,dog,cat,1\n")
    with pytest.raises(EvaluationRefused, match="none of its 1 tasks can be scored"):
        score(work_of, "winogrande", path)


def test_a_task_that_does_not_fit(work_of: WorkOf, tmp_path: Path, sentences: list[tuple[str, str]]) -> None:
    path = tmp_path / "tasks"
    path.write_bytes(hellaswag([*sentences[:3], ("Tell me more. " * 400, "And so on.")]))
    with pytest.raises(ToolFailed, match="does not fit in the context window") as caught:
        score(work_of, "hellaswag", path, context="512")
    assert caught.value.hint == "--set hellaswag.context=2048"
    assert score(work_of, "hellaswag", path, context="4096").n == 4


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("hellaswag", b"", "0 lines, expected six for each task"),
        ("hellaswag", b"a\n1\nb\nc\nd\n", "5 lines, expected six"),
        ("hellaswag", b"a\n4\nb\nc\nd\ne\n", r"tasks:1: not a task"),
        ("hellaswag", b"a\nx\nb\nc\nd\ne\n", r"tasks:1: not a task"),
        ("hellaswag", b"a\n1\nb\n\nd\ne\n", r"tasks:1: not a task"),
        ("hellaswag", b"a\xff\n1\nb\nc\nd\ne\n", "not UTF-8"),
        ("winogrande", b"index,sentence,option1,option2,answer\n", r"tasks:1: not a task: index,"),
        ("winogrande", b"0,The _ is big,dog,cat,1\n\n1,The _ is big,dog,cat,3\n", r"tasks:2: not a task"),
        ("winogrande", b"0,The dog is big,dog,cat,1\n", r"tasks:1: not a task"),
        ("winogrande", b'{"sentence": "The _"}\n', r"tasks:1: not a task"),
        ("mmlu", b"", "task 0 of 0 cannot be read"),
        ("mmlu", b"\x01\x00\x00\x00", "task 1 of 1 cannot be read"),
        ("arc", b"A text, and no binary file of tasks", "task 1 of 1702109249 cannot be read: the file ends too soon"),
        ("truthfulqa", b"\x00\x00\x00\x00", "none of its 0 tasks"),
    ],
)
def test_files_of_another_format(work_of: WorkOf, tmp_path: Path, name: str, content: bytes, says: str) -> None:
    """Rejected before a tool starts; the error names the expected format."""
    path = tmp_path / "tasks"
    path.write_bytes(content)
    with pytest.raises(EvaluationRefused, match=says) as caught:
        score(work_of, name, path)
    assert str(path) in caught.value.message and caught.value.hint


def test_damaged_binary_files(work_of: WorkOf, tmp_path: Path, sentences: list[tuple[str, str]], testbed: Path) -> None:
    """Cut anywhere, or with a wrong count: rejected without a crash."""
    whole = binary(sentences[:2])
    path = tmp_path / "tasks"
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(EvaluationRefused):
            score(work_of, "mmlu", path)
    labels = binary(sentences[:1], answers=2)
    for damaged in (
        labels[:-12] + struct.pack("<3i", 0, 0, 0),
        labels.replace(struct.pack("<2i", 1, 0), struct.pack("<2i", 7, 1)),
    ):
        path.write_bytes(damaged)
        with pytest.raises(EvaluationRefused, match="task 1 of 1 cannot be read"):
            score(work_of, "mmlu", path)
    with pytest.raises(EvaluationRefused, match="cannot be read"):
        score(work_of, "mmlu", testbed)
    with pytest.raises(EvaluationRefused, match="cannot be read: Is a directory"):
        work = work_of("mmlu")
        work.evaluator.evaluate(replace(work.task, data=tmp_path))


def test_without_a_file(work_of: WorkOf) -> None:
    work = work_of("truthfulqa")
    assert work.evaluator.needs == ("data",)
    with pytest.raises(EvaluationRefused, match="truthfulqa needs its data file") as caught:
        work.evaluator.evaluate(work.task)
    assert caught.value.hint == "--data truthfulqa=FILE"
