"""`apex imatrix`: calibration data put together, or carried to the other format."""

from __future__ import annotations

from pathlib import Path

import click

from apex_build.calibration.merge import merge as merge_files
from apex_build.cli import show
from apex_build.cli.options import json_option

_PATH = click.Path(path_type=Path)
_FORMATS = ("gguf", "dat")


@click.group()
def command() -> None:
    """Merge imatrix files of one model, or convert one to the other format.

    \b
    Examples:
      apex imatrix merge chat.imatrix.gguf code.imatrix.gguf -o both.imatrix.gguf
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

    Counts and sums of squares are added exactly. Files of different models are refused, and those whose draft heads
    were run over other rows of the trunk.

    \b
    Examples:
      apex imatrix merge chat.imatrix.gguf code.imatrix.gguf -o both.imatrix.gguf
      apex imatrix merge first.dat second.dat --chunk-size 512 -o both.imatrix.gguf
    """
    if len(files) < 2:
        raise click.UsageError("merging takes two files or more; for one: apex imatrix convert")
    if len({path.absolute().resolve() for path in files}) < len(files):
        raise click.UsageError("a file is given twice: its data would count twice")
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

    It reports what the format cannot hold: .dat keeps one count for all experts, and nothing about the draft head's
    tokens.

    \b
    Examples:
      apex imatrix convert old.dat -o new.imatrix.gguf
      apex imatrix convert model.imatrix.gguf -o model.imatrix.dat
    """
    _write((file,), out, form or ("dat" if out.suffix == ".dat" else "gguf"), chunk_size, force=force, json_=json_)


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
