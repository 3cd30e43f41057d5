"""`apex source`: fetch, verify and show the pinned llama.cpp trees."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from apex_build.cli import show, values
from apex_build.cli.groups import Group
from apex_build.errors import ApexError
from apex_build.places import PIN_VARIABLE
from apex_build.source import fetch as fetching
from apex_build.source.pins import DEFAULT_PIN, Pin, all_pins, load_pin
from apex_build.source.series import series_status
from apex_build.source.tree import status as tree_status

pin_option = click.option(
    "--pin",
    "pin_name",
    metavar="NAME",
    shell_complete=values.pins,
    envvar=PIN_VARIABLE,
    default=DEFAULT_PIN,
    show_default=True,
    help="Pin, or a pin's TOML file.",
)


@click.group(cls=Group)
def command() -> None:
    """Fetch llama.cpp at a pinned commit, and verify it.

    The tree is a git repository with one base commit, tagged apex-base; our patches are commits on top of it.
    """


@command.command()
@pin_option
@click.option(
    "--from", "origin", type=click.Choice(["pypi", "git", "archive"]), help="Where to fetch from. [default: pypi]"
)
@click.option(
    "--archive",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Use this local sdist, or tarball of the tree.",
)
@click.option(
    "--repository", metavar="URL", help="Use this git repository instead of the pin's (a mirror or a local clone)."
)
@click.option("--force", is_flag=True, help="Replace the tree, unless it has unsaved work.")
@click.option("--no-patches", is_flag=True, help="Do not apply our patches.")
def fetch(
    pin_name: str, origin: Any, archive: Path | None, repository: str | None, force: bool, no_patches: bool
) -> None:
    """Fetch, verify and lay out a pinned tree, and apply our patches.

    By default the sdist comes from the index that pip is configured to use (with its proxy and certificates). It is
    checked against the pin's sha256 before it is opened, and none of its code is run. Every origin must give the tree
    digest that the pin names.

    \b
    Examples:
      apex source fetch                                   # the default pin, from PyPI
      apex source fetch --pin latest --from git           # a shallow fetch of exactly the pinned commit
      apex source fetch --archive llama.cpp-af6528e.tar.gz   # without a network
      apex source fetch --from git --repository ../llama.cpp
    """
    origin = _origin(origin, archive, repository)
    pin = load_pin(pin_name)
    began = time.monotonic()
    with show.progress() as report:
        done = fetching.fetch(
            pin,
            origin=origin,
            archive=archive,
            repository=repository,
            force=force,
            patches=not no_patches,
            report=report,
        )
    if done.laid_out:
        click.echo(
            f"{pin.name}: laid out at {done.path} in {time.monotonic() - began:.1f} s, tree digest {pin.tree_digest} "
            "matches the pin"
        )
    else:
        click.echo(f"{pin.name}: already at {done.path}")
    for name in done.applied:
        click.echo(f"  applied {name}")


def _origin(origin: str | None, archive: Path | None, repository: str | None) -> str:
    implied = "archive" if archive else "git" if repository else None
    if archive and repository:
        raise click.UsageError("--archive and --repository exclude each other")
    if origin == "archive" and not archive:
        raise click.UsageError("--from archive needs --archive FILE")
    if origin and implied and origin != implied:
        raise click.UsageError(
            f"--{'archive' if archive else 'repository'} needs --from {implied}, not --from {origin}"
        )
    return origin or implied or "pypi"


@command.command()
@pin_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(pin_name: str, as_json: bool) -> None:
    """Verify that a tree has no edits and matches its pin.

    The content of the base commit must have the pin's digest, no file may differ from the last commit, and the commits
    must be the whole patch series, in order.

    \b
    Examples:
      apex source verify
      apex source verify --pin latest --json
    """
    pin = load_pin(pin_name)
    found = fetching.verify(pin)
    if as_json:
        show.as_json(
            {"pin": pin.name, "path": str(found.path), "tree_digest": found.tree_digest, "patches": list(found.patches)}
        )
        return
    click.echo(
        f"{pin.name}: {found.path} matches its pin: tree digest {found.tree_digest}, {len(found.patches)} patches, no "
        "edits"
    )


@command.command()
@click.option(
    "--pin",
    "pin_name",
    metavar="NAME",
    shell_complete=values.pins,
    help="Only this pin, or this pin's TOML file. [default: all]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(pin_name: str | None, as_json: bool) -> None:
    """Show the pins, whether they are fetched, and changes in their trees.

    \b
    Examples:
      apex source status
      apex source status --json
    """
    rows = [_row(pin) for pin in ([load_pin(pin_name)] if pin_name else all_pins())]
    if as_json:
        show.as_json(rows)
        return
    cells = [(row["pin"], row["commit"][:12], row["state"], row["patches"], row["path"]) for row in rows]
    show.table("Sources", ("pin", "upstream commit", "state", "patches", "folder"), cells)


def _row(pin: Pin) -> dict[str, Any]:
    row: dict[str, Any] = {
        "pin": pin.name,
        "commit": pin.commit,
        "tree_digest": pin.tree_digest,
        "patches": "",
        "problem": None,
    }
    try:
        found = tree_status(pin)
        row |= {"path": str(found.path), "fetched": found.present, "base": found.base, "head": found.head}
        row["state"] = "not fetched"
        if found.present:
            series = series_status(pin)
            applied = sum(patch.state == "applied" for patch in series.patches)
            row["patches"] = f"{applied} of {len(series.patches)} applied"
            row |= {
                "edited": list(series.edited),
                "untracked": list(series.untracked),
                "unsaved_commits": [c for c, _ in series.unsaved],
            }
            notes = [
                (len(series.edited), "edited files"),
                (len(series.untracked), "new files"),
                (len(series.unsaved), "unsaved commits"),
            ]
            row["state"] = ", ".join(f"{n} {what}" for n, what in notes if n) or "as laid out"
            if found.outdated:
                row["state"] = f"differs from the pin's digest ({row['state']}): fetch again"
    except ApexError as error:
        row |= {"path": row.get("path", ""), "state": error.message, "problem": error.message}
    return row
