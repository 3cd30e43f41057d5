"""Calibration data for quantizing: read and examined once for any number of files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.coverage import Coverage, coverage
from apex_build.gguf_model.fused import crossed
from apex_build.gguf_model.imatrix import read_imatrix
from apex_build.quantization.preflight import check_data
from apex_build.storage.digests import sha256_file


@dataclass(frozen=True)
class Data:
    """An imatrix checked against a model. `warnings`: oddities; `derived`: llama-quantize gets an examined copy."""

    path: Path
    sha256: str
    covered: Coverage
    warnings: tuple[str, ...]
    derived: bool


def read_data(imatrix: Path, model: Model) -> Data:
    """Raises ImatrixInvalid, ImatrixMismatch."""
    found, borrowed = crossed(read_imatrix(imatrix), model)
    covered = coverage(found, model)
    words = tuple(check_data(covered, borrowed))
    return Data(imatrix, sha256_file(imatrix), covered, words, bool(borrowed) or not covered.examined.sound)
