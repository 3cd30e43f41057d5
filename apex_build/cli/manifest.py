"""`apex show`: how an output was made, from its manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from apex_build.cli import show
from apex_build.errors import VerificationFailed
from apex_build.storage.finding import Located, locate
from apex_build.storage.manifest import KINDS

_MANY = 12  # entries that are not listed one by one


@click.command()
@click.argument("path", metavar="MANIFEST|OUTPUT", type=click.Path(path_type=Path))
@click.option("--check", "check_", is_flag=True, help="Read the whole file and check that it matches the manifest.")
@click.option("--json", "json_", is_flag=True, help="Print JSON.")
def command(path: Path, check_: bool, json_: bool) -> None:
    """Show how an output was made: its kind, identity, what went in, what came out.

    PATH is an output of convert, calibrate, imatrix, quantize or build --export, or its manifest (OUTPUT.json); a
    sweep's folder; or a folder of the cache: a build, a CUDA toolkit, the converter's environment.

    \b
    Examples:
      apex show model-i-nano.gguf
      apex show model.imatrix.gguf.json --check
      apex show model-i-nano.gguf --json | jq .from
    """
    found = locate(path)
    whole = found.is_whole() if check_ else None
    if json_:
        checked = {"whole": whole} if check_ else {}
        show.as_json({"path": str(found.artifact), "present": found.present, **checked, **found.manifest.json()})
    else:
        show.table(KINDS.get(found.manifest.kind, found.manifest.kind), ("what", "value"), list(_rows(found, whole)))
    if whole is False:
        raise VerificationFailed(f"{found.artifact} is not the file that {found.at.name} describes")


def _rows(found: Located, whole: bool | None) -> Iterator[tuple[str, str]]:
    manifest = found.manifest
    size = f"{manifest.n_bytes} bytes" if manifest.n_bytes is not None else ""
    state = "" if found.present else "gone"
    if found.present and manifest.n_bytes is not None and not manifest.is_of_size(found.artifact):
        state = "another file is there now"
    elif whole:
        state = "checked"
    yield (
        "file" if manifest.sha256 else "folder",
        ", ".join(part for part in (str(found.artifact), size, state) if part),
    )
    yield "manifest", f"{found.at}, schema {manifest.schema}{f', apex {manifest.apex}' if manifest.apex else ''}"
    for name, value in (
        ("identity", manifest.identity or "none (from an older version)"),
        ("sha256", manifest.sha256),
    ):
        if value:
            yield name, value
    yield from _flat("from", manifest.parts)
    yield from _flat("", manifest.details)


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value and (len(value) <= _MANY or not name or name == "from"):
        for key, one in value.items():
            yield from _flat(f"{name}.{key}" if name else str(key), one)
    elif isinstance(value, (Mapping, list, tuple)):
        plain = (
            isinstance(value, (list, tuple))
            and len(value) <= _MANY
            and not any(isinstance(one, (dict, list)) for one in value)
        )
        yield name, ", ".join(map(str, value)) if plain else f"{len(value)} entries (--json lists them)"
    else:
        yield name, "-" if value is None else str(value)
