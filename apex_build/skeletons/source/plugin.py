"""A calibration source: the Markdown files of a folder, each a document."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apex_build.plugin_api import Document, Source, hookimpl

APEX_API = 3


def read(options: Mapping[str, Any], folder: Path) -> Iterator[Document]:
    for path in sorted((folder / options["folder"]).glob("**/*.md")):
        yield Document(domain="", text=path.read_text("utf-8"), origin=path.name)


@hookimpl
def apex_calibration_sources() -> list[Source]:
    return [Source("my-name", read, options=("folder",))]
