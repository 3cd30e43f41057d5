"""`apex patch export`: what upstream is given of the series."""

from __future__ import annotations

from pathlib import Path

import click

from apex_build.cli import show
from apex_build.cli.source import pin_option
from apex_build.source.pins import load_pin
from apex_build.workshop import exporting


@click.command()
@pin_option
@click.option("--to", "folder", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="[default: PIN-patches]")
@click.option("--force", is_flag=True, help="Overwrite files of the same names that hold something else.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def export(pin_name: str, folder: Path | None, force: bool, as_json: bool) -> None:
    """Write the series as mail for git am, and for each patch a draft of a pull request.

    A draft has what and why from the commit's message, how it was tested, our figures, and what upstream's CONTRIBUTING.md asks of
    whoever sends it. The lines that are added are checked by the tree's .editorconfig, and by clang-format where that is installed.
    Refused where the patches have more than one author.

    \b
    Examples:
      apex patch export --to to-upstream
      apex patch export --pin latest --json
    """
    pin = load_pin(pin_name)
    with show.progress() as report:
        done = exporting.export(pin, folder or Path(f"{pin.name}-patches"), force=force, report=report)
    if as_json:
        show.as_json(
            {
                "pin": pin.name,
                "files": [str(file) for file in done.files],
                "remarks": [{"patch": name, "remark": remark} for name, remark in done.remarks],
                "unchecked": list(done.unchecked),
            }
        )
        return
    for file in done.files:
        click.echo(f"wrote {file}")
    for name, remark in done.remarks:
        click.echo(f"style, {name[:4]}: {remark}")
    for what in done.unchecked:
        show.note(f"note: {what}")
