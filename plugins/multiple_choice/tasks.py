"""Files of multiple-choice tasks, as tools/perplexity/perplexity.cpp reads them, checked: on a wrong one the tool
crashes, or it scores what it could read. The file is rewritten for it: it also loses a last line without a line feed.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from apex_build.plugin_api import EvaluationRefused

_LARGEST = 512 << 20  # bytes; the largest of the known files has some 8 MB
_MOST_ANSWERS = 100  # the tool's own bound
_FIELD = r'((?:[^",]|"[^"]*")*)'
_WINOGRANDE = re.compile(rf"{_FIELD},{_FIELD},{_FIELD},{_FIELD},\s*([12])\s*")

_HELLASWAG_HINT = "six lines a task: the context, the number (0 to 3) of the right ending, and the four endings"
_WINOGRANDE_HINT = (
    "one task a line, no header: 0,Sarah was a better surgeon than Maria so _ got the easy cases.,Sarah,Maria,2"
)
_BINARY_HINT = "the binary format of llama-perplexity --multiple-choice: see docs/evaluation.md"


@dataclass(frozen=True)
class Tasks:
    """`content`: the tool's input, with `count` tasks. `left_out`: tasks in the file that the tool would misread."""

    count: int
    content: bytes
    answers: int  # the most that one task has
    left_out: int = 0


# A reader gets the file, and whether the model's tokenizer adds a token at the start of each text.
Reader = Callable[[Path, bool], Tasks]


def read_hellaswag(path: Path, begins: bool) -> Tasks:
    """Six lines a task: the context, the number 0 to 3 of the right ending, four endings. Raises EvaluationRefused."""
    lines = _lines(path, _HELLASWAG_HINT)
    if not lines or len(lines) % 6:
        raise EvaluationRefused(f"{path}: {len(lines)} lines, expected six for each task", hint=_HELLASWAG_HINT)
    kept = []
    for start in range(0, len(lines), 6):
        context, label, *endings = lines[start : start + 6]
        if (
            not context.strip()
            or not re.fullmatch(r"\s*[0-3]\s*", label)
            or not all(ending.strip() for ending in endings)
        ):
            what = f"line 1 {context!r:.60}, line 2 {label!r:.20}, endings {endings!r:.60}"
            raise EvaluationRefused(f"{path}:{start + 1}: not a task: {what}", hint=_HELLASWAG_HINT)
        if not _one_begins_all(endings):
            kept.append("".join(f"{line}\n" for line in (context, label.strip(), *endings)).encode())
    return _tasks(path, b"", kept, len(lines) // 6, 4)


def read_winogrande(path: Path, begins: bool) -> Tasks:
    """One task a line: number, sentence with `_`, choice, choice, answer (1 or 2). Quotation marks protect commas.

    Raises EvaluationRefused.
    """
    lines = _lines(path, _WINOGRANDE_HINT)
    kept = []
    for number, line in enumerate(lines, 1):
        fields = _WINOGRANDE.fullmatch(line)
        if not fields or "_" not in fields[2] or not fields[3].strip() or not fields[4].strip():
            raise EvaluationRefused(f"{path}:{number}: not a task: {line:.80}", hint=_WINOGRANDE_HINT)
        before, _, after = fields[2].strip('"').partition("_")
        # the tool looks one token back from the first that differs: there must be one
        if (before or begins) and not _one_begins_all([fields[3] + after, fields[4] + after]):
            kept.append(f"{line}\n".encode())
    return _tasks(path, b"", kept, len(lines), 2)


def read_multiple_choice(path: Path, begins: bool) -> Tasks:
    """Little-endian: u32 count, as many u32 positions, then each task: question, answers (one right), answers (several
    right).

    A text is a u32 length and UTF-8; answers are a u32 count, that many texts, and as many i32, 1 where right.
    (perplexity.cpp, multiple_choice_task.) Raises EvaluationRefused.
    """
    data = _bytes(path, _BINARY_HINT)
    kept, most, count, number = [], 0, 0, 0
    try:
        count, cursor = _number(data, 0)
        cursor += 4 * count  # where each task begins: only needed to read some of them
        for number in range(1, count + 1):  # noqa: B007  the error names it
            start = cursor
            question, cursor = _string(data, cursor)
            answers, labels, cursor = _answers(data, cursor)
            _, _, cursor = _answers(data, cursor)
            if not question or len(answers) < 2 or not all(answers) or 1 not in labels or not set(labels) <= {0, 1}:
                raise ValueError(f"question {question!r:.40}, answers {answers!r:.60}, labels {labels!r:.40}")
            most = max(most, len(answers))
            if not _one_begins_all(answers):
                kept.append(data[start:cursor])
    except (ValueError, struct.error) as error:
        why = "the file ends too soon" if isinstance(error, struct.error) else error
        raise EvaluationRefused(f"{path}: task {number} of {count} cannot be read: {why}", hint=_BINARY_HINT) from None
    positions, position = [], 4 + 4 * len(kept)
    for task in kept:
        positions.append(position)
        position += len(task)
    return _tasks(path, struct.pack(f"<{len(kept) + 1}I", len(kept), *positions), kept, count, most)


def _tasks(path: Path, head: bytes, kept: Sequence[bytes], count: int, answers: int) -> Tasks:
    if not kept:
        raise EvaluationRefused(
            f"{path}: none of its {count} tasks can be scored", hint="give the benchmark's own file"
        )
    return Tasks(len(kept), head + b"".join(kept), answers, count - len(kept))


def _one_begins_all(choices: Sequence[str]) -> bool:
    """The tool compares from the first token that differs, and would read past the end of a choice that begins all
    others.
    """
    shortest = min(choices, key=len)
    return all(choice.startswith(shortest) for choice in choices)


def _number(data: bytes, cursor: int) -> tuple[int, int]:
    return int(struct.unpack_from("<I", data, cursor)[0]), cursor + 4


def _string(data: bytes, cursor: int) -> tuple[str, int]:
    size, cursor = _number(data, cursor)
    if cursor + size > len(data):
        raise ValueError(f"a text of {size} bytes does not end in the file")
    return data[cursor : cursor + size].decode("utf-8"), cursor + size


def _answers(data: bytes, cursor: int) -> tuple[list[str], tuple[int, ...], int]:
    count, cursor = _number(data, cursor)
    if count > _MOST_ANSWERS:
        raise ValueError(f"{count} answers, where {_MOST_ANSWERS} are the most")
    answers = []
    for _ in range(count):
        answer, cursor = _string(data, cursor)
        answers.append(answer)
    return answers, struct.unpack_from(f"<{count}i", data, cursor), cursor + 4 * count


def _lines(path: Path, hint: str) -> list[str]:
    """Lines as the tool counts them, without empty ones at the end."""
    try:
        text = _bytes(path, hint).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluationRefused(f"{path}: not UTF-8 text: {error}", hint=hint) from None
    return [line.removesuffix("\r") for line in text.rstrip().split("\n")] if text.strip() else []


def _bytes(path: Path, hint: str) -> bytes:
    try:
        if (size := path.stat().st_size) > _LARGEST:
            raise EvaluationRefused(f"{path}: {size} bytes are too many for a file of tasks", hint=hint)
        return path.read_bytes()
    except OSError as error:
        raise EvaluationRefused(f"{path}: cannot be read: {error.strerror}", hint=hint) from None
