"""`apex pin`: list pins of upstream commits, add one, or move one to another commit."""

from __future__ import annotations

from pathlib import Path

import click

from apex_build.cli import show, values
from apex_build.cli.groups import Group
from apex_build.cli.options import json_option
from apex_build.source.pins import all_pins
from apex_build.source.series import read_series
from apex_build.source.tree import tree_path
from apex_build.workshop import pinning


@click.group(cls=Group)
def command() -> None:
    """List pins, add one, or move a pin to a newer commit.

    A pin is a file that names an upstream commit, the sdist that contains it, and the digest of its tree.
    """


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(as_json: bool) -> None:
    """List the pins, the default one first.

    \b
    Examples:
      apex pin list
      apex pin list --json
    """
    rows = [
        {
            "pin": pin.name,
            "commit": pin.commit,
            "carrier": pin.carrier,
            "patches": len(read_series(pin)),
            "fetched": tree_path(pin).exists(),
        }
        for pin in all_pins()
    ]
    if as_json:
        show.as_json(rows)
        return
    cells = [
        (row["pin"], str(row["commit"])[:12], row["carrier"], row["patches"], "yes" if row["fetched"] else "no")
        for row in rows
    ]
    show.table("Pins", ("pin", "commit", "from", "patches", "fetched"), cells, right=("patches",))


@command.command()
@click.argument("name")
@click.option(
    "--pypi", "version", metavar="VERSION", help="A release of llama-cpp-python, whose sdist contains llama.cpp."
)
@click.option("--git", "commit", metavar="COMMIT", help="A commit of upstream's git, all 40 digits.")
@click.option("--commit", "of", metavar="COMMIT", help="With --pypi: the commit, if the sdist does not name it.")
@click.option("--repository", metavar="URL", help="With --git: fetch from this repository instead of upstream's.")
@click.option(
    "-o",
    "out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="[default: NAME.toml among the pins]",
)
@json_option
def add(
    name: str,
    version: str | None,
    commit: str | None,
    of: str | None,
    repository: str | None,
    out: Path | None,
    json_: bool,
) -> None:
    """Pin a release of llama-cpp-python, or a commit.

    Fetches it once and records its sha256 and the digest of its tree; later fetches must match both. In a checkout the
    file is written beside the other pins; elsewhere, to the current folder, and --pin FILE.toml selects it.

    \b
    Examples:
      apex pin add next --pypi 0.3.37
      apex pin add next --git 0c1e57098bba43ac29e6e3b677cdceebdd22334f
    """
    if bool(version) == bool(commit):
        raise click.UsageError("give either --pypi VERSION or --git COMMIT")
    if (of and commit) or (repository and version):
        raise click.UsageError("--commit needs --pypi, and --repository needs --git")
    path = pinning.pin_file(name, out)
    with show.progress() as report:
        if version:
            new = pinning.add_release(name, version, path, commit=of, report=report)
        else:
            new = pinning.add_commit(name, str(commit), path, repository=repository, report=report)
    if json_:
        show.as_json(
            {
                "pin": new.name,
                "file": str(path),
                "commit": new.commit,
                "carrier": new.carrier,
                "tree_digest": new.tree_digest,
            }
        )
        return
    click.echo(f"wrote {path}: {new.commit[:12]}, tree digest {new.tree_digest}")
    click.echo(
        f"next: apex source fetch --pin {new.own_file or new.name}, apex patch port --onto {new.own_file or new.name}"
    )


@command.command()
@click.argument("name", shell_complete=values.pins)
@click.option(
    "--to",
    required=True,
    metavar="PIN",
    shell_complete=values.pins,
    help="The pin to copy; it must be green (see `apex patch status`).",
)
@json_option
def bump(name: str, to: str, json_: bool) -> None:
    """Move a pin to the commit and the series of another pin.

    Fails unless the other pin is green: its patches apply, it builds, and it breaks none of llama.cpp's tests.

    \b
    Examples:
      apex pin bump latest --to next
    """
    with show.progress() as report:
        old, new = pinning.bump(name, to, report)
    if json_:
        patches = [patch.name for patch in read_series(new)]
        show.as_json({"pin": new.name, "from": old.commit, "commit": new.commit, "patches": patches})
        return
    click.echo(f"{new.name}: {old.commit[:12]} -> {new.commit[:12]}, {len(read_series(new))} patches")
    click.echo(f"next: apex source fetch{new.option}")
