"""`apex patch`: the patch series on a fetched tree."""

from __future__ import annotations

from dataclasses import asdict

import click

from apex_build.cli import show
from apex_build.cli.groups import Group
from apex_build.cli.source import pin_option
from apex_build.source import series
from apex_build.source.pins import load_pin


@click.group(cls=Group)
def command() -> None:
    """Apply our patches to the fetched tree, see how they stand, and write commits back as patches.

    A series is a folder of mailable patches (git format-patch) and a file `series` that lists them. In the tree each is a commit
    above the tag apex-base: work there with git as usual, commit, and save.
    """


@command.command()
@pin_option
def apply(pin_name: str) -> None:
    """Bring the tree to the base and the whole series.

    A patch that does not apply is named with its file and hunk, and the tree stays as it was. Uncommitted edits and commits that
    the series does not hold are never thrown away.

    \b
    Examples:
      apex patch apply
      apex patch apply --pin latest
    """
    with show.progress() as report:
        names = series.apply_series(load_pin(pin_name), report)
    for name in names:
        click.echo(f"applied {name}")
    if not names:
        click.echo("nothing to apply: the tree has the whole series")


@command.command()
@pin_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(pin_name: str, as_json: bool) -> None:
    """Show what is applied, what is missing or no longer applies, and what is not saved yet.

    \b
    Examples:
      apex patch status
      apex patch status --json
    """
    pin = load_pin(pin_name)
    found = series.series_status(pin)
    if as_json:
        show.as_json({"pin": pin.name, "series_digest": series.series_digest(pin), **asdict(found)})
        return
    rows = [(patch.name, patch.state, (patch.commit or "")[:9], patch.detail or patch.subject) for patch in found.patches]
    if rows:
        show.table(f"Patches of {pin.name}", ("patch", "state", "commit", "what"), rows)
    else:
        click.echo(f"{pin.name}: the series is empty ({pin.patches_folder})")
    for commit, subject in found.unsaved:
        click.echo(f"not in the series: commit {commit[:9]} {subject}    (apex patch save)")
    for name in found.edited:
        click.echo(f"not committed: {name}")
    for name in found.untracked:
        click.echo(f"new, not committed: {name}")
    for name in found.unlisted:
        click.echo(f"not listed in `series`: {name}")


@command.command()
@pin_option
def save(pin_name: str) -> None:
    """Write the tree's commits, from apex-base on, back as the series.

    The same commits always give the same bytes: applying a saved series and saving it again changes nothing. Uncommitted edits are
    not part of it.

    \b
    Examples:
      git -C vendor/pr-22673 commit -a --fixup :/imatrix && git -C vendor/pr-22673 rebase -i --autosquash apex-base
      apex patch save
    """
    pin = load_pin(pin_name)
    with show.progress() as report:
        saved = series.save_series(pin, report)
    for name in saved.written:
        click.echo(f"wrote {saved.folder / name}")
    for name in saved.removed:
        click.echo(f"removed {saved.folder / name}")
    if not saved.written and not saved.removed:
        click.echo(f"{len(saved.names)} patches, all as saved before")
    for name in series.series_status(pin).edited:
        click.echo(f"warning: {name} has edits that are not committed, so not saved", err=True)
