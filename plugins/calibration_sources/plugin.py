"""Calibration sources: conversations in JSON lines, files of a folder, the interpreter's standard library, and Hugging
Face datasets.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apex_build.plugin_api import CalibrationSetInvalid, Document, Source, hookimpl

from .hub import OPTIONS, pin_datasets, read_datasets
from .shapes import COLUMNS, document, in_pieces
from .tables import read_parquet

APEX_API = 3

_PIECE = 6000  # characters of a long file in one piece


@hookimpl
def apex_calibration_sources() -> list[Source]:
    return [
        Source("jsonl", read_jsonl, ("file", "columns")),
        Source("files", read_files, ("folder", "pattern", "columns")),
        Source("python-stdlib", read_standard_library, ("modules",)),
        Source("datasets", _datasets, OPTIONS, pin_datasets),
    ]


def read_jsonl(options: Mapping[str, Any], folder: Path) -> Iterator[Document]:
    """`file`: one JSON object a line, of any shape that shapes.py knows."""
    yield from _lines(folder / text_option(options, "file"), columns_option(options))


def read_files(options: Mapping[str, Any], folder: Path) -> Iterator[Document]:
    """`folder` and `pattern` (`**/*.py`): rows of .jsonl and .parquet, all others as texts, long ones in pieces."""
    root = folder / text_option(options, "folder")
    pattern = str(options.get("pattern", "**/*"))
    columns = columns_option(options)
    try:
        files = [path for path in sorted(root.glob(pattern)) if path.is_file()]
    except (NotImplementedError, ValueError) as error:
        raise CalibrationSetInvalid(f"'pattern' is {pattern!r}: {error}") from None
    if "pattern" not in options:  # administrative files of a repository, such as git's, are not its text
        files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    if not files:
        raise CalibrationSetInvalid(f"no file matches {root}/{pattern}")
    for path in files:
        if path.suffix == ".jsonl":
            yield from _lines(path, columns)
        elif path.suffix == ".parquet":
            yield from read_parquet(path, columns)
        else:
            yield from in_pieces(_text(path), str(path.relative_to(root)), _PIECE)


def read_standard_library(options: Mapping[str, Any], _folder: Path) -> Iterator[Document]:
    """`modules`: source files of the running interpreter's standard library; those that it lacks are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in options.get("modules", ()):
        path = root / str(name)
        if path.is_file() and root in path.resolve().parents:
            yield from in_pieces(_text(path), str(name), _PIECE)


def _datasets(options: Mapping[str, Any], folder: Path) -> Iterator[Document]:
    name, columns = text_option(options, "dataset"), columns_option(options)
    yield from read_datasets(name, options, columns, folder)


def _lines(path: Path, columns: Mapping[str, str]) -> Iterator[Document]:
    found = False
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    found = True
                    yield document(_parsed(line, f"{path}:{number}"), f"{path.name}:{number}", columns)
    except OSError as error:
        raise CalibrationSetInvalid(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CalibrationSetInvalid(f"{path}: not UTF-8: {error}") from None
    if not found:
        raise CalibrationSetInvalid(f"{path}: the file is empty: expected one JSON object a line")


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise CalibrationSetInvalid(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise CalibrationSetInvalid(f"{where}: not JSON that can be read: nested too deeply") from None


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if b"\0" in data:
            raise CalibrationSetInvalid(
                f"{path}: not a text: byte {data.index(0)} is 0",
                hint='pattern = "**/*.txt", or another that leaves it out',
            )
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")  # as a file opened for text
    except OSError as error:
        raise CalibrationSetInvalid(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CalibrationSetInvalid(f"{path}: not UTF-8: byte {error.start} is {data[error.start]:#04x}") from None


def text_option(options: Mapping[str, Any], key: str) -> str:
    value = options.get(key)
    if not isinstance(value, str):
        raise CalibrationSetInvalid(f"the source needs '{key}' in its [[part]], found {value!r}")
    return value


def columns_option(options: Mapping[str, Any]) -> dict[str, str]:
    """`columns = { messages = "chat", tools = "functions" }`: which column contains what."""
    value = options.get("columns", {})
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value.values()):
        raise CalibrationSetInvalid(f"'columns' is {value!r:.80}, expected names of columns: {{ messages = \"chat\" }}")
    for name in value:
        if name not in COLUMNS:
            raise CalibrationSetInvalid(f"'columns' has no '{name}'; a column can be taken for: {', '.join(COLUMNS)}")
    return dict(value)
