"""`apex pin`: which upstream commits there are pins of, new ones, and moving a pin on."""

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
    """Pins: list them, add one, or move a pin on to a newer one.

    A pin is a file that names an upstream commit, what carries it, and the digest of its tree.
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
    "--pypi", "version", metavar="VERSION", help="A release of llama-cpp-python, whose sdist carries llama.cpp."
)
@click.option("--git", "commit", metavar="COMMIT", help="A commit of upstream's git, in full.")
@click.option("--commit", "of", metavar="COMMIT", help="--pypi: the commit, where the sdist does not name it.")
@click.option("--repository", metavar="URL", help="--git: another repository than upstream's.")
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

    It is fetched once; from then on its sha256, and the digest of its tree, must be the same. In a checkout the new pin
    is one of the pins; elsewhere its file is written here, and --pin FILE.toml names it.

    \b
    Examples:
      apex pin add next --pypi 0.3.37
      apex pin add next --git 0c1e57098bba43ac29e6e3b677cdceebdd22334f
    """
    if bool(version) == bool(commit):
        raise click.UsageError("either --pypi VERSION or --git COMMIT is needed")
    if (of and commit) or (repository and version):
        raise click.UsageError("--commit goes with --pypi, --repository with --git")
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
    help="The pin that it becomes: green, see `apex patch status`.",
)
@json_option
def bump(name: str, to: str, json_: bool) -> None:
    """Let a pin be what another one is: its commit, and its series.

    Refused unless the other one is green: its patches apply, it builds, and breaks none of llama.cpp's tests.

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
