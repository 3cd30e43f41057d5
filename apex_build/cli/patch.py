"""`apex patch`: work with the patch series of a fetched tree."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from apex_build.cli import show, values
from apex_build.cli.groups import Group
from apex_build.cli.options import json_option
from apex_build.cli.patch_changes import drop, edit, new, port, reorder, tell
from apex_build.cli.patch_upstream import export, test
from apex_build.cli.source import pin_option
from apex_build.errors import SourceMissing
from apex_build.source import series
from apex_build.source.pins import DEFAULT_PIN, all_pins, load_pin
from apex_build.workshop.each_builds import build_each
from apex_build.workshop.overview import Overview, overview


@click.group(cls=Group)
def command() -> None:
    """Apply our patches to the fetched tree, show their state, and save commits as patches.

    A series is a folder of mailable patches (git format-patch) and a file `series` that lists them. In the tree, each
    patch is a commit on top of the tag apex-base: edit and commit with git as usual, then run apex patch save.
    """


@command.command()
@pin_option
@json_option
def apply(pin_name: str, json_: bool) -> None:
    """Apply the whole series to the tree.

    If a patch does not apply, its file and hunk are named and the tree is left unchanged. Uncommitted edits and commits
    that are not in the series are never discarded.

    \b
    Examples:
      apex patch apply
      apex patch apply --pin latest
    """
    pin = load_pin(pin_name)
    with show.progress() as report:
        names = series.apply_series(pin, report)
    if json_:
        show.as_json({"pin": pin.name, "applied": list(names)})
        return
    for name in names:
        click.echo(f"applied {name}")
    if not names:
        click.echo("nothing to apply: the whole series is applied")


@command.command()
@click.option(
    "--pin",
    "pin_name",
    metavar="NAME",
    shell_complete=values.pins,
    help=f"Pin, or a pin's TOML file. [default: {DEFAULT_PIN}]",
)
@click.option("--all", "all_", is_flag=True, help="All pins.")
@click.option("--build", "build_", is_flag=True, help="Compile the source up to each patch that was not built yet.")
@click.option(
    "--jobs", "-j", type=click.IntRange(min=1), metavar="N", help="Compilers at once. [default: by CPUs and memory]"
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(pin_name: str | None, all_: bool, build_: bool, jobs: int | None, as_json: bool) -> None:
    """Show the state of each patch: applied, builds, passes tests.

    \b
    tree      applied, changed (the tree has another version), missing, conflict
    applies   to the pin's source: yes, offset, conflict, upstream (already there)
    builds    yes, no, or - if it was never built
    tests     results of the last `apex patch test`, or - if it never ran

    Below the table: unsaved work, and what is missing for the pin to be green, which `apex pin bump` requires.

    \b
    Examples:
      apex patch status
      apex patch status --all --json
      apex patch status --build                # takes long: compiles patch by patch
    """
    if all_ and pin_name:
        raise click.UsageError("--all and --pin exclude each other")
    shown: list[dict[str, Any]] = []
    for pin in all_pins() if all_ else [load_pin(pin_name)]:
        try:
            found = overview(pin)
            if build_:
                found = _build(found, jobs)
        except SourceMissing as error:
            if not all_:
                raise
            shown.append({"pin": pin.name, "fetched": False})
            if not as_json:
                click.echo(f"{pin.name}: not fetched    ({error.hint})\n")
            continue
        shown.append({"fetched": True, **_json(found)})
        if not as_json:
            _show(found)
    if as_json:
        show.as_json({"pins": shown} if all_ else shown[0])


def _build(found: Overview, jobs: int | None) -> Overview:
    with show.progress() as report:
        for name, error in build_each(found, jobs=jobs, report=report):
            show.note(f"{name}: {'builds' if error is None else 'does not build'}")
    return overview(found.pin)


def _json(found: Overview) -> dict[str, Any]:
    series = asdict(found.series)
    rows = zip(series.pop("patches"), found.standing, found.known, strict=True)
    return {
        "pin": found.pin.name,
        "series_digest": found.digest,
        "green": not found.lacking,
        "lacking": list(found.lacking),
        "builds": found.whole.builds,
        "tests": found.whole.tests,
        "patches": [
            {
                **patch,
                "applies": one.applies,
                "applies_detail": one.detail,
                "builds": known.builds,
                "build_error": known.error,
            }
            | {"tests": known.tests}
            for patch, one, known in rows
        ],
        **series,
    }


def _show(found: Overview) -> None:
    pin, series = found.pin, found.series
    rows = [
        (patch.name[:4], patch.state, one.applies, _yes_no(known.builds), _tests(known.tests), patch.subject)
        for patch, one, known in zip(series.patches, found.standing, found.known, strict=True)
    ]
    if rows:
        show.table(f"Patches of {pin.name}", ("", "tree", "applies", "builds", "tests", "what"), rows)
    else:
        click.echo(f"{pin.name}: the series is empty ({pin.patches_folder})")
    for patch, one, known in zip(series.patches, found.standing, found.known, strict=True):
        for what, detail in (("in the tree", patch.detail), (one.applies, one.detail), ("build", known.error)):
            if detail:
                click.echo(f"{patch.name[:4]}, {what}: {detail}")
    for commit, subject in series.unsaved:
        click.echo(f"not in the series: commit {commit[:9]} {subject}    (apex patch save)")
    for name in series.edited:
        click.echo(f"not committed: {name}")
    for name in series.untracked:
        click.echo(f"new, not committed: {name}")
    for name in series.unlisted:
        click.echo(f"not listed in `series`: {name}")
    click.echo(f"{pin.name}: " + ("green" if not found.lacking else f"not green: {'; '.join(found.lacking)}"))


def _yes_no(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "no"


def _tests(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{len(found['broken'])} broken" if found["broken"] else f"{found['passed']} of {found['ran']}"


@command.command()
@pin_option
@click.option("--force", is_flag=True, help="Overwrite patch files that were changed since they were applied.")
@json_option
def save(pin_name: str, force: bool, json_: bool) -> None:
    """Save the tree's commits on top of apex-base as the series.

    The same commits always give the same bytes: applying a saved series and saving it again changes nothing.
    Uncommitted edits are not saved.

    \b
    Examples:
      git -C vendor/pr-22673 commit -a --fixup :/imatrix
      git -C vendor/pr-22673 rebase -i --autosquash apex-base
      apex patch save
    """
    pin = load_pin(pin_name)
    with show.progress() as report:
        saved = series.save_series(pin, report, force=force)
    tell(pin, saved, json_)
    for name in series.series_status(pin).edited:
        click.echo(f"warning: {name} has uncommitted edits, which are not saved", err=True)


for one in (edit, new, drop, reorder, port, test, export):
    command.add_command(one)
