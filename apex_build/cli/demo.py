"""`apex demo`: the whole road once, on a small model: build, calibrate, quantize, verify, and count accepted drafts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from apex_build import places
from apex_build.calibration.run import Settings, calibrate
from apex_build.calibration.sets import compose, load_set
from apex_build.cli import show
from apex_build.cli.check import checked, print_checked
from apex_build.cli.options import json_option
from apex_build.cli.serving import command_line
from apex_build.errors import ModelMissing, OutputUnwritable
from apex_build.evaluation.pace import active_parameters, expect, tokens_of
from apex_build.evaluation.pieces import piece_of
from apex_build.evaluation.run import Inputs, Work, evaluate, plan_work
from apex_build.evaluation.services import settings_for, the_one_serving
from apex_build.evaluation.task import read_prompts
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.coverage import Coverage
from apex_build.gguf_model.metadata import who_quantizes
from apex_build.gguf_model.model import read_model
from apex_build.hookspecs import Service
from apex_build.parameters import Value
from apex_build.plugins import load_plugins
from apex_build.progress import Piece, Report, Whole
from apex_build.quantization.naming import TEMPLATE
from apex_build.quantization.run import prepare, run
from apex_build.source.fetch import ensure_source
from apex_build.source.pins import load_pin
from apex_build.toolchain.build.run import ensure_tools
from apex_build.toolchain.machine.compilers import find_compiler

# A model of ten layers or fewer would be all edge with the defaults.
_SMALL = {"edge": 1, "near": 1, "attention_edge": 1}
_FILES: tuple[tuple[str, dict[str, Value]], ...] = (("i-nano", {}), ("i-nano, head IQ3_XXS+Q5_K", {"draft_head": "IQ3_XXS+Q5_K"}))
_QUANTIZING, _CHECKING = 4.0, 8.0  # seconds, about
_COLUMNS = ("file", "bytes", "bits per weight", "trunk types", "head types", "head calibrated", "drafts accepted")


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), default="demo", show_default=True, help="Folder for what is made.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: the tools' own choice]")
@json_option
def command(output: Path, threads: int | None, json_: bool) -> None:
    """Build the tools, calibrate the shipped test model with its draft head, quantize it twice, and compare.

    The model comes with a checkout of the project alone: an installed package has none, and its demo is apex calibrate and
    apex quantize on your own model.

    The second file has the experts of its draft head at IQ3_XXS, which llama-quantize refuses without calibration data of the head,
    and is checked at the end: does it write text, are its drafts accepted? What is there
    already is used again.

    \b
    Examples:
      apex demo
      apex demo -o somewhere/else --json
    """
    testbed = places.data_root() / "tests" / "testbed"
    source_model = testbed / "testbed-f16.gguf"
    if not source_model.is_file():
        raise ModelMissing(
            f"{source_model}: the demo's model comes with a checkout of the project, not with the installed package",
            hint="apex calibrate MODEL, with your own model; or apex demo in a checkout",
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputUnwritable(f"{output}: the folder cannot be made: {error.strerror}", hint="apex demo -o FOLDER") from None
    plugins = load_plugins()
    drafting, service = the_one_serving(plugins.evaluators(), "check", "accepted")
    with show.progress() as report:
        find_compiler()  # before anything is fetched
        pin = load_pin()
        tools = ensure_tools(ensure_source(pin, report), pin, report=report)
        model = read_model(source_model, plugins.role_of)
        text = compose(load_set("default"), plugins.calibration_sources(), model)
        how = Settings(threads=threads)
        drafts = settings_for(drafting, service)
        inputs = Inputs(prompts=read_prompts(testbed / "heldout" / "prompts.jsonl"), settings=drafts)
        pieces = _pieces(model, len(text.data), plan_work(drafting, model, inputs, tools, threads=threads))
        whole = Whole("demo", report, pieces)
        numbers = iter(range(len(pieces)))
        with _piece(whole, next(numbers)) as report:
            calibrated = calibrate(model, text, tools, output / "testbed.imatrix.gguf", how, replace=True, report=report)
        rows = [_row("F16", model, None)]
        for name, settings in _FILES:
            policy = plugins.policy("i-nano")
            job = prepare(
                model,
                policy,
                {**_SMALL, **settings},
                tools,
                output,
                imatrix=calibrated.path,
                metadata=who_quantizes(()),
                name=TEMPLATE,
            )
            with _piece(whole, next(numbers)) as report:
                run(job, replace=True, threads=threads, report=report)
            rows.append(_row(name, read_model(job.out, plugins.role_of), calibrated.coverage))
        for row in rows:
            number, drafted = next(numbers), read_model(Path(row["path"]), plugins.role_of)
            with _piece(whole, number) as report:
                work = plan_work(drafting, drafted, inputs, tools, threads=threads, report=report)
                pieces[number], _ = piece_of([work])
                row["acceptance"] = _acceptance(work, service, output)
        with _piece(whole, next(numbers)) as report:
            verdict = checked(read_model(Path(rows[-1]["path"]), plugins.role_of), plugins, tools, threads=threads, report=report)
    if json_:
        show.as_json(rows)
        verdict.refuse()
        return
    show.table(
        "The test model (six layers: edge=1 near=1 attention_edge=1), its draft head calibrated",
        _COLUMNS,
        [_cells(row) for row in rows],
        right=("bytes", "bits per weight"),
    )
    print_checked(verdict)
    verdict.refuse()
    click.echo(f"run the last: {command_line(Path(rows[-1]['path']), model, tools)}")


def _pieces(model: Model, n_bytes: int, work: Work) -> list[Piece]:
    """What is to be done once the tools are there; the drafting of files that do not exist yet is expected to be like F16's."""
    tokens = tokens_of(n_bytes) * active_parameters(model)
    drafted, _ = piece_of([work])
    return [
        Piece("calibrate", {"calibrating": 1.0}, expect("calibrate", tokens).seconds),
        *(Piece("quantize", {}, _QUANTIZING) for _ in _FILES),
        *(Piece(drafted.kind, {name: drafted.units}, drafted.expected) for name in ("F16", *(name for name, _ in _FILES))),
        Piece("check", {}, _CHECKING),
    ]


@contextmanager
def _piece(whole: Whole, number: int) -> Iterator[Report]:
    yield whole.of(number)
    whole.finish(number)


def _row(name: str, model: Model, covered: Coverage | None) -> dict[str, Any]:
    n_bytes = sum(tensor.n_bytes for tensor in model.tensors)
    return {
        "file": name, "path": str(model.path), "bytes": model.path.stat().st_size,
        "bits_per_weight": n_bytes * 8 / sum(tensor.n_elements for tensor in model.tensors),
        "trunk_types": _types(model, head=False), "head_types": _types(model, head=True),
        "head_with_data": sum(tensor.has_data for tensor in covered.head) if covered else None,
        "head_weights": len(covered.head) if covered else None,
    }  # fmt: skip


def _types(model: Model, *, head: bool) -> list[str]:
    """Types of the matrices, those with the most bytes first."""
    totals: dict[str, int] = {}
    for tensor in model.tensors:
        if tensor.draft_head == head and tensor.type != "F32":
            totals[tensor.type] = totals.get(tensor.type, 0) + tensor.n_bytes
    return sorted(totals, key=lambda name: -totals[name])


def _acceptance(work: Work, service: Service, output: Path) -> dict[str, dict[str, float | None]]:
    """Tokens drafted and accepted, by domain. Measured once for a file, these prompts and these tools."""
    (result,) = evaluate([work], output / "acceptance.jsonl")
    if result.error:
        raise result.error
    counts: dict[str, dict[str, float | None]] = {}
    for figure in result.figures:
        for meaning in ("drafted", "accepted"):
            if figure.name == service.figures[meaning]:
                counts.setdefault(figure.domain or "all", {})[meaning] = figure.value
    return counts


def _cells(row: dict[str, Any]) -> list[str]:
    drafted, accepted = (int(row["acceptance"]["all"][name]) for name in ("drafted", "accepted"))
    head = "-" if row["head_with_data"] is None else f"{row['head_with_data']} of {row['head_weights']} weights"
    rate = f"{accepted / drafted:.1%} ({accepted} of {drafted})" if drafted else "nothing drafted"
    bits = f"{row['bits_per_weight']:.3f}"
    return [row["file"], str(row["bytes"]), bits, ", ".join(row["trunk_types"]), ", ".join(row["head_types"]), head, rate]
