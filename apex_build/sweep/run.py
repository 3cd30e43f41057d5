"""Run a sweep: quantize each point's file, measure it, record the result, and delete the file."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

from apex_build import __version__
from apex_build.errors import ApexError
from apex_build.evaluation.run import Work, plan_work
from apex_build.gguf_model.catalogue import Model
from apex_build.native.run import unwinding_signals
from apex_build.progress import Report, silent
from apex_build.quantization.preflight import without_data
from apex_build.quantization.provenance import identity as file_identity
from apex_build.storage.disk import writing
from apex_build.storage.locks import locked
from apex_build.sweep.files import Files, Measured, imatrices_for, paired_baseline, recipes_of
from apex_build.sweep.plan import FILES, MEASURED, Point, Sweep, check_folder
from apex_build.sweep.rows import Row, results_of, write_rows

Progress = Callable[[], AbstractContextManager[Report]]


@dataclass(frozen=True)
class Outcome:
    """A point's row. `reused`: measured before. `errors`: from evaluators that failed; such a row is not recorded."""

    row: Row
    reused: bool = False
    errors: tuple[ApexError, ...] = ()


class Measure(Protocol):
    """Makes and measures the files of points, each given as soon as it is measured: here, or on a cluster.

    `keep`: the files stay in the sweep's folder. `progress` is entered once for each point, in order.
    """

    def __call__(
        self, sweep: Sweep, points: Sequence[Point], *, keep: bool, progress: Progress
    ) -> Generator[tuple[Point, Measured], None, None]: ...


def run_sweep(
    sweep: Sweep,
    *,
    keep: bool = False,
    progress: Progress = lambda: nullcontext(silent),
    measure: Measure | None = None,
) -> Generator[Outcome, None, None]:
    """Quantize and measure the points, in order; on a cluster (`measure`) those come first that are done first. Each
    is recorded in `sweep.jsonl` before it is given.

    A file is deleted once it is measured, unless `keep`; an interrupted run leaves the current one, and the next run
    resumes there. Raises what `quantization.run.run` raises, and OutputUnwritable.
    """
    folder = sweep.request.folder
    with locked(folder), unwinding_signals():
        check_folder(folder, sweep.parts)  # again: another sweep may have written there since
        with writing(folder):
            folder.mkdir(exist_ok=True)
        results = results_of(folder, sweep.parts)
        done = dict.fromkeys((point.identity for point in sweep.points), None) | dict(sweep.known)
        write_rows(results, [row for row in done.values() if row])  # from now on the folder is this sweep's
        todo = {point.identity: point for point in points_to_do(sweep)}
        with contextlib.closing(
            (measure or measure_here)(sweep, [*todo.values()], keep=keep, progress=progress)
        ) as ran:
            for point in sweep.points:
                if point.identity in todo:
                    outcome = _outcome(sweep, *next(ran))
                else:
                    known = sweep.known.get(point.identity)
                    # its role in this sweep may have changed: an earlier point may now be the baseline
                    outcome = (
                        Outcome(replace(known, baseline=point.baseline), True)
                        if known
                        else Outcome(planned_row(point, sweep))
                    )
                if not outcome.errors:
                    done[outcome.row.identity] = outcome.row
                    write_rows(results, [row for row in done.values() if row])
                yield outcome
            next(ran, None)  # it clears up


def measure_here(
    sweep: Sweep, points: Sequence[Point], *, keep: bool, progress: Progress
) -> Generator[tuple[Point, Measured], None, None]:
    """One after the other (`Measure`)."""
    if not points:
        return
    request, baseline = sweep.request, paired_baseline(sweep)
    folder = request.folder / FILES
    folder.mkdir(exist_ok=True)
    recipes = recipes_of(sweep, [*points, *([baseline] if baseline else [])], imatrices_for(sweep), folder)
    files = Files(folder, request.tools, sweep.evaluators, request.inputs, request.threads)
    for point in points:
        with progress() as report:
            measured = files.measure(
                recipes[point.identity],
                recipes[baseline.identity] if baseline else None,
                request.folder / MEASURED,
                report,
                keep=keep or point.baseline,
            )
        yield point, measured
    files.clear(keep)


def in_order(sweep: Sweep, outcomes: Iterable[Outcome]) -> list[Outcome]:
    """As the sweep's points are."""
    places = {point.identity: number for number, point in enumerate(sweep.points)}
    return sorted(outcomes, key=lambda outcome: places[outcome.row.identity])


def points_to_do(sweep: Sweep) -> list[Point]:
    """Those that can be quantized and were not measured before."""
    return [point for point in sweep.points if point.job and point.identity not in sweep.known]


def planned_works(sweep: Sweep) -> list[list[Work]]:
    """The evaluators' work for each point that will be measured, for time estimates."""
    request = sweep.request
    works = [
        plan_work(one, request.model, request.inputs, request.tools, threads=request.threads)
        for one in sweep.evaluators
    ]
    baseline = paired_baseline(sweep)

    def file(point: Point) -> Model:
        assert point.job is not None
        return replace(request.model, path=request.folder / FILES / point.job.out.name)

    reference = file(baseline) if baseline else request.inputs.reference
    return [
        [replace(work, task=replace(work.task, model=file(point), reference=reference)) for work in works]
        for point in points_to_do(sweep)
    ]


def planned_row(point: Point, sweep: Sweep) -> Row:
    """The row before anything is measured."""
    entries = point.plan.entries if point.plan else ()
    head = sum(entry.n_bytes for entry in entries if entry.draft_head)
    return Row(
        identity=point.identity,
        values=point.values,
        head_data=point.head_data,
        baseline=point.baseline,
        head_bytes=head if point.plan else None,
        trunk_bytes=point.plan.n_bytes - head if point.plan else None,
        file_bytes=point.job.n_bytes if point.job else None,
        refused=point.refused,
        uncalibrated=bool(point.job and without_data(point.job.plan.entries, point.job.covered)),
        imatrix=str(point.job.keys.get("apex.imatrix", "")) if point.job else "",
        file=file_identity(point.job.keys) if point.job else "",
        tools=sweep.request.tools.identity,
        apex=__version__,
    )


def _outcome(sweep: Sweep, point: Point, measured: Measured) -> Outcome:
    errors = tuple(measured.errors.values())
    row = replace(
        planned_row(point, sweep),
        figures=measured.figures,
        results=measured.results,
        failed={name: error.message for name, error in measured.errors.items()},
        seconds=measured.seconds,
        measured="" if errors else datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
    return Outcome(row, errors=errors)
