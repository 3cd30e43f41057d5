"""`apex sweep`: how small a part of a model can be, with one file for each value of a policy's parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from apex_build.cli import show, values
from apex_build.cli.evaluate import counted, data_files, evaluation_options, names_of
from apex_build.cli.options import PATH, json_option, mtp_rows_option, plugin_option, rows_of, tools_option
from apex_build.evaluation.pace import Estimate
from apex_build.evaluation.pieces import piece_of
from apex_build.evaluation.task import ToolOptions
from apex_build.hookspecs import PolicySpec
from apex_build.native.memory import bytes_of
from apex_build.parameters import parse_settings
from apex_build.plugins import Plugins, load_plugins
from apex_build.printable import printable
from apex_build.progress import Whole
from apex_build.report import plot
from apex_build.stages.evaluate import EvaluateOptions
from apex_build.stages.given import workplace
from apex_build.stages.sweep import SweepOptions, measuring, plan, reported
from apex_build.sweep.knee import mb
from apex_build.sweep.plan import Sweep
from apex_build.sweep.report import Summary, check_scores, default_score
from apex_build.sweep.rows import RESULTS, Row, as_data, read_rows
from apex_build.sweep.run import Outcome, in_order, planned_row, planned_works, run_sweep


@click.command()
@click.argument("model_path", metavar="MODEL", type=PATH)
@click.option(
    "--over",
    metavar="NAME=VALUE,...",
    multiple=True,
    required=True,
    help="A parameter and its values; given twice: every combination.",
)
@click.option(
    "--policy",
    "policy_name",
    metavar="NAME",
    shell_complete=values.policies,
    help="The policy.  [default: the one for the draft head only]",
)
@click.option("--imatrix", type=PATH, help="Calibration data of the whole model: apex calibrate makes it.")
@click.option(
    "--imatrix-without-head", "without", type=PATH, help="Imatrix for the other curve.  [default: made from --imatrix]"
)
@click.option("--with-head", "curves", flag_value="with", help="Only with the head's calibration data.")
@click.option("--without-head", "curves", flag_value="without", help="Only without the head's calibration data.")
@mtp_rows_option
@click.option(
    "--baseline",
    metavar="NAME=VALUE,...",
    help="The point that losses are relative to.  [default: Q8_0 for every swept type]",
)
@evaluation_options
@click.option(
    "--score",
    "scores",
    metavar="NAME",
    multiple=True,
    help="The figure to show.  [default: the evaluator's choice]",
)
@click.option("--bound", type=click.FloatRange(min=0), help="Largest loss at the knee.  [default: 0.5 points]")
@click.option("-o", "--output", "folder", metavar="FOLDER", type=PATH, required=True, help="Folder for the results.")
@click.option("--keep", is_flag=True, help="Keep the files that this run quantizes, in FOLDER/files.")
@click.option(
    "--cluster",
    metavar="ADDRESS",
    help="Quantize and measure on a Dask cluster: tcp://HOST:8786, or local:N for N processes here.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, and show what would be made.")
@json_option
@tools_option
@plugin_option
def command(
    model_path: Path,
    over: tuple[str, ...],
    policy_name: str | None,
    imatrix: Path | None,
    without: Path | None,
    curves: str | None,
    mtp_rows: str,
    baseline: str | None,
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
    scores: tuple[str, ...],
    bound: float | None,
    folder: Path,
    keep: bool,
    cluster: str | None,
    dry_run: bool,
    json_: bool,
    tools_path: Path | None,
    folders: tuple[Path, ...],
) -> None:
    """Quantize MODEL once for each value of a parameter, measure each file, and show what the bytes buy.

    If the values change only the draft head, each is tried with and without the head's calibration data. A file is
    deleted once it is measured. FOLDER gets sweep.jsonl with a line for each point, table.md, and a plot with the knee
    marked. An interrupted sweep is resumed by the same command, and more values may be given then. --set takes
    parameters of the policy and of evaluators.

    \b
    Examples:
      apex sweep F16.gguf --over draft_head=Q8_0,Q4_K,IQ3_XXS,Q2_K,IQ2_XXS \\
          --imatrix F16.imatrix.gguf --text chat.txt -o sweep
      apex sweep F16.gguf --over draft_head.routed=IQ2_XXS,IQ3_XXS --over draft_head.other=Q4_K,Q6_K --with-head \\
          --imatrix F16.imatrix.gguf --text chat.txt --text code.txt -o mixtures
      apex sweep F16.gguf --policy i-nano --over draft_head=Q8_0,IQ2_XXS \\
          --imatrix F16.imatrix.gguf --text chat.txt -o nano
      apex sweep F16.gguf --policy uniform --over type=Q6_K,Q4_K,Q3_K --reference F16.gguf --only kld \\
          --imatrix F16.imatrix.gguf --text chat.txt -o trunk
      apex sweep F16.gguf --over draft_head=Q8_0,Q4_K,IQ2_XXS \\
          --imatrix F16.imatrix.gguf --text chat.txt -o sweep --cluster tcp://node1:8786
    """
    plugins = load_plugins(folders)
    evaluators = plugins.evaluators()
    policy = plugins.policy(policy_name or _default_policy(plugins))
    swept = values_of_sweep(over)
    of_evaluators, of_policy = _divided(parse_settings(settings), policy, set(evaluators))
    place = workplace(tools_path, folders)
    options = SweepOptions(
        over=swept,
        policy=policy.name,
        parameters=dict(of_policy),
        imatrix=imatrix,
        imatrix_without_head=without,
        curves=None if curves is None else (curves == "with",),
        baseline=parse_settings(baseline.split(",")) if baseline else {},
        measured=EvaluateOptions(
            reference=reference,
            texts=texts,
            prompts=prompts,
            data=data_files(data),
            only=tuple(names_of(only)),
            settings=of_evaluators,
            threads=threads,
            tools=ToolOptions(gpu_layers, extra, bytes_of(memory)),
            cluster=cluster,
        ),
        head_rows=rows_of(mtp_rows),
        keep=keep,
    )
    with show.progress() as report:
        sweep = plan(model_path, folder, options, place=replace(place, report=report))
    apart = () if texts else sweep.request.inputs.texts.values()
    show.kept_apart(next((text.parent for text in apart), None))
    if dry_run:
        _dry_run(sweep, json_, "each machine's disk" if cluster else "the disk")
        return
    if not plot.available():
        click.echo(f"warning: {plot.MISSING}", err=True)  # now, when it can still be installed before the hours of work
    outcomes = in_order(sweep, _run(sweep, scores, keep, cluster))
    rows = [outcome.row for outcome in outcomes]
    done = reported(sweep, rows, scores, bound)
    if json_:
        show.as_json(
            {"points": [as_data(row) for row in rows], "knees": [line for one in done.reports for line in one.knees]}
        )
    else:
        _print(done.reports, done.written)
    if failed := [error for outcome in outcomes for error in outcome.errors]:
        counted = "1 measurement" if len(failed) == 1 else f"{len(failed)} measurements"
        raise type(failed[0])(f"{counted} failed; the first: {failed[0].message}", hint=failed[0].hint)


for _option in command.params:  # shared with apex evaluate, where they say less
    if isinstance(_option, click.Option) and _option.name in ("only", "settings"):
        _option.help = {
            "only": "Only these evaluators.  [default: those for a sweep of the head, or of the model]",
            "settings": "A parameter of the policy, or EVALUATOR.PARAMETER.",
        }[_option.name]


def _default_policy(plugins: Plugins) -> str:
    found = [policy.name for policy in plugins.policies().values() if policy.sweeps]
    if len(found) != 1:
        raise click.UsageError(
            f"Missing option '--policy': {' and '.join(found) or 'none'} of the policies is the default for sweeps."
        )
    return found[0]


def values_of_sweep(over: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`NAME=VALUE,VALUE` options as parameter -> values. Raises UsageError if there is no value, or a parameter
    comes twice.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, listed in ((name.strip(), listed) for name, _, listed in (one.partition("=") for one in over)):
        given = tuple(dict.fromkeys(value.strip() for value in listed.split(",") if value.strip()))
        if not name or not given:
            raise click.UsageError(f"--over {name or '?'}: expected NAME=VALUE,VALUE,..., found no value")
        if name in found:
            raise click.UsageError(f"--over {name} is given twice: give all its values at once")
        found[name] = given
    return found


def _divided(
    settings: dict[str, str], policy: PolicySpec, evaluators: set[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Settings of evaluators, and the others, which are the policy's."""
    own = {name for name in settings if name.partition(".")[0] in evaluators and name not in policy.parameters}
    return {name: settings[name] for name in own}, {name: value for name, value in settings.items() if name not in own}


def _run(sweep: Sweep, scores: Sequence[str], keep: bool, cluster: str | None) -> list[Outcome]:
    """Run it, with one bar for the whole, and a line after each point."""
    outcomes: list[Outcome] = []
    pieces = [piece_of(works) for works in planned_works(sweep)]
    address = cluster if pieces else None  # with nothing to do no cluster is needed
    try:
        with show.progress() as report, measuring(address, sweep.request.tools, report) as how:
            whole = Whole("sweep", report, [piece for piece, _ in pieces], at_once=how.at_once)
            if pieces:
                takes = Estimate(whole.left(), all(one.measured for _, one in pieces))
                on = f" on {counted(how.at_once(), 'worker')}" if cluster else ""
                show.note(
                    f"{len(pieces)} of {len(sweep.points)} points to do{on}: {takes}, plus the time for quantizing"
                )
            numbers = iter(range(len(pieces)))

            @contextmanager
            def point() -> Iterator[Any]:
                number = next(numbers)
                yield whole.of(number)
                whole.finish(number)

            for outcome in run_sweep(sweep, keep=keep, progress=point, measure=how.measure):
                outcomes.append(outcome)
                eta = f", {whole.left():.0f} s left" if not outcome.reused and whole.left() >= 1 else ""
                show.note(f"[{len(outcomes)}/{len(sweep.points)}] {outcome.row.name}: {_said(outcome, scores)}{eta}")
                check_scores([outcome.row], scores)  # after the first point, not after hours
                if outcome.errors and outcome.row.baseline:
                    raise outcome.errors[0]  # the others would have nothing to compare with
    except KeyboardInterrupt:
        show.note(_kept(sweep))
        raise
    return outcomes


def _kept(sweep: Sweep) -> str:
    """What an interrupted sweep leaves, for the same command to resume."""
    folder = sweep.request.folder
    measured = len(read_rows(folder)) if folder.is_dir() else 0
    files = [path for path in (folder / "files").glob("*.gguf") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    held = (
        f", and {show.size(total)} of files in {folder / 'files'}: {', '.join(path.name for path in files)}"
        if files
        else ""
    )
    return f"kept: {measured} measured points in {folder / RESULTS}{held}; the same command resumes from there"


def _said(outcome: Outcome, scores: Sequence[str]) -> str:
    row = outcome.row
    if row.refused:
        return "refused"
    if outcome.errors:
        return f"failed: {printable(outcome.errors[0].message)}"
    score = scores[0] if scores else default_score([row])
    figure = row.figure(score)
    value = f"{score} {figure.value:.4g} {figure.unit}".rstrip() if figure and figure.value is not None else "measured"
    return f"{value}{' (measured before)' if outcome.reused else f' ({row.seconds:.0f} s)'}"


def _dry_run(sweep: Sweep, json_: bool, disk: str) -> None:
    rows = [(planned_row(point, sweep), point.identity in sweep.known) for point in sweep.points]
    if json_:
        show.as_json([{**as_data(row), "recorded": recorded} for row, recorded in rows])
        return
    cells = [
        (row.name, _bytes(row.head_bytes), _bytes(row.file_bytes), _state(row, recorded)) for row, recorded in rows
    ]
    show.table(f"Sweep, {len(rows)} points", ("point", "head", "file", "state"), cells, right=("head", "file"))
    click.echo(f"evaluators: {', '.join(one.name for one in sweep.evaluators)}")
    click.echo(
        f"room on {disk}: {show.size(sweep.room)}" + ("; the trunk is quantized once" if sweep.trunk_once else "")
    )


def _bytes(n_bytes: int | None) -> str:
    return mb(n_bytes) if n_bytes else ""


def _state(row: Row, recorded: bool) -> str:
    state = "refused" if row.refused else "recorded" if recorded else "to do"
    return state + (", the baseline" if row.baseline else "") + (", head without data" if row.uncalibrated else "")


def _print(reports: Sequence[Summary], written: Sequence[Path]) -> None:
    for one in reports:
        show.table(one.table.title, one.table.columns, one.table.rows, right=one.table.right)
        for line in (*one.table.notes, *one.knees):
            click.echo(printable(line))
    click.echo(f"written: {', '.join(str(path) for path in written)}")
