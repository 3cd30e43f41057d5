"""`apex check`: does a file write text, and is its draft head accepted?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from apex_build.cli import show
from apex_build.cli.headline import figure_text
from apex_build.cli.options import PATH, json_option, plugin_option, tools_option
from apex_build.evaluation.check import Checked
from apex_build.evaluation.task import ToolOptions
from apex_build.stages.check import PROMPTS, CheckOptions, check
from apex_build.stages.given import workplace


@click.command()
@click.argument("file", metavar="FILE", type=PATH)
@click.option("--reference", metavar="FILE", type=PATH, help="A file to compare with, such as the F16.")
@click.option(
    "--prompts", metavar="FILE", type=PATH, help='JSON lines: {"domain": ..., "prompt": ...}.  [default: built in]'
)
@click.option(
    "--text",
    "texts",
    metavar="FILE",
    type=PATH,
    multiple=True,
    help="A text for the perplexity.  [default: the text kept apart from calibration, or a built-in one]",
)
@click.option(
    "--prompts-per-domain",
    type=click.IntRange(1, 30),
    default=PROMPTS,
    show_default=True,
    help="Of the built-in prompts.",
)
@click.option("--chat-template", type=PATH, help="For the built-in texts.  [default: the model's own]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: the tools' own choice]")
@click.option("--gpu-layers", type=int, help="Layers on the GPU.  [default: the tools' own: all that fit]")
@tools_option
@plugin_option
@json_option
def command(
    file: Path,
    reference: Path | None,
    prompts: Path | None,
    texts: tuple[Path, ...],
    prompts_per_domain: int,
    chat_template: Path | None,
    threads: int | None,
    gpu_layers: int | None,
    tools_path: Path | None,
    folders: tuple[Path, ...],
    json_: bool,
) -> None:
    """Load FILE in llama-server and check that it writes text and drafts.

    Built-in prompts of four domains are answered without and with drafts of two tokens; the perplexity of a few chunks
    of text is taken. The check fails, with exit code 90, if the trunk does not write text, if less than 20
    % of the drafts are accepted or less than half of the reference's share, or if drafting changes the text after
    most prompts.

    \b
    Examples:
      apex check model-i-nano.gguf
      apex check model-i-nano.gguf --reference model-F16.gguf
      apex check model-i-nano.gguf --json --threads 8
    """
    options = CheckOptions(
        reference, prompts, texts, prompts_per_domain, chat_template, threads=threads, tools=ToolOptions(gpu_layers)
    )
    with show.progress() as report:
        done = check(file, options, place=workplace(tools_path, folders, report=report))
    show.kept_apart(done.heldout)
    if json_:
        show.as_json(as_json(done))
    else:
        print_checked(done)
    done.refuse()


def as_json(done: Checked) -> dict[str, Any]:
    return {
        "file": str(done.model.path), "good": not done.problems, "problems": list(done.problems),
        "acceptance": {domain or "all": _number(figure) for domain, figure in done.acceptance.items()},
        "same_text": _number(done.same_text) if done.same_text else None,
        "perplexity": {domain or "all": _number(figure) for domain, figure in done.perplexity.items()},
    }  # fmt: skip


def _number(figure: Any) -> dict[str, Any]:
    return {"value": figure.value, "low": figure.low, "high": figure.high, "unit": figure.unit, "n": figure.n}


def print_checked(done: Checked) -> None:
    domains = list(dict.fromkeys([*done.perplexity, *done.acceptance]))
    rows = [
        [domain or "all", figure_text(done.perplexity.get(domain)), figure_text(done.acceptance.get(domain))]
        for domain in domains
    ]
    show.table(
        done.model.path.name, ("domain", "perplexity", "drafts accepted"), rows, right=("perplexity", "drafts accepted")
    )
    if done.same_text:
        click.echo(f"same text with drafts as without: {figure_text(done.same_text)} of the prompts")
    if not done.acceptance:
        click.echo("no draft head: only the trunk was checked")
    if not done.problems:
        click.echo(f"{done.model.path}: good")
