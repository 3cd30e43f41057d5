"""`apex calibration-sets`: what there is to calibrate on, what it becomes for a model, and pinning it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from apex_build.calibration.pin import pinned
from apex_build.calibration.sets import CalibrationText, Part, known_sets, load_set
from apex_build.cli import show, values
from apex_build.cli.options import PATH, json_option, plugin_option, tools_option
from apex_build.gguf_model.model import read_model
from apex_build.native.toolset import find_toolset
from apex_build.plugins import load_plugins
from apex_build.printable import printable
from apex_build.stages.calibrate import CalibrateOptions, text_of
from apex_build.storage.outputs import write_text

_LINES, _COLUMNS = 6, 110  # of the beginning of each part


@click.group()
def command() -> None:
    """List calibration sets, show what one is made of, and check what it becomes for a model.

    \b
    Examples:
      apex calibration-sets list
      apex calibration-sets show apex-diverse
      apex calibration-sets check my-set.toml --model model-F16.gguf
      apex calibration-sets pin my-set.toml -o pinned.toml
    """


@command.command("list")
@json_option
def list_(json_: bool) -> None:
    """List the built-in sets.

    \b
    Examples:
      apex calibration-sets list
    """
    sets = [load_set(name) for name in known_sets()]
    if json_:
        show.as_json(
            [{"name": one.name, "about": one.about, "parts": len(one.parts), "tokens": one.tokens} for one in sets]
        )
        return
    rows = [(one.name, len(one.parts), one.tokens or "-", one.about) for one in sets]
    show.table("Calibration sets", ("name", "parts", "tokens", "what"), rows, right=("parts", "tokens"))


@command.command("show")
@click.argument("name", metavar="SET", shell_complete=values.calibration_sets)
@json_option
def show_(name: str, json_: bool) -> None:
    """Show the parts of SET, a name or a TOML file: weights, origins, licences. Reads none of its sources.

    \b
    Examples:
      apex calibration-sets show default
      apex calibration-sets show my-set.toml --json
    """
    chosen = load_set(name)
    if json_:
        parts = [{**asdict(part), "options": dict(part.options)} for part in chosen.parts]
        show.as_json({**asdict(chosen), "path": str(chosen.path), "parts": parts})
        return
    rows = [
        (part.domain, part.source, _amount(part), part.licence or "-", part.origin or _options(part))
        for part in chosen.parts
    ]
    show.table(f"{chosen.path}", ("domain", "source", "weight", "licence", "origin"), rows, right=("weight",))
    told = {
        "tokens": chosen.tokens,
        "seed": chosen.seed,
        "near duplicates from": chosen.near_duplicates,
        "held out": chosen.heldout or None,
    }
    click.echo("; ".join(f"{what}: {value}" for what, value in told.items() if value is not None) or chosen.about)


@command.command()
@click.argument("name", metavar="SET", shell_complete=values.calibration_sets)
@click.option("--model", "model_path", type=PATH, required=True, help="Whose tokenizer and chat template to use.")
@click.option("--domain", "domains", multiple=True, help="Only this domain of the set (may be given several times).")
@click.option("--chat-template", "template", type=PATH, help="A Jinja chat template instead of the model's own.")
@click.option("--fallback-template", "fallback", type=PATH, help="A template for conversations that the other refuses.")
@click.option("--lines", type=click.IntRange(min=0), default=_LINES, show_default=True, help="Shown of each part.")
@tools_option
@plugin_option
@json_option
def check(
    name: str,
    model_path: Path,
    domains: tuple[str, ...],
    template: Path | None,
    fallback: Path | None,
    lines: int,
    tools_path: Path | None,
    folders: tuple[Path, ...],
    json_: bool,
) -> None:
    """Read all of SET as for a calibration of MODEL: tokens by domain, duplicates, and how each part begins.

    \b
    Examples:
      apex calibration-sets check default --model model-F16.gguf
      apex calibration-sets check my-set.toml --model model-F16.gguf --json
    """
    plugins = load_plugins(folders)
    model = read_model(model_path, plugins.role_of)
    options = CalibrateOptions(name, domains, chat_template=template, fallback_template=fallback)
    text = text_of(model, options, plugins, find_toolset(tools_path), counted=True)
    for warning in text.warnings:
        click.echo(f"warning: {printable(warning)}", err=True)
    if json_:
        show.as_json(_json(text))
        return
    whole = text.tokens or 1
    rows = [
        (
            part.domain,
            part.source,
            part.documents,
            part.tokens,
            f"{100 * (part.tokens or 0) / whole:.1f}",
            part.duplicates or "-",
            part.near_duplicates or "-",
            part.heldout or "-",
            part.refused or "-",
            part.licence or "-",
        )
        for part in text.parts
    ]
    headings = ("domain", "source", "documents", "tokens", "%", "twice", "nearly", "held out", "refused", "licence")
    show.table(f"{name}, {text.tokens} tokens, {show.size(len(text.data))}", headings, rows, right=headings[2:9])
    for part in text.parts if lines else ():
        click.echo(f"\n{part.domain} ({part.source}) begins:")
        for line in _beginning(part.begins, lines):
            click.echo(f"    {printable(line)}")


@command.command()
@click.argument("name", metavar="SET", shell_complete=values.calibration_sets)
@click.option("-o", "--output", "out", type=PATH, required=True, metavar="FILE.toml", help="The pinned set to write.")
@plugin_option
@click.option("--force", is_flag=True, help="Replace FILE.toml.")
def pin(name: str, out: Path, folders: tuple[Path, ...], force: bool) -> None:
    """Write SET with the revision that each of its data sets has now, so that it stays the same.

    \b
    Examples:
      apex calibration-sets pin my-set.toml -o pinned.toml
      apex calibrate model-F16.gguf --calibration-set pinned.toml
    """
    chosen = load_set(name)
    text, revisions = pinned(chosen, load_plugins(folders).calibration_sources(), out)
    write_text(out, text.encode(), [], force=force or _same(out, chosen.path))
    for what, revision in revisions:
        click.echo(f"{what}: {revision}")
    click.echo(f"{out}: {len(revisions)} pinned; apex calibrate MODEL --calibration-set {shlex.quote(str(out))}")


def _same(out: Path, path: Path) -> bool:
    """Whether a set is pinned in its own file."""
    return out.exists() and path.exists() and out.samefile(path)


def _amount(part: Part) -> str:
    return f"{part.weight:g}" if part.weight else show.size(part.max_bytes) if part.max_bytes else "-"


def _options(part: Part) -> str:
    return ", ".join(f"{key} = {value}" for key, value in part.options.items())[:60]


def _beginning(text: str, lines: int) -> Sequence[str]:
    given = text.splitlines()
    shown = [line if len(line) <= _COLUMNS else f"{line[:_COLUMNS]}..." for line in given[:lines]]
    return [*shown, "..."] if len(given) > lines else shown


def _json(text: CalibrationText) -> dict[str, Any]:
    parts = [{key: value for key, value in asdict(part).items() if key != "begins"} for part in text.parts]
    for part, of in zip(parts, text.parts, strict=True):
        part["begins"] = of.begins.splitlines()[:_LINES]
    return {
        "name": text.name,
        "sha256": text.sha256,
        "bytes": len(text.data),
        "tokens": text.tokens,
        "parts": parts,
        "heldout": [{"domain": one.domain, "documents": one.documents, "tokens": one.tokens} for one in text.heldout],
        "warnings": list(text.warnings),
    }
