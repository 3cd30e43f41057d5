"""`apex cache`: what the cache holds, and clearing it."""

from __future__ import annotations

import time
from dataclasses import asdict

import click

from apex_build import places, pruning
from apex_build.cli import show
from apex_build.cli.options import SIZE, json_option

_KINDS = click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice(tuple(pruning.KINDS)),
    help="Only this kind (may be given several times).",
)


@click.group()
def command() -> None:
    """Show what the cache holds, and clear it. All of it can be recreated or downloaded again.

    It is in APEX_CACHE_DIR, or in the user's cache folder.
    """


@command.command("list")
@_KINDS
@json_option
def list_(kinds: tuple[str, ...], json_: bool) -> None:
    """Show the cache by kind, or with --kind each item.

    \b
    Examples:
      apex cache list
      apex cache list --kind evaluations
      apex cache list --json
    """
    found = pruning.items(kinds)
    if json_:
        show.as_json({"cache": str(places.cache_root()), "items": [_json(item) for item in found]})
        return
    if kinds:
        rows = [(item.kind, str(item.path), show.size(item.n_bytes), _ago(item.used), item.kept) for item in found]
        show.table("In the cache", ("kind", "path", "size", "last used", "kept because"), rows, right=("size",))
        return
    rows = []
    for kind, said in pruning.KINDS.items():
        own = [item for item in found if item.kind == kind]
        if own:
            rows.append((kind, said, str(len(own)), show.size(sum(item.n_bytes for item in own)), _ago(own[-1].used)))
    show.table(
        f"In the cache, {places.cache_root()}",
        ("kind", "", "items", "size", "last used"),
        rows,
        right=("items", "size"),
    )
    click.echo(f"all: {show.size(sum(item.n_bytes for item in found))}")


@command.command()
@_KINDS
@click.option(
    "--older-than", type=click.FloatRange(min=0), metavar="DAYS", help="Only items unused for this many days."
)
@click.option("--larger-than", type=SIZE, metavar="SIZE", help="Only items larger than this: 500MB, 20GB.")
@click.option(
    "--keep-size", type=SIZE, metavar="SIZE", help="Remove the longest unused until at most this much is left."
)
@click.option("--dry-run", is_flag=True, help="Say what would be removed.")
@json_option
def prune(
    kinds: tuple[str, ...],
    older_than: float | None,
    larger_than: int | None,
    keep_size: int | None,
    dry_run: bool,
    json_: bool,
) -> None:
    """Remove items that meet all the given conditions.

    The selected build, anything a running program uses, and source trees with unsaved work are always kept; sources are
    removed only with --kind sources.

    \b
    Examples:
      apex cache prune --older-than 30 --dry-run
      apex cache prune --kind evaluations --keep-size 20GB
      apex cache prune --kind work --kind downloads
      apex cache prune --older-than 14 --larger-than 1GB --json
    """
    if not kinds and older_than is None and larger_than is None and keep_size is None:
        raise click.UsageError("say what to remove: --older-than, --larger-than, --keep-size or --kind")
    found = pruning.items(kinds or [kind for kind in pruning.KINDS if kind != "sources"])
    chosen = pruning.choose(found, older_than=older_than, larger_than=larger_than, keep_size=keep_size)
    done = chosen if dry_run else [pruning.remove(item) for item in chosen]
    gone = [item for item in done if not item.kept]
    stayed = [item for item in (*found, *done) if item.kept]
    if json_:
        show.as_json(
            {"removed": [_json(item) for item in gone], "kept": [_json(item) for item in stayed], "dry_run": dry_run}
        )
        return
    for item in gone:
        said = "would remove" if dry_run else "removed"
        click.echo(f"{said} {item.path} ({item.kind}, {show.size(item.n_bytes)}, last used {_ago(item.used)})")
    for item in stayed:
        show.note(f"kept: {item.path} ({item.kind}): {item.kept}")
    click.echo(f"{show.size(sum(item.n_bytes for item in gone))} {'would be freed' if dry_run else 'freed'}")


def _json(item: pruning.Item) -> dict[str, object]:
    return {**asdict(item), "path": str(item.path), "used": round(item.used)}


def _ago(when: float) -> str:
    days = (time.time() - when) / 86400
    return "today" if days < 1 else f"{days:.0f} days ago" if days >= 2 else "yesterday"
