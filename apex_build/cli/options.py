"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from apex_build.gguf_model.mtp_rows import AUTO, CHOICES, Rows
from apex_build.storage.sizes import parse_bytes

PATH = click.Path(path_type=Path, readable=False)  # files that cannot be read are reported by the code that reads them


class _Size(click.ParamType[int]):
    """Bytes of 20GB, 500M, 1.5GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if (n_bytes := parse_bytes(str(value))) is None:
            self.fail(f"{value!r} is not a size; for example: 20GB, 500M, 1.5GiB", param, ctx)
        return n_bytes


SIZE = _Size()

json_option = click.option("--json", "json_", is_flag=True, help="Print JSON.")
plugin_option = click.option("--plugin", "folders", multiple=True, type=PATH, help="Load a plugin from this folder.")
tools_option = click.option(
    "--tools",
    "tools_path",
    type=PATH,
    help="Folder of the native tools.  [default: the build marked * by apex build --list]",
)
mtp_rows_option = click.option(
    "--mtp-rows",
    type=click.Choice([AUTO, *CHOICES]),
    default=AUTO,
    show_default=True,
    help="Hidden rows that the draft head was trained on: before or after the final norm. auto: as known for its "
    "architecture.",
)


def rows_of(choice: str) -> Rows | None:
    """The rows that --mtp-rows names; None for auto."""
    return CHOICES.get(choice)
