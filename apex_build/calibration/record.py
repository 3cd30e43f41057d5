"""The manifest of an imatrix beyond its head: its text, and the draft head's hidden rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from apex_build.calibration.heldout import file_name
from apex_build.calibration.sets import CalibrationText
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.imatrix import Imatrix
from apex_build.gguf_model.mtp_rows import AUTO, trained_on

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class PartRecord:
    """A part's `origin` and `licence` according to the set, and what it gave."""

    domain: str
    source: str
    documents: int
    bytes: int
    tokens: int | None = None
    origin: str | None = None
    licence: str | None = None
    duplicates: int | None = None
    near_duplicates: int | None = None
    heldout: int | None = None  # documents


@dataclass(frozen=True)
class HeldOutRecord:
    """`files`: the names of the texts in `folder`, without .txt, and their sha256."""

    folder: str
    files: Mapping[str, str]


@dataclass(frozen=True)
class TextRecord:
    name: str
    bytes: int
    sha256: str
    parts: tuple[PartRecord, ...]
    tokens: int | None = None
    heldout: HeldOutRecord | None = None


@dataclass(frozen=True)
class RowsRecord:
    """`source`: where this is known from."""

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
    parts = tuple(
        PartRecord(
            part.domain,
            part.source,
            part.documents,
            part.n_bytes,
            part.tokens,
            part.origin or None,
            part.licence or None,
            part.duplicates or None,
            part.near_duplicates or None,
            part.heldout or None,
        )
        for part in text.parts
    )
    apart = None
    if text.heldout_folder is not None:
        files = {file_name(one.domain): sha256(one.data).hexdigest() for one in text.heldout}
        apart = HeldOutRecord(str(text.heldout_folder.absolute()), files)
    return TextRecord(text.name, len(text.data), text.sha256, parts, text.tokens, apart)


def rows_record(made: Imatrix, model: Model, rows: str) -> RowsRecord | None:
    if made.head_tokens is None:
        return None
    known = trained_on(model.architecture)
    source = known.source if known else f"nothing is known of {model.architecture}: the tool's default"
    return RowsRecord(made.head_rows, source if rows == AUTO else "given")
