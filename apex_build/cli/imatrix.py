"""`apex imatrix`: merge, compare or convert calibration data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from apex_build.calibration.diff import Diff, PlaceOf, RoleDiff
from apex_build.calibration.diff import diff as diff_files
from apex_build.calibration.merge import merge as merge_files
from apex_build.cli import show
from apex_build.cli.options import PATH, json_option, plugin_option
from apex_build.gguf_model.model import read_model
from apex_build.hookspecs import Part
from apex_build.plugins import Plugins, load_plugins

_PATH = click.Path(path_type=Path)
_FORMATS = ("gguf", "dat")


@click.group()
def command() -> None:
    """Merge or compare imatrix files of one model, or convert one to the other format.

    \b
    Examples:
      apex imatrix merge chat.imatrix.gguf code.imatrix.gguf -o both.imatrix.gguf
      apex imatrix diff one.imatrix.gguf another.imatrix.gguf
      apex imatrix convert old.dat -o new.imatrix.gguf
      apex imatrix convert model.imatrix.gguf -o model.imatrix.dat
    """


@command.command()
@click.argument("files", metavar="FILE FILE...", type=_PATH, nargs=-1, required=True)
@click.option("-o", "--output", "out", type=_PATH, required=True, metavar="OUT.gguf", help="File to write, in GGUF.")
@click.option("--chunk-size", type=click.IntRange(min=1), help="Tokens of a chunk of .dat files.  [default: 512]")
@click.option("--force", is_flag=True, help="Replace OUT.gguf.")
@json_option
def merge(files: tuple[Path, ...], out: Path, chunk_size: int | None, force: bool, json_: bool) -> None:
    """Add up the data of imatrix files of one model, as if their texts had been run together.

    Counts and sums of squares are added exactly. Files are refused if they are from different models, if their draft
    heads were fed different rows of the trunk, or if some lack the draft head's data.

    \b
    Examples:
      apex imatrix merge chat.imatrix.gguf code.imatrix.gguf -o both.imatrix.gguf
      apex imatrix merge first.dat second.dat --chunk-size 512 -o both.imatrix.gguf
    """
    if len(files) < 2:
        raise click.UsageError("merge needs at least two files; for one: apex imatrix convert")
    if len({path.absolute().resolve() for path in files}) < len(files):
        raise click.UsageError("a file is given twice: its data would be counted twice")
    _write(files, out, "gguf", chunk_size, force=force, json_=json_)


@command.command()
@click.argument("file", type=_PATH)
@click.option("-o", "--output", "out", type=_PATH, required=True, metavar="OUT", help="File to write.")
@click.option("--to", "form", type=click.Choice(_FORMATS), help="Format.  [default: dat for OUT.dat, else gguf]")
@click.option("--chunk-size", type=click.IntRange(min=1), help="Tokens of a chunk of a .dat file.  [default: 512]")
@click.option("--force", is_flag=True, help="Replace OUT.")
@json_option
def convert(file: Path, out: Path, form: str | None, chunk_size: int | None, force: bool, json_: bool) -> None:
    """Write an imatrix in the other format: GGUF, or the .dat that older programs and ik_llama.cpp read.

    It reports what the format cannot hold: .dat has one count for all experts, and nothing about the draft head's
    tokens.

    \b
    Examples:
      apex imatrix convert old.dat -o new.imatrix.gguf
      apex imatrix convert model.imatrix.gguf -o model.imatrix.dat
    """
    _write((file,), out, form or ("dat" if out.suffix == ".dat" else "gguf"), chunk_size, force=force, json_=json_)


@command.command()
@click.argument("one", metavar="A", type=_PATH)
@click.argument("two", metavar="B", type=_PATH)
@click.option(
    "--model", "model_path", type=PATH, help="The model: it tells exactly which weights are the draft head's."
)
@plugin_option
@json_option
def diff(one: Path, two: Path, model_path: Path | None, folders: tuple[Path, ...], json_: bool) -> None:
    """Show how far two imatrix files of one model are apart, by role.

    The distance of two matrices is half the sum of the differences between their columns' shares of the importance:
    0 if both files weigh the columns alike, 1 if they have none in common. 'largest difference' is between the sums
    themselves, which also grow with the text.

    \b
    Examples:
      apex imatrix diff chat.imatrix.gguf code.imatrix.gguf
      apex imatrix diff one-run.imatrix.gguf four-shards.imatrix.gguf --json
    """
    found = diff_files(one, two, _places(load_plugins(folders), model_path))
    if json_:
        show.as_json(_diff_json(found))
        return
    rows = [
        (
            "draft head" if role.draft_head else "trunk",
            role.role,
            role.matrices,
            role.equal,
            role.counts_equal,
            f"{role.mean:.4f}",
            f"{role.worst.distance:.4f} ({role.worst.tensor}{_expert(role)})" if role.worst else "-",
            f"{role.relative:.1e}",
            " / ".join(map(str, role.only)),
        )
        for role in found.roles
    ]
    columns = (
        "part",
        "role",
        "matrices",
        "equal",
        "same counts",
        "distance",
        "farthest",
        "largest difference",
        "only in A / B",
    )
    show.table(f"{one} and {two}", columns, rows, right=columns[2:6] + columns[7:])
    tokens = [(each.chunk_count or 0) * (each.chunk_size or 0) for each in (found.one, found.two)]
    click.echo(f"over {tokens[0]} and {tokens[1]} tokens" + ("; all data is equal" if found.equal else ""))


def _expert(role: RoleDiff) -> str:
    return f", expert {role.worst.number}" if role.worst and role.role == "routed" else ""


def _places(plugins: Plugins, model_path: Path | None) -> PlaceOf:
    """By the model's catalogue; without it by names, which identify only the parts that a draft head alone has."""
    known = {} if model_path is None else {one.name: one for one in read_model(model_path, plugins.role_of).tensors}

    def place_of(name: str) -> tuple[str, bool]:
        if name in known:
            return known[name].role, known[name].draft_head
        found = plugins.role_of("", name)
        if isinstance(found, Part):
            return found.role, found.draft_head
        return found or "other", ".nextn." in name

    return place_of


def _diff_json(found: Diff) -> dict[str, Any]:
    roles = [
        {
            **vars(role),
            "worst": vars(role.worst) if role.worst else None,
            "only": dict(zip("ab", role.only, strict=True)),
        }
        for role in found.roles
    ]
    files = [
        {
            "path": str(each.path),
            "chunk_count": each.chunk_count,
            "chunk_size": each.chunk_size,
            "head_tokens": each.head_tokens,
        }
        for each in (found.one, found.two)
    ]
    return {"files": files, "equal": found.equal, "roles": roles}


def _write(files: tuple[Path, ...], out: Path, form: str, chunk_size: int | None, *, force: bool, json_: bool) -> None:
    merged, manifest, lost = merge_files(files, out, form, chunk_size=chunk_size, force=force)
    for line in merged.notes:
        show.note(f"note: {line}")
    for what in lost:
        click.echo(f"warning: the .dat format does not keep {what}", err=True)
    if json_:
        show.as_json({"path": str(out), **manifest.json()})
        return
    tokens = merged.chunk_count * merged.chunk_size
    head = f", the draft head over {merged.head_tokens}" if merged.head_tokens and form == "gguf" else ""
    click.echo(
        f"{out}: {len(merged.names)} entries over {tokens} tokens{head}; data sets: {', '.join(merged.datasets)}"
    )
