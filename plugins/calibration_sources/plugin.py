"""Calibration sources: conversations in JSON lines, text files, the interpreter's standard library, and Hugging Face
datasets.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apex_build.plugin_api import CalibrationSetInvalid, Document, Source, hookimpl

APEX_API = 3

_PIECE = 6000  # characters of a long file in one piece, so that domains take turns often


@hookimpl
def apex_calibration_sources() -> list[Source]:
    return [
        Source("jsonl", read_jsonl, ("file",)),
        Source("files", read_files, ("folder", "pattern")),
        Source("python-stdlib", read_standard_library, ("modules",)),
        Source("datasets", read_datasets, ("dataset", "name", "split", "revision", "column")),
    ]


def read_jsonl(options: Mapping[str, Any], folder: Path) -> Iterator[Document]:
    """`file`: one JSON object a line, with `messages` (and `tools`) as chat templates take them, or with `text`."""
    path = folder / _text_option(options, "file")
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _document(_parsed(line, f"{path}:{number}"), f"{path.name}:{number}")
    except OSError as error:
        raise CalibrationSetInvalid(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CalibrationSetInvalid(f"{path}: not UTF-8: {error}") from None


def read_files(options: Mapping[str, Any], folder: Path) -> Iterator[Document]:
    """`folder` and `pattern` (`**/*.py`): text files, long ones in pieces."""
    root = folder / _text_option(options, "folder")
    pattern = str(options.get("pattern", "**/*"))
    try:
        files = [path for path in sorted(root.glob(pattern)) if path.is_file()]
    except (NotImplementedError, ValueError) as error:
        raise CalibrationSetInvalid(f"'pattern' is {pattern!r}: {error}") from None
    if not files:
        raise CalibrationSetInvalid(f"no file matches {root}/{pattern}")
    for path in files:
        yield from _pieces(path, str(path.relative_to(root)))


def read_standard_library(options: Mapping[str, Any], _folder: Path) -> Iterator[Document]:
    """`modules`: source files of the running interpreter's standard library; those that it lacks are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in options.get("modules", ()):
        path = root / str(name)
        if path.is_file() and root in path.resolve().parents:
            yield from _pieces(path, str(name))


def read_datasets(options: Mapping[str, Any], _folder: Path) -> Iterator[Document]:
    """`dataset`, `name`, `split`, `revision`, and `column`: of text, or of messages. Needs the extra `hub`."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationSetInvalid(
            "the source 'datasets' needs the Python package datasets", hint="pip install 'apex-build[hub]'"
        ) from None
    wanted = {key: options[key] for key in ("name", "revision") if key in options}
    column = str(options.get("column", "messages"))
    rows = load_dataset(
        _text_option(options, "dataset"), split=str(options.get("split", "train")), streaming=True, **wanted
    )
    for number, row in enumerate(rows, 1):
        key = "text" if isinstance(row[column], str) else "messages"
        yield _document({key: row[column]}, f"{options['dataset']}:{number}")


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise CalibrationSetInvalid(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise CalibrationSetInvalid(f"{where}: not JSON that can be read: nested too deeply") from None


def _document(row: Any, origin: str) -> Document:
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return Document(domain="", text=row["text"], origin=origin)
    if isinstance(row, dict) and _objects(row.get("messages")) and _objects(row.get("tools") or []):
        return Document(domain="", messages=tuple(row["messages"]), tools=tuple(row.get("tools") or ()), origin=origin)
    raise CalibrationSetInvalid(f"{origin}: expected an object with 'messages' or 'text', found {str(row)[:80]}")


def _objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _pieces(path: Path, origin: str) -> Iterator[Document]:
    """A text file in pieces of whole lines."""
    piece, size = [], 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except OSError as error:
        raise CalibrationSetInvalid(f"{path}: cannot be read: {error.strerror}") from None
    for line in lines:
        piece.append(line)
        size += len(line)
        if size >= _PIECE:
            yield Document(domain="", text="".join(piece), origin=origin)
            piece, size = [], 0
    if size:
        yield Document(domain="", text="".join(piece), origin=origin)


def _text_option(options: Mapping[str, Any], key: str) -> str:
    value = options.get(key)
    if not isinstance(value, str):
        raise CalibrationSetInvalid(f"the source needs '{key}' in its [[part]], found {value!r}")
    return value
