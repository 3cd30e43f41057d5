"""The results of a sweep: one row a point, in FOLDER/sweep.jsonl; sweep.json, its manifest, has what all share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from apex_build.errors import OutputUnwritable
from apex_build.hookspecs import Figure
from apex_build.storage.artifacts import Artifact, making
from apex_build.storage.manifest import SWEEP, Parts

RESULTS, MANIFEST = "sweep.jsonl", "sweep.json"
TABLE = "table.md"


@dataclass(frozen=True)
class Row:
    """One point. `head_data`: its imatrix has data for the draft head; `uncalibrated`: tensors were quantized without
    data.

    Bytes are of tensors, `file_bytes` of the whole file; None if nothing could be planned. A point that was not
    measured has no figures: it was refused, it failed (evaluator -> why), or its turn has not come.
    """

    identity: str
    values: Mapping[str, str]
    head_data: bool
    baseline: bool
    head_bytes: int | None
    trunk_bytes: int | None
    file_bytes: int | None
    refused: str = ""
    uncalibrated: bool = False
    figures: Mapping[str, tuple[Figure, ...]] = field(default_factory=dict)  # by evaluator
    results: Mapping[str, str] = field(default_factory=dict)  # evaluator -> identity in results.jsonl
    failed: Mapping[str, str] = field(default_factory=dict)
    imatrix: str = ""  # sha256
    file: str = ""  # the identity of the quantized file
    tools: str = ""
    apex: str = ""
    seconds: float = 0.0
    measured: str = ""  # when

    @property
    def name(self) -> str:
        return point_name(self.values, self.head_data)

    def figure(self, name: str) -> Figure | None:
        """The figure of this name over all texts or prompts, or for the only domain that an evaluator reports."""
        named = [figure for figures in self.figures.values() for figure in figures if figure.name == name]
        return next((figure for figure in named if not figure.domain), named[0] if len(named) == 1 else None)


@dataclass(frozen=True)
class SweepRecord:
    """The manifest beyond its head: the number of rows, and how many of them were measured."""

    points: int
    measured: int


def results_of(folder: Path, parts: Parts) -> Artifact:
    """`parts`: what every point's result depends on."""
    return Artifact(folder / RESULTS, SWEEP, parts, folder / MANIFEST)


def point_name(values: Mapping[str, str], head_data: bool) -> str:
    return f"{' '.join(f'{name}={value}' for name, value in values.items())}, {curve_name(head_data)}"


def curve_name(head_data: bool) -> str:
    return "with head data" if head_data else "without head data"


def as_data(row: Row) -> dict[str, Any]:
    """The row as JSON has it."""
    return asdict(row)


def read_rows(folder: Path) -> dict[str, Row]:
    """The measured rows of a folder by identity, none if it has no results yet. Raises OutputUnwritable for a damaged
    file.

    Rows from before figures said which direction is better are not among them: they are measured again.
    """
    path = folder / RESULTS
    if not path.exists():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # other line breaks may stand in a note
        rows = [_row(data) for line in lines if line and _says_better(data := json.loads(line))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OutputUnwritable(f"{path} is damaged: {error}", hint="give another folder with -o") from None
    return {row.identity: row for row in rows if row.measured}


def write_rows(results: Artifact, rows: Sequence[Row]) -> None:
    """Replace the rows, with their manifest. That the folder is this sweep's has been checked by its caller."""
    with making(results, reuse=False, replace="anything") as draft:
        text = "".join(f"{json.dumps(as_data(row), ensure_ascii=False)}\n" for row in rows)
        draft.part.write_text(text, encoding="utf-8")
        draft.done(SweepRecord(len(rows), sum(bool(row.measured) for row in rows)))


def _says_better(data: dict[str, Any]) -> bool:
    return all("better" in figure for figures in data["figures"].values() for figure in figures)


def _row(data: dict[str, Any]) -> Row:
    figures = {name: tuple(Figure(**figure) for figure in figures) for name, figures in data["figures"].items()}
    return replace(Row(**{**data, "figures": {}}), figures=figures)
