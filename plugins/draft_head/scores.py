"""Scores of a draft head at each position of a text: made by llama-perplexity --mtp, kept as NumPy arrays."""

from __future__ import annotations

import zipfile
from dataclasses import fields
from pathlib import Path

import numpy as np

from apex_build.plugin_api import (
    AUTO_ROWS,
    HEAD_ROWS,
    ApexError,
    CalibrationSetInvalid,
    EvaluationRefused,
    HeadScores,
    ParameterUnknown,
    Task,
    ToolFailed,
    head_rows_arguments,
    head_rows_used,
    read_head_scores,
    refuse_short,
)

# bytes of the tool's CSV for a position and depth: 46 on the test model, and long positions and tokens have more digits
_LINE = 64


def scored(task: Task, domain: str, *, of_reference: bool = False) -> HeadScores:
    """Scores of the task's model, or of its reference, over the text of a domain; made once for all that ask.

    Raises CalibrationSetInvalid for a text that is too short, ToolFailed naming the model, ParameterUnknown.
    """
    model = task.reference if of_reference else task.model
    assert model is not None
    text, depth, context = task.texts[domain], task.number("depth"), task.number("context")
    if not 1 <= depth <= context - 1 - context // 2:
        raise ParameterUnknown(
            f"draft-head.depth={depth} does not fit draft-head.context={context}: "
            f"expected from 1 to {max(1, context - 1 - context // 2)}, the scored positions of a chunk"
        )

    rows = head_rows_arguments(rows_choice(task), model.architecture, task.tools.tool("llama-perplexity"))

    def make(part: Path) -> None:
        csv = part.with_name(f"{part.name}.csv")
        arguments: list[str | Path] = [
            "-m",
            model.path,
            "-f",
            text,
            "-c",
            str(context),
            "--mtp",
            "--mtp-depth",
            str(depth),
            "--mtp-output-file",
            csv,
        ]
        roomy = task.needing_room(
            part.parent,
            lambda chunks: chunks * (context - 1 - context // 2) * depth * _LINE,
            lambda chunks: f"the file with the scores of the draft head over {chunks} chunks",
        )
        chunks = ["--chunks", str(task.number("chunks"))] if task.number("chunks") else []
        special = ["--parse-special"] if task.settings["parse_special"] else []
        try:
            ran = roomy.run(
                "llama-perplexity",
                *arguments,
                *rows,
                *chunks,
                *special,
                what=f"{model.path.name} on {domain or text.name}",
            )
            scores = read_head_scores(csv)
            used = next(filter(None, map(head_rows_used, reversed(ran.lines))), None)
            if rows and used != HEAD_ROWS[rows[1]]:
                raise ToolFailed(
                    f"llama-perplexity was asked for {HEAD_ROWS[rows[1]]} rows of the draft head and took {used}"
                )
        except ToolFailed as error:
            raise _named(error, model.path, text) from None
        finally:
            csv.unlink(missing_ok=True)
        with part.open("wb") as file:
            np.savez_compressed(file, **{field.name: getattr(scores, field.name) for field in fields(HeadScores)})

    about = {
        "text": task.identity_of_text(domain),
        "context": context,
        "chunks": task.number("chunks"),
        "depth": depth,
        "parse_special": bool(task.settings["parse_special"]),
        "rows": rows,
    }
    return _load(task.kept("draft-head.npz", about, make, of=model))


def rows_choice(task: Task) -> str:
    """Raises ParameterUnknown."""
    choice = str(task.settings["rows"])
    if choice not in (AUTO_ROWS, *HEAD_ROWS):
        raise ParameterUnknown(f"{task.evaluator}.rows takes {AUTO_ROWS}, {' or '.join(HEAD_ROWS)}, not '{choice}'")
    return choice


def check_same_positions(scores: HeadScores, reference: HeadScores, task: Task, domain: str) -> None:
    """Raises EvaluationRefused if the two were not scored on the same tokens, and so cannot be paired."""
    assert task.reference is not None
    for name in ("pos", "depth", "token"):
        ours, theirs = getattr(scores, name), getattr(reference, name)
        if len(ours) != len(theirs) or (ours != theirs).any():
            first = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
            where = f", the first of which differ in {name} at {first + 1}" if first is not None else ""
            raise EvaluationRefused(
                f"{task.model.path} and {task.reference.path} were not scored on the same positions of "
                f"{task.texts[domain]}: "
                f"{len(ours)} and {len(theirs)} scores{where}",
                hint="the two read the text differently: give a reference of the same checkpoint and tokenizer",
            )


def _load(path: Path) -> HeadScores:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return HeadScores(**{field.name: arrays[field.name] for field in fields(HeadScores)})
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise EvaluationRefused(
            f"{path}: damaged in the cache: {error}", hint=f"rm {path}, then run the command again"
        ) from None


def _named(error: ToolFailed, model: Path, text: Path) -> ApexError:
    """The error with the file and the text, which the tool does not name."""
    try:
        refuse_short(error.message.split("\n"), text)
    except CalibrationSetInvalid as short:
        return short
    return ToolFailed(f"{model}: {error.message}", hint=error.hint)
