"""llama-perplexity over one text in chunks, part of the plugin API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from apex_build.errors import CalibrationSetInvalid, ParameterUnknown, ToolFailed
from apex_build.evaluation.task import Task
from apex_build.native.output import planned as chunks_planned
from apex_build.native.scores import text_too_short

T = TypeVar("T")

LEAST_CONTEXT = 8
_SHOWN = 5  # lines


def scored_positions(context: int) -> int:
    """Scored positions of a chunk: its second half, without the last one, whose successor is in the next chunk."""
    return context - 1 - context // 2


def check_context(task: Task) -> int:
    """The setting. Raises ParameterUnknown."""
    context = task.number("context")
    if context < LEAST_CONTEXT:
        raise ParameterUnknown(f"{task.evaluator}.context={context}: expected at least {LEAST_CONTEXT} tokens")
    return context


def text_arguments(task: Task, text: Path) -> list[str | Path]:
    chunks = ["--chunks", str(task.number("chunks"))] if task.number("chunks") else []
    special = ["--parse-special"] if task.settings["parse_special"] else []
    return ["-f", text, "-c", str(task.number("context")), *chunks, *special]


def run(
    task: Task,
    model: Path,
    text: Path,
    arguments: Sequence[str | Path],
    what: str,
    read: Callable[[tuple[str, ...]], T | None],
) -> T:
    """Run llama-perplexity and `read` its lines, all of which this project's build prints (patch 0004).

    It exits with 0 even if it refuses a text. Raises CalibrationSetInvalid (the text is too short), ToolFailed.
    """
    try:
        ran = task.run("llama-perplexity", "-m", model, *arguments, what=what)
    except ToolFailed as error:
        raise ToolFailed(f"{model}: {error.message}", hint=error.hint) from None
    refuse_short(ran.lines, text)
    if (found := read(ran.lines)) is not None:
        return found
    said = "".join(f"\n  | {line[:200]}" for line in [line for line in ran.lines if line.strip()][-_SHOWN:])
    raise ToolFailed(
        f"{model}: llama-perplexity exited without printing its result{said}",
        hint="apex build, for tools with this project's patches",
    )


def planned(lines: Sequence[str]) -> tuple[int, int] | None:
    """(chunks, tokens in a chunk) that the tool planned."""
    found = next((found for line in lines if (found := chunks_planned(line))), None)
    return (found.chunks, found.context) if found else None


def refuse_short(lines: Sequence[str], text: Path) -> None:
    """Raises CalibrationSetInvalid if the tool says that the text is too short: it does not name it."""
    if found := text_too_short(lines):
        needed, has = found
        raise CalibrationSetInvalid(
            f"{text}: the text is too short: expected at least {needed} tokens, two chunks; found {has or 'fewer'}",
            hint="give more text, or a smaller context",
        )
