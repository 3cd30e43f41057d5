"""All stages once, on the shipped test model: build, calibrate, quantize twice, count accepted drafts, check the
last file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from apex_build import places
from apex_build.calibration.run import Settings
from apex_build.errors import ModelMissing, OutputUnwritable
from apex_build.evaluation.check import Checked
from apex_build.evaluation.pace import active_parameters, expect, tokens_of
from apex_build.evaluation.pieces import piece_of
from apex_build.evaluation.run import Work
from apex_build.evaluation.services import settings_for, the_one_serving
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.coverage import Coverage
from apex_build.hookspecs import Service
from apex_build.native.toolset import Toolset
from apex_build.parameters import Value
from apex_build.plugins import load_plugins
from apex_build.progress import Piece, Report, Whole, silent
from apex_build.source.fetch import ensure_source
from apex_build.source.pins import load_pin
from apex_build.stages.calibrate import CalibrateOptions, calibrate, text_of
from apex_build.stages.check import CheckOptions, check
from apex_build.stages.evaluate import EvaluateOptions, evaluate, plan
from apex_build.stages.given import Workplace
from apex_build.stages.quantize import QuantizeOptions, quantize
from apex_build.toolchain.build.run import ensure_tools
from apex_build.toolchain.machine.compilers import find_compiler

# A model of ten layers or fewer would be all edge with the defaults.
_SMALL: Mapping[str, Value] = {"edge": 1, "near": 1, "attention_edge": 1}
FILES: tuple[tuple[str, Mapping[str, Value]], ...] = (
    ("i-nano", {}),
    ("i-nano, head IQ3_XXS+Q5_K", {"draft_head": "IQ3_XXS+Q5_K"}),
)
_QUANTIZING, _CHECKING = 4.0, 8.0  # seconds, about


@dataclass(frozen=True)
class Row:
    """One file. `head_with_data`, `head_weights`: counts of the head's weights, None for the source model;
    `acceptance`: by domain.
    """

    file: str
    path: Path
    bytes: int
    bits_per_weight: float
    trunk_types: tuple[str, ...]
    head_types: tuple[str, ...]
    head_with_data: int | None
    head_weights: int | None
    acceptance: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Demo:
    rows: tuple[Row, ...]
    verdict: Checked  # on the last file
    model: Model
    tools: Toolset


def demo(out: Path, *, threads: int | None = None, report: Report = silent) -> Demo:
    """Make everything in the folder `out`; results of an earlier demo are reused.

    Raises ModelMissing without the test model (it comes with a checkout), and what the stages raise.
    """
    testbed = places.data_root() / "tests" / "testbed"
    if not (source := testbed / "testbed-f16.gguf").is_file():
        raise ModelMissing(
            f"{source}: the demo's model comes with a checkout of the project, not with the installed package",
            hint="apex calibrate MODEL, with a model of your own; or apex demo in a checkout",
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputUnwritable(
            f"{out}: the folder cannot be made: {error.strerror}", hint="apex demo -o FOLDER"
        ) from None
    plugins = load_plugins()
    find_compiler()  # before anything is fetched
    pin = load_pin()
    place = Workplace(plugins, report, ensure_tools(ensure_source(pin, report), pin, report=report))
    model = place.model(source)
    evaluator, service = the_one_serving(plugins.evaluators(), "check", "accepted")
    drafting = EvaluateOptions(
        prompts=testbed / "heldout" / "prompts.jsonl",
        only=(evaluator.name,),
        settings=settings_for(evaluator, service),
        threads=threads,
        results=out / "acceptance.jsonl",
    )
    calibrating = CalibrateOptions(settings=Settings(threads=threads), rows_check=False, replace=True)
    text = text_of(model, calibrating, plugins)
    pieces = _pieces(model, len(text.data), plan([model], drafting, place=place).works[0])
    whole = Whole("demo", report, pieces)
    numbers = iter(range(len(pieces)))

    @contextmanager
    def piece(number: int) -> Iterator[Workplace]:
        yield replace(place, report=whole.of(number))
        whole.finish(number)

    with piece(next(numbers)) as here:
        calibrated = calibrate(model, out / "testbed.imatrix.gguf", calibrating, text=text, place=here)
    rows = [_row("F16", model, None)]
    for name, settings in FILES:
        options = QuantizeOptions(("i-nano",), {**_SMALL, **settings}, calibrated.path, threads=threads, replace=True)
        with piece(next(numbers)) as here:
            (made,) = quantize(model, out, options, place=here)
        rows.append(_row(name, place.model(made.path), calibrated.coverage))
    for at, row in enumerate(rows):
        with piece(number := next(numbers)) as here:
            pieces[number], _ = piece_of(plan([row.path], drafting, place=here).works)
            rows[at] = replace(row, acceptance=_acceptance(row.path, drafting, service, here))
    with piece(next(numbers)) as here:
        verdict = check(rows[-1].path, CheckOptions(threads=threads), place=here)
    return Demo(tuple(rows), verdict, model, place.tools)


def _pieces(model: Model, n_bytes: int, work: Work) -> list[Piece]:
    """The work after the build; files that do not exist yet are expected to draft like the F16."""
    tokens = tokens_of(n_bytes) * active_parameters(model)
    drafted, _ = piece_of([work])
    return [
        Piece("calibrate", {"calibrating": 1.0}, expect("calibrate", tokens, gpu=work.task.gpu).seconds),
        *(Piece("quantize", {}, _QUANTIZING) for _ in FILES),
        *(
            Piece(drafted.kind, {name: drafted.units}, drafted.expected)
            for name in ("F16", *(name for name, _ in FILES))
        ),
        Piece("check", {}, _CHECKING),
    ]


def _row(name: str, model: Model, covered: Coverage | None) -> Row:
    n_bytes = sum(tensor.n_bytes for tensor in model.tensors)
    return Row(
        file=name,
        path=model.path,
        bytes=model.path.stat().st_size,
        bits_per_weight=n_bytes * 8 / sum(tensor.n_elements for tensor in model.tensors),
        trunk_types=_types(model, head=False),
        head_types=_types(model, head=True),
        head_with_data=sum(tensor.has_data for tensor in covered.head) if covered else None,
        head_weights=len(covered.head) if covered else None,
    )


def _types(model: Model, *, head: bool) -> tuple[str, ...]:
    """Types of the matrices, most bytes first."""
    totals: dict[str, int] = {}
    for tensor in model.tensors:
        if tensor.draft_head == head and tensor.type != "F32":
            totals[tensor.type] = totals.get(tensor.type, 0) + tensor.n_bytes
    return tuple(sorted(totals, key=lambda name: -totals[name]))


def _acceptance(
    file: Path, options: EvaluateOptions, service: Service, place: Workplace
) -> dict[str, dict[str, float | None]]:
    """Tokens drafted and accepted, by domain. Measured once for each file, prompts and tools."""
    (result,) = evaluate([file], options, place=place)
    if result.error:
        raise result.error
    counts: dict[str, dict[str, float | None]] = {}
    for figure in result.figures:
        for meaning in ("drafted", "accepted"):
            if figure.name == service.figures[meaning]:
                counts.setdefault(figure.domain or "all", {})[meaning] = figure.value
    return counts
