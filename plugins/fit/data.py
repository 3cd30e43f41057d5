"""The request to the verb `fit`, and its results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from apex_build.plugin_api import Data, Model, PaceEstimate, PolicyTask, Value

from . import budget, errors, measure
from .measurement import Measurement

NAME = "fit"
CHECKED = 8  # chunks of each text, for the check


@dataclass(frozen=True)
class Asked:
    """The user's options. Exactly one of `size`, `bits`, `gpu` and `curve` is set."""

    imatrix: Path
    texts: tuple[Path, ...] = ()
    out: Path | None = None
    measurement: Path | None = None
    size: int | None = None
    bits: float | None = None
    gpu: str | None = None
    context: int = 8192
    curve: tuple[int, ...] = ()
    settings: Mapping[str, Value] = field(default_factory=dict, hash=False)
    beside: bool = True  # score the other policies too
    tiers: Mapping[str, str] = field(default_factory=dict, hash=False)  # parameters of the other policies
    chunks: int = measure.CHUNKS
    probe_budget: int = 0
    check_chunks: int = CHECKED
    sample: int = errors.SAMPLE
    refine: int = 0
    head_score: bool = True
    threads: int | None = None
    force: bool = False


@dataclass(frozen=True)
class Preview:
    """What is known before measuring: sizes, and how long each part takes."""

    model: Model
    data: Data
    plan: measure.Plan
    task: PolicyTask
    targets: tuple[int, ...]
    smallest: int
    largest: int
    at: Path
    known: Measurement | None
    warnings: tuple[str, ...]
    expected: measure.Expected
    room: tuple[str, ...] = ()  # how the GPU's memory is used

    def lines(self) -> list[str]:
        said = [*self.room]
        if self.known is not None:
            said.append(f"measured before: {self.at}")
        else:
            expected, texts = self.expected, len(self.plan.texts.probed)
            said.append(f"errors of {len(self.plan.work.types)} tensors: {_words(expected.errors)}")
            many = f"{expected.probes} probes of {self.plan.chunks} chunks from each of {texts} texts"
            said.append(f"{many}: {_words(expected.probing)}")
            if expected.errors.seconds and expected.probing.seconds:
                said.append(f"together: {expected.sum}")
        sizes = ", ".join(budget.shown(target) for target in self.targets)
        between = f"(possible: {budget.shown(self.smallest)} to {budget.shown(self.largest)})"
        return [*said, f"target: {sizes} {between}", *(f"warning: {one}" for one in self.warnings)]

    def json(self) -> dict[str, Any]:
        return {
            "targets": list(self.targets),
            "smallest": self.smallest,
            "largest": self.largest,
            "measured_before": self.known is not None,
            "errors": str(self.expected.errors) if self.expected.errors.seconds else "",
            "probes": self.expected.probes,
            "probing": str(self.expected.probing) if self.expected.probing.seconds else "",
            "measurement": str(self.at),
            "gpu": list(self.room),
            "warnings": list(self.warnings),
        }


def _words(expected: PaceEstimate) -> str:
    return str(expected) if expected.seconds else "measured before"


@dataclass(frozen=True)
class Row:
    """A file, written or only planned: its divergence as predicted, and as measured on text that no probe used."""

    name: str
    target: int | None
    n_bytes: int
    bits: float
    predicted: float | None
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    types: Mapping[str, str] = field(default_factory=dict, hash=False, repr=False)
    agreement: float | None = None  # predicted change of the draft head's agreement, in points

    def json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "types"}


@dataclass(frozen=True)
class Made:
    path: Path
    n_bytes: int
    reused: bool
    lines: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True)
class Done:
    rows: tuple[Row, ...]
    tiers: tuple[Row, ...]
    measurement: Path
    made: Made | None
    plots: tuple[Path, ...]
    warnings: tuple[str, ...]
