"""`apex imatrix`: calibration data put together, or carried to the other format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from apex_build.calibration.merge import Merged, plan_merge, write_gguf, write_legacy
from apex_build.cli import show
from apex_build.cli.options import json_option
from apex_build.storage.digests import sha256_file
from apex_build.storage.json_files import write_json
from apex_build.storage.outputs import (
    MANIFEST,
    beside,
    check_apart,
    check_free,
    check_place,
    check_room,
    locked,
    new_part,
    put,
    with_manifest_and_log,
)

_PATH = click.Path(path_type=Path)
_FORMATS = {"gguf": write_gguf, "dat": write_legacy}


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

    Counts and sums of squares are added exactly. Files of different models are refused, and those whose draft heads were run over
    other rows of the trunk.

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
@click.option("--to", "form", type=click.Choice(tuple(_FORMATS)), help="Format.  [default: dat for OUT.dat, else gguf]")
@click.option("--chunk-size", type=click.IntRange(min=1), help="Tokens of a chunk of a .dat file.  [default: 512]")
@click.option("--force", is_flag=True, help="Replace OUT.")
@json_option
def convert(file: Path, out: Path, form: str | None, chunk_size: int | None, force: bool, json_: bool) -> None:
    """Write an imatrix in the other format: GGUF, or the .dat that older programs and ik_llama.cpp read.

    What a format cannot hold is told: .dat keeps one count for all experts, and nothing of the draft head's tokens.

    \b
    Examples:
      apex imatrix convert old.dat -o new.imatrix.gguf
      apex imatrix convert model.imatrix.gguf -o model.imatrix.dat
    """
    _write((file,), out, form or ("dat" if out.suffix == ".dat" else "gguf"), chunk_size, force=force, json_=json_)


def _write(files: tuple[Path, ...], out: Path, form: str, chunk_size: int | None, *, force: bool, json_: bool) -> None:
    check_place(out)
    check_apart(with_manifest_and_log(out), files)
    check_free(out, "merged", force=force)
    merged = plan_merge(files, chunk_size)
    check_room(out.parent, 2 * max(path.stat().st_size for path in files), out.name)
    with locked(out), new_part(out) as part:
        check_free(out, "merged", force=force)
        lost = _FORMATS[form](merged, part) or []
        manifest = _manifest(merged, part, form)
        write_json(beside(out, MANIFEST), manifest)
        put(part, out)
    for line in merged.notes:
        show.note(f"note: {line}")
    for what in lost:
        click.echo(f"warning: the .dat format does not keep {what}", err=True)
    if json_:
        show.as_json({"path": str(out), **manifest})
        return
    tokens = merged.chunk_count * merged.chunk_size
    head = f", the draft head over {merged.head_tokens}" if merged.head_tokens and form == "gguf" else ""
    click.echo(f"{out}: {len(merged.names)} entries over {tokens} tokens{head}; data sets: {', '.join(merged.datasets)}")


def _manifest(merged: Merged, part: Path, form: str) -> dict[str, Any]:
    return {
        "merged": [{"name": one.path.name, "sha256": sha256_file(one.path)} for one in merged.sources],
        "format": form,
        "bytes": part.stat().st_size,
        "sha256": sha256_file(part),
        "datasets": list(merged.datasets),
        "chunks": merged.chunk_count,
        "chunk_size": merged.chunk_size,
        "head_tokens": merged.head_tokens,
    }
