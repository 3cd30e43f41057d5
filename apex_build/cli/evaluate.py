"""`apex evaluate`: how good a file is, measured with the native tools, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from apex_build.cli import show, values
from apex_build.cli.groups import VERBOSE, verbosity
from apex_build.cli.headline import figure_text, labels_of, print_headline
from apex_build.cli.options import PATH, json_option, plugin_option, tools_option
from apex_build.errors import ApexError, DiskTooSmall, OutputUnwritable
from apex_build.evaluation.pace import Estimate
from apex_build.evaluation.pieces import piece_of, remember
from apex_build.evaluation.run import Result, Work, in_order, place_of, record, recorded, with_report
from apex_build.evaluation.task import ToolOptions
from apex_build.hookspecs import Figure
from apex_build.loaded import LoadedEvaluator
from apex_build.native.memory import MEMORY, bytes_of
from apex_build.parameters import parse_settings
from apex_build.plugins import load_plugins
from apex_build.printable import printable
from apex_build.progress import Whole, silent
from apex_build.stages.evaluate import EvaluateOptions, measuring, plan
from apex_build.stages.given import workplace


def evaluation_options(function: Any) -> Any:
    """Options of `apex evaluate` and `apex sweep`: what to measure, and on what."""
    options = (
        click.option("--reference", metavar="FILE", type=PATH, help="A model file to compare with, such as the F16."),
        click.option(
            "--text",
            "texts",
            metavar="FILE",
            type=PATH,
            multiple=True,
            help="A text to score, or a folder of them; each is a domain named after its file.  "
            "[default: the text kept apart from calibration, if any]",
        ),
        click.option(
            "--prompts",
            metavar="FILE",
            type=PATH,
            help='JSON lines: {"domain": ..., "prompt": ...}, as the model gets them.',
        ),
        click.option("--data", metavar="NAME=FILE", multiple=True, help="The data file of the evaluator NAME."),
        click.option(
            "--only",
            metavar="NAME,NAME",
            multiple=True,
            shell_complete=values.evaluators,
            help="Only these evaluators.  [default: all whose needs are met]",
        ),
        click.option(
            "--set", "settings", metavar="NAME.PARAMETER=VALUE", multiple=True, help="A parameter of an evaluator."
        ),
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: the tools' own choice]"),
        click.option("--gpu-layers", type=int, help="Layers on the GPU.  [default: the tools' own: all that fit]"),
        click.option("--memory", type=click.FloatRange(min=0, min_open=True), help=MEMORY),
        click.option(
            "--tool-argument",
            "extra",
            metavar="ARGUMENT",
            multiple=True,
            help="An additional argument for llama-perplexity and llama-server; llama-bench:ARGUMENT for llama-bench.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1, type=PATH)
@evaluation_options
@click.option(
    "--results",
    type=PATH,
    default=Path("evaluation.jsonl"),
    show_default=True,
    help="File for the results, one JSON object a line.",
)
@click.option("--all", "all_", is_flag=True, help="Show every figure with its interval, by domain; same as -v.")
@click.option("--list", "list_", is_flag=True, help="List the evaluators with their parameters.")
@click.option("--force", is_flag=True, help="Measure again, even if the results file has the result.")
@click.option(
    "--cluster",
    metavar="ADDRESS",
    help="Measure on a Dask cluster, except timings: tcp://HOST:8786, or local:N for N processes here.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, and show what would run.")
@tools_option
@plugin_option
@json_option
def command(
    files: tuple[Path, ...],
    reference: Path | None,
    texts: tuple[Path, ...],
    prompts: Path | None,
    data: tuple[str, ...],
    only: tuple[str, ...],
    settings: tuple[str, ...],
    threads: int | None,
    gpu_layers: int | None,
    memory: float | None,
    extra: tuple[str, ...],
    results: Path,
    all_: bool,
    list_: bool,
    force: bool,
    cluster: str | None,
    dry_run: bool,
    tools_path: Path | None,
    folders: tuple[Path, ...],
    json_: bool,
) -> None:
    """Measure FILEs with evaluators: perplexity, divergence from a reference, the draft head's score and acceptance,
    speed.

    Each result is recorded in the results file at once and not measured again, so an interrupted run
    continues. Do not use texts and prompts that the files were calibrated on. Intervals are 95 % intervals.

    \b
    Examples:
      apex evaluate i-nano.gguf --reference F16.gguf --text chat.txt --text code.txt
      apex evaluate Q8_0.gguf i-nano.gguf --reference F16.gguf --only draft-head --text wiki.txt \\
          --set draft-head.depth=1
      apex evaluate i-nano.gguf --only draft-acceptance --prompts prompts.jsonl --json
      apex evaluate i-nano.gguf --only hellaswag --data hellaswag=hellaswag_val_full.txt
      apex evaluate *.gguf --reference F16.gguf --text wiki.txt --cluster tcp://node1:8786
      apex evaluate --list
    """
    plugins = load_plugins(folders)
    evaluators = plugins.evaluators()
    if list_:
        _list(evaluators, json_)
        return
    if not files:
        raise click.UsageError("Missing argument 'FILE...'.")
    options = EvaluateOptions(
        reference=reference,
        texts=texts,
        prompts=prompts,
        data=data_files(data),
        only=tuple(names_of(only)),
        settings=parse_settings(settings),
        threads=threads,
        tools=ToolOptions(gpu_layers, extra, bytes_of(memory)),
        results=results,
        force=force,
        cluster=cluster,
    )
    where = workplace(tools_path, folders)
    planned = plan(files, options, place=where)
    works = planned.works
    if planned.without:
        click.echo(f"warning: without --text: the built-in texts are left out: {printable(planned.without)}", err=True)
    show.kept_apart(planned.heldout)
    if planned.built_in:
        show.note(f"measured on the built-in {planned.built_in} (--text and --prompts use others)")
    for lines, names in planned.left_out.items():
        show.note(f"{', '.join(names)}: left out {'; '.join(lines)}")
    if dry_run:
        _dry_run(works, {} if force else recorded(results), json_)
        return
    done: list[Result] = []
    unrecorded: ApexError | None = None
    known = {} if force else recorded(results)
    pieces = [piece_of([work]) for work in works]
    place = {place_of(work): number for number, work in enumerate(works)}
    to_do = [number for number, work in enumerate(works) if work.identity not in known]
    with show.progress() as report, measuring(works, options, replace(where, report=report)) as how:
        whole = Whole("evaluating", report, [piece for piece, _ in pieces], at_once=how.at_once)
        if to_do:
            rough = Whole("", silent, [pieces[number][0] for number in to_do], at_once=how.at_once)
            takes = Estimate(rough.left(), all(pieces[number][1].measured for number in to_do))
            on = f" on {counted(how.at_once(), 'worker')}" if how.away else ""
            show.note(f"{len(to_do)} of {len(works)} measurements to do{on}: {takes}")
        reporting = [with_report(work, whole.of(number)) for number, work in enumerate(works)]
        try:
            with closing(how.measure(reporting, results, force=force)) as ran:
                for result in ran:
                    done.append(result)
                    share, seconds = whole.finish(
                        place[place_of(result.work)], reused=result.reused or result.error is not None
                    )
                    if not how.away or result.work.evaluator.timed:  # else it is another machine's time
                        remember(result.work, share, seconds)
                    if result.error is not None:
                        task = result.work.task
                        click.echo(
                            f"failed: {task.evaluator} on {task.model.path.name}: {printable(result.error.message)}",
                            err=True,
                        )
        # the results file cannot be written: show the results anyway
        except (DiskTooSmall, OutputUnwritable) as error:
            unrecorded = error
    done = in_order(works, done)
    if json_:
        show.as_json([record(result) for result in done if result.error is None])
    else:
        if all_ or verbosity() == VERBOSE:
            for evaluator_name in dict.fromkeys(result.work.evaluator.name for result in done):
                _print(evaluator_name, [result for result in done if result.work.evaluator.name == evaluator_name])
        if any(result.error is None for result in done):
            print_headline(done)
    if unrecorded is not None:
        raise unrecorded
    good, reused = sum(result.error is None for result in done), sum(result.reused for result in done)
    before = f", {reused} of them recorded before" if reused else ""
    show.note(
        f"{counted(good, 'result')} in {results}{before}" + ("" if all_ or json_ else "; --all shows every figure")
    )
    if failed := [result.error for result in done if result.error is not None]:
        raise _summed_up(failed, len(done))


def names_of(only: Sequence[str]) -> list[str]:
    return [name.strip() for names in only for name in names.split(",") if name.strip()]


def data_files(given: Sequence[str]) -> dict[str, Path]:
    return {name: Path(path) for name, path in parse_settings(given).items()}


def _list(evaluators: Mapping[str, LoadedEvaluator], json_: bool) -> None:
    if json_:
        rows: list[dict[str, Any]] = [
            {
                "name": one.name, "plugin": one.plugin, "description": one.description, "needs": one.needs,
                "uses": one.uses,
                "parameters": {name: {"default": p.default, "help": p.help} for name, p in one.parameters.items()},
            }
            for one in evaluators.values()
        ]  # fmt: skip
        show.as_json(rows)
        return
    cells = []
    for one in evaluators.values():
        parameters = ", ".join(f"{name}={parameter.default}" for name, parameter in one.parameters.items())
        cells.append([one.name, one.description, ", ".join(one.needs), ", ".join(one.uses), parameters])
    show.table("Evaluators", ("name", "what it measures", "needs", "uses", "parameters"), cells)


def _dry_run(works: Sequence[Work], known: Mapping[str, Any], json_: bool) -> None:
    rows = [
        {
            "file": str(work.task.model.path),
            "evaluator": work.evaluator.name,
            "recorded": work.identity in known,
            **work.parts,
        }
        for work in works
    ]
    if json_:
        show.as_json(rows)
        return
    for row in rows:
        settings = " ".join(f"{name}={value}" for name, value in row["settings"].items())
        state = "  (recorded already)" if row["recorded"] else ""
        click.echo(f"{row['evaluator']} on {row['file']}: {settings}{state}")


def _print(evaluator: str, results: Sequence[Result]) -> None:
    """One table for an evaluator: a row for each figure, a column for each file."""
    rows: dict[tuple[str, str], dict[str, Figure]] = {}
    paths = [result.work.task.model.path for result in results if result.error is None]
    labels = labels_of(paths)
    names = list(labels.values())
    for result in results:
        for figure in result.figures:
            rows.setdefault((figure.domain, figure.name), {})[labels[result.work.task.model.path]] = figure
    if not names:
        return
    cells = [
        [domain or "all", name, *(figure_text(of.get(file)) for file in names)]
        for (domain, name), of in sorted(rows.items(), key=_order)
    ]
    show.table(evaluator, ("domain", "figure", *names), cells, right=names)


def _order(item: tuple[tuple[str, str], Any]) -> str:
    return item[0][0]  # all domains first, then each; figures in the evaluator's order


def _summed_up(failed: Sequence[ApexError], total: int) -> ApexError:
    """The first failure, repeated at the end with its exit code."""
    first = failed[0]
    return type(first)(
        f"{len(failed)} of {counted(total, 'measurement')} failed; the first: {first.message}", hint=first.hint
    )


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
