"""What the manifest of an imatrix says beyond its head: its text, and which hidden rows the draft head was run with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from apex_build.calibration.sets import CalibrationText
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.imatrix import Imatrix
from apex_build.gguf_model.mtp_rows import AUTO, trained_on

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class PartRecord:
    domain: str
    source: str
    documents: int
    bytes: int


@dataclass(frozen=True)
class TextRecord:
    name: str
    bytes: int
    sha256: str
    parts: tuple[PartRecord, ...]


@dataclass(frozen=True)
class RowsRecord:
    """`source`: who said so."""

    rows: str | None
    source: str


@dataclass(frozen=True)
class ImatrixRecord:
    """`head_rows`: of a run with the draft head; `rows_check`: what was measured of them before the run; `goal`: what
    was asked for of the text that was drawn, and reached.
    """

    text: TextRecord
    head_rows: RowsRecord | None
    rows_check: DataclassInstance | None
    goal: DataclassInstance | None = None


def text_record(text: CalibrationText) -> TextRecord:
    parts = tuple(PartRecord(part.domain, part.source, part.documents, part.n_bytes) for part in text.parts)
    return TextRecord(text.name, len(text.data), text.sha256, parts)


def rows_record(made: Imatrix, model: Model, rows: str) -> RowsRecord | None:
    if made.head_tokens is None:
        return None
    known = trained_on(model.architecture)
    source = known.source if known else f"nothing is known of {model.architecture}: the tool's default"
    return RowsRecord(made.head_rows, source if rows == AUTO else "given")
