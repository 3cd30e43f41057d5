"""`apex patch edit`, `new`, `drop`, `reorder`, `port`: change a series, or port it to another pin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from apex_build.cli import show, values
from apex_build.cli.options import json_option
from apex_build.cli.source import pin_option
from apex_build.source.pins import DEFAULT_PIN, Pin, load_pin
from apex_build.source.series import Saved, verb
from apex_build.workshop import changing, porting


@click.command()
@click.argument("patch", required=False)
@pin_option
@json_option
def edit(patch: str | None, pin_name: str, json_: bool) -> None:
    """Open the tree for editing: one commit per patch, on top of apex-base.

    With PATCH (a number, a name or a word of its subject), start an interactive rebase that stops at that patch. Edit
    files there, then follow the printed steps. Nothing is saved until `apex patch save`; `apex build` compiles the tree
    as it is.

    \b
    Examples:
      apex patch edit            # print the tree's folder, and the commit of each patch
      apex patch edit 3          # stop at the third patch
    """
    pin = load_pin(pin_name)
    with show.progress() as report:
        opened = changing.edit(pin, patch, report)
    if json_:
        commits = [{"commit": commit, "patch": name} for commit, name in opened.commits]
        show.as_json({"pin": pin.name, "tree": str(opened.path), "at": opened.at, "commits": commits})
        return
    git = f"git -C {opened.path}"
    for commit, name in opened.commits:
        click.echo(f"{'->' if name == opened.at else '  '} {commit[:9]} {name}")
    if opened.at is None:
        click.echo(f"edit the commits:    {git} rebase -i apex-base")
    else:
        click.echo(f"edit files, then:    {git} commit -a --amend")
        click.echo(f"                     {git} rebase --continue")
        click.echo(f"or give up:          {git} rebase --abort")
    click.echo(f"then:                {verb(pin, 'save')}")


@click.command()
@click.argument("subject")
@click.argument("files", nargs=-1)
@click.option("--message", "-m", default="", metavar="TEXT", help="Body of the message: why, and how it was tested.")
@click.option(
    "--message-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Read the body from a file.",
)
@pin_option
@json_option
def new(
    subject: str, files: tuple[str, ...], message: str, message_file: Path | None, pin_name: str, json_: bool
) -> None:
    """Make a patch from the edits in the tree, and save it.

    The patch is added at the end of the series, with the author of the series. It contains FILES (relative to the
    tree); by default, all edits and new files.

    \b
    Examples:
      apex patch new "imatrix : list tensors without data"
      apex patch new "perplexity : fix a typo" tools/perplexity/README.md
    """
    if message and message_file:
        raise click.UsageError("--message and --message-file exclude each other")
    text = message_file.read_text(encoding="utf-8") if message_file else message
    pin = load_pin(pin_name)
    with show.progress() as report:
        saved = changing.new_patch(pin, subject, text, files, report)
    tell(pin, saved, json_)


@click.command()
@click.argument("patch")
@pin_option
@json_option
def drop(patch: str, pin_name: str, json_: bool) -> None:
    """Remove a patch from the series and the tree, and save the rest.

    If a later patch depends on it, nothing is changed and the command fails.

    \b
    Examples:
      apex patch drop 4
      apex patch drop parse-special --pin latest
    """
    pin = load_pin(pin_name)
    with show.progress() as report:
        dropped, commit, saved = changing.drop(pin, patch, report)
    tell(pin, saved, json_, dropped={"patch": dropped.name, "commit": commit})
    if json_:
        return
    click.echo(f"dropped {dropped.name}; its commit was {commit[:9]}")


@click.command()
@click.argument("patches", nargs=-1, required=True, metavar="PATCH...")
@pin_option
@json_option
def reorder(patches: tuple[str, ...], pin_name: str, json_: bool) -> None:
    """Move these patches to the front, in this order, and save.

    The others keep their order. If a patch does not apply in its new place, or the patched files would differ, nothing
    is changed and the command fails.

    \b
    Examples:
      apex patch reorder 6               # the sixth becomes the first
      apex patch reorder 1 6 2
    """
    pin = load_pin(pin_name)
    with show.progress() as report:
        saved = changing.reorder(pin, patches, report)
    tell(pin, saved, json_)


def tell(pin: Pin, saved: Saved, json_: bool = False, **more: Any) -> None:
    """Print what a verb changed in the series, as text or as JSON; `more`: further keys of the JSON."""
    if json_:
        lists = {"patches": saved.names, "written": saved.written, "removed": saved.removed}
        folder = {"pin": pin.name, "folder": str(saved.folder)}
        show.as_json({**folder, **{key: list(names) for key, names in lists.items()}, **more})
        return
    for name in saved.written:
        click.echo(f"wrote {saved.folder / name}")
    for name in saved.removed:
        click.echo(f"removed {saved.folder / name}")
    if not saved.written and not saved.removed:
        click.echo(f"{len(saved.names)} patches, all as saved before")


@click.command()
@click.argument("patches", nargs=-1, metavar="[PATCH...]")
@click.option(
    "--onto",
    "onto_name",
    metavar="PIN",
    required=True,
    shell_complete=values.pins,
    help="Pin to port to, or a pin's TOML file.",
)
@click.option(
    "--from", "from_name", metavar="PIN", shell_complete=values.pins, help=f"Pin to port from. [default: {DEFAULT_PIN}]"
)
@click.option("--dry-run", is_flag=True, help="Only print which patches apply without merging.")
@click.option("--continue", "continue_", is_flag=True, help="Continue after resolving the conflict (and git add).")
@click.option("--skip", is_flag=True, help="Continue without the conflicting patch.")
@click.option("--abort", is_flag=True, help="Restore the tree's previous state.")
@json_option
def port(
    patches: tuple[str, ...],
    onto_name: str,
    from_name: str | None,
    dry_run: bool,
    continue_: bool,
    skip: bool,
    abort: bool,
    json_: bool,
) -> None:
    """Port patches to another pin, and save them in its series. The series they come from is not changed.

    Without PATCH, ports all patches whose subjects the other series lacks. They are merged three-way, one by one. At a
    conflict git stops and leaves conflict markers (diff3 style) in the other pin's tree: edit the files, git add, and
    run again with --continue. --abort restores the tree, keeps its previous state as a commit, and prints that.

    \b
    Examples:
      apex patch port --onto latest --dry-run
      apex patch port --onto latest
      apex patch port --onto latest --continue
      apex patch port 3 --onto latest --from pr-22673
    """
    if sum((dry_run, continue_, skip, abort)) > 1:
        raise click.UsageError("--dry-run, --continue, --skip and --abort exclude each other")
    onto = load_pin(onto_name)
    if (continue_ or skip or abort) and (patches or from_name):
        raise click.UsageError(
            "--continue, --skip and --abort act on the port in progress and take no PATCH and no --from"
        )
    with show.progress() as report:
        if abort:
            kept = porting.abort_port(onto, report)
            if json_:
                show.as_json({"pin": onto.name, "kept": kept})
                return
            click.echo(f"{onto.name} is restored; the aborted port is kept as commit {kept[:9]} ({porting.ABORTED})")
            return
        if continue_ or skip:
            _tell_port(onto, porting.continue_port(onto, report, skip=skip), json_)
            return
        origin = load_pin(from_name)
        if origin == onto:
            raise click.UsageError("--onto and --from are the same pin")
        if not dry_run:
            _tell_port(onto, porting.port(onto, origin, patches, report), json_)
            return
    found = porting.preview(onto, origin, patches)
    if json_:
        show.as_json([{"patch": one.patch.name, "applies": one.applies, "detail": one.detail} for one in found])
        return
    for one in found:
        click.echo(f"{one.applies:<9} {one.patch.name}{f': {one.detail}' if one.detail else ''}")


def _tell_port(onto: Pin, ported: porting.Ported, json_: bool) -> None:
    port = ported.port
    if json_:
        written = [str(ported.saved.folder / name) for name in ported.saved.written] if ported.saved else []
        lists = {"ported": port.done, "upstream": port.upstream, "skipped": port.skipped, "written": written}
        show.as_json({"pin": onto.name, "from": port.origin, **{key: list(names) for key, names in lists.items()}})
        return
    for names, what in (
        (port.done, "ported"),
        (port.upstream, "already in the source"),
        (port.skipped, "skipped"),
    ):
        for name in names:
            click.echo(f"{what}: {name}")
    if ported.saved is None:
        click.echo(f"nothing to port: {onto.name} has all patches of {port.origin}, by their subjects")
        return
    tell(onto, ported.saved)
    click.echo(f"next: apex build{onto.option}, apex patch test{onto.option}")
