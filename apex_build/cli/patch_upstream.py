"""`apex patch test`, `export`: run llama.cpp's own tests on the series, and export it for upstream."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import click

from apex_build.cli import show
from apex_build.cli.source import pin_option
from apex_build.errors import UpstreamTestsFailed
from apex_build.source.pins import load_pin
from apex_build.workshop import exporting, upstream_tests


@click.command()
@pin_option
@click.option(
    "--to", "folder", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="[default: PIN-patches]"
)
@click.option("--force", is_flag=True, help="Overwrite existing files that differ.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def export(pin_name: str, folder: Path | None, force: bool, as_json: bool) -> None:
    """Write the series as mail for git am, with drafts of pull requests.

    The draft for a patch has its commit message, how it was tested, our figures, and what upstream's CONTRIBUTING.md
    asks of contributors. Added lines are checked against the tree's .editorconfig, and with clang-format if it is
    installed. Fails if the patches have more than one author.

    \b
    Examples:
      apex patch export --to to-upstream
      apex patch export --pin latest --json
    """
    pin = load_pin(pin_name)
    with show.progress() as report:
        done = exporting.export(pin, folder or Path(f"{pin.name}-patches"), force=force, report=report)
    if as_json:
        show.as_json(
            {
                "pin": pin.name,
                "files": [str(file) for file in done.files],
                "remarks": [{"patch": name, "remark": remark} for name, remark in done.remarks],
                "unchecked": list(done.unchecked),
            }
        )
        return
    for file in done.files:
        click.echo(f"wrote {file}")
    for name, remark in done.remarks:
        click.echo(f"style, {name[:4]}: {remark}")
    for what in done.unchecked:
        show.note(f"note: {what}")


@click.command()
@pin_option
@click.option("--only", multiple=True, metavar="REGEX", help="Run tests whose names match; may be repeated.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=1800,
    show_default=True,
    metavar="SECONDS",
    help="Limit for each test.",
)
@click.option(
    "--jobs", "-j", type=click.IntRange(min=1), metavar="N", help="Compilers at once. [default: by CPUs and memory]"
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def test(pin_name: str, only: tuple[str, ...], timeout: float, jobs: int | None, as_json: bool) -> None:
    """Run llama.cpp's own tests without and with the series.

    Builds and runs the tests that need only a CPU and no download: quantization functions, ggml's operations on the
    CPU, tokenizers, GGUF, chat templates, grammars, arguments. Results are remembered and shown by `apex patch status`;
    after a change to the series, only the tests with it run again. Exits with code 28 if a test passes without the
    series and fails with it.

    \b
    Examples:
      apex patch test                            # takes about an hour on two cores
      apex patch test --only quantize --only gguf
      apex patch test --pin latest --jobs 2 --json
    """
    for one in only:
        try:
            re.compile(one)
        except re.error as error:
            raise click.UsageError(f"--only {one}: not a regular expression: {error}") from None
    pin = load_pin(pin_name)
    with show.progress() as report:
        found = upstream_tests.run_both_sides(pin, only=only, jobs=jobs, timeout=timeout, report=report)
    if as_json:
        show.as_json(
            {
                "pin": pin.name,
                "source": found.identity,
                "without": dict(found.without),
                "with": dict(found.with_),
                "broken": list(found.broken),
                "left_out": dict(found.left_out),
                "runnable": found.runnable,
            }
        )
    else:
        _say("without the series", found.without, found.reused[0])
        _say("with the series", found.with_, found.reused[1])
        for name, state in sorted(found.with_.items()):
            if state != "passed":
                click.echo(f"  {name}: {state}; without the series: {found.without.get(name, 'not there')}")
        for why, count in Counter(found.left_out.values()).items():
            click.echo(f"left out: {count}, {why}")
    if found.broken:
        names = ", ".join(found.broken)
        raise UpstreamTestsFailed(
            f"{pin.name}: {len(found.broken)} of llama.cpp's tests pass without the series and fail with it: {names}",
            hint=f"their output is in {upstream_tests.logs(pin)}; apex patch edit{pin.option} opens the series",
        )
    if not as_json:
        click.echo(
            f"{pin.name}: no test passes without the series and fails with it ({len(found.with_)} of {found.runnable} "
            "run)"
        )


def _say(which: str, outcomes: Mapping[str, str], reused: int) -> None:
    passed = sum(state == "passed" for state in outcomes.values())
    remembered = f", {reused} of them earlier" if reused else ""
    click.echo(f"{which}: {len(outcomes)} run{remembered}, {passed} passed")
