"""Test whether a draft head drafts better with hidden rows before or after the trunk's final norm, on the user's
model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from apex_build.errors import HeadRowsDoubtful
from apex_build.evaluation.head_scores import Scores, read_csv
from apex_build.evaluation.intervals import clustered_mean
from apex_build.evaluation.task import Task, ToolOptions
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.mtp_rows import CHOICES, rows_can_be_chosen, trained_on
from apex_build.native.toolset import Toolset
from apex_build.progress import Report, silent
from apex_build.storage.digests import sha256_file
from apex_build.storage.json_files import read_json, write_json
from apex_build.storage.scratch import scratch_folder

CHUNKS = 12  # as many as an interval needs, and a few more: 3060 positions for 512 tokens
_CLEARLY = 1.0  # points of agreement: less may be chance, and costs little


@dataclass(frozen=True)
class RowsCheck:
    """Agreement with the trunk at the first drafted token, in per cent, with either rows; the second less the first in
    points.

    `low` and `high` bound the difference, None if there are too few chunks for an interval.
    """

    known: str
    agreement: dict[str, float]
    difference: float
    low: float | None
    high: float | None
    positions: int
    chunks: int

    @property
    def doubtful(self) -> bool:
        return self.difference >= _CLEARLY and self.low is not None and self.low > 0

    def said(self) -> str:
        other = next(rows for rows in self.agreement if rows != self.known)
        interval = "" if self.low is None else f" [{self.low:+.2f}, {self.high:+.2f}]"
        return (
            f"the draft head agrees with the trunk at {self.agreement[self.known]:.2f} % of {self.positions} positions "
            "with "
            f"{self.known} rows, at {self.agreement[other]:.2f} % with {other} rows: {self.difference:+.2f}{interval} "
            "points"
        )


def check_rows(
    model: Model,
    text: Path,
    tools: Toolset,
    *,
    context: int,
    chunks: int = CHUNKS,
    threads: int | None = None,
    options: ToolOptions = ToolOptions(),  # noqa: B008  frozen
    report: Report = silent,
) -> RowsCheck | None:
    """Score the first chunks of `text` with both; None if no choice is known for the architecture, or the tools have
    none.

    Kept in the cache. Raises HeadRowsDoubtful if the choice known for its architecture is clearly worse, ToolFailed.
    """
    known = trained_on(model.architecture)
    if known is None or known.choice is None or not rows_can_be_chosen(tools.tool("llama-perplexity")):
        return None
    task = Task("hidden rows", model, tools, texts={"": text}, threads=threads, report=report, options=options)
    ours, others = known.choice, next(choice for choice in CHOICES if choice != known.choice)

    def make(part: Path) -> None:
        with scratch_folder("rows") as folder:
            scores = {choice: _scores(task, text, choice, context, chunks, folder) for choice in (ours, others)}
        write_json(part, asdict(compare(scores[ours], scores[others], context, (CHOICES[ours], CHOICES[others]))))

    about = {"text": sha256_file(text), "context": context, "chunks": chunks, "known": known.rows}
    found = RowsCheck(**read_json(task.kept("rows-check.json", about, make)))
    if found.doubtful:
        raise HeadRowsDoubtful(
            f"{model.path}: {found.said()}. What is known of {model.architecture}: {known.rows} ({known.source})",
            hint=f"--mtp-rows {others}, here and for apex quantize, if this head was trained on those; or --mtp-rows "
            f"{ours}",
        )
    return found


def compare(ours: Scores, others: Scores, context: int, names: tuple[str, str]) -> RowsCheck:
    """From scores on the same positions at one depth; a chunk is taken as independent."""
    difference = others.agree.astype(np.float64) - ours.agree
    chunk = (ours.pos.astype(np.int64) - 1) // context
    estimate = clustered_mean(difference, chunk).times(100)
    agreement = {name: 100 * float(scores.agree.mean()) for name, scores in zip(names, (ours, others), strict=True)}
    return RowsCheck(names[0], agreement, *estimate, positions=len(chunk), chunks=len(np.unique(chunk)))


def _scores(task: Task, text: Path, choice: str, context: int, chunks: int, folder: Path) -> Scores:
    csv = folder / f"{choice}.csv"
    arguments: list[str | Path] = [
        "-m",
        task.model.path,
        "-f",
        text,
        "-c",
        str(context),
        "-b",
        str(context),
        "--chunks",
        str(chunks),
    ]
    head: list[str | Path] = [
        "--parse-special",
        "--mtp",
        "--mtp-depth",
        "1",
        "--mtp-rows",
        choice,
        "--mtp-output-file",
        csv,
    ]
    task.run("llama-perplexity", *arguments, *head, what=f"{task.model.path.name} with {CHOICES[choice]} rows")
    return read_csv(csv)
