"""Options that several verbs have, each with the same words everywhere."""

from __future__ import annotations

from pathlib import Path

import click

from apex_build.gguf_model.mtp_rows import AUTO, CHOICES, Rows

PATH = click.Path(path_type=Path, readable=False)  # unreadable files are reported by the code that reads them

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
    help="Hidden rows that the draft head was trained on: before or after the final norm. auto: what is known of its "
    "architecture.",
)


def rows_of(choice: str) -> Rows | None:
    """The rows that --mtp-rows names; None for auto."""
    return CHOICES.get(choice)
