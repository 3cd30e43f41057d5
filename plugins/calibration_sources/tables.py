"""Parquet files of a folder, row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from apex_build.plugin_api import CalibrationSetInvalid, Document

from .shapes import document, without_nones

_ROWS = 64  # read at once


def read_parquet(path: Path, columns: Mapping[str, str]) -> Iterator[Document]:
    """Needs pyarrow, which comes with the extra `hub`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise CalibrationSetInvalid(
            f"{path}: reading parquet needs the Python package pyarrow", hint="pip install 'apex-build[hub]'"
        ) from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield document(without_nones(row), f"{path.name}:{number}", columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationSetInvalid(f"{path}: not parquet that can be read: {_first_line(error)}") from None
    if not number:
        raise CalibrationSetInvalid(f"{path}: the file has no rows")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
