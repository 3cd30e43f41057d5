"""Run a sweep: quantize each point's file, measure it, record the result, and delete the file."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from apex_build import __version__
from apex_build.errors import ApexError
from apex_build.evaluation.run import Work, evaluate, plan_work, with_report
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.model import read_model
from apex_build.native.run import unwinding_signals
from apex_build.progress import Report, silent
from apex_build.quantization.preflight import without_data
from apex_build.quantization.provenance import identity as file_identity
from apex_build.quantization.run import Job, run
from apex_build.storage.disk import writing
from apex_build.storage.locks import locked
from apex_build.storage.outputs import with_manifest_and_log
from apex_build.sweep.plan import FILES, MEASURED, Point, Sweep, check_folder
from apex_build.sweep.request import headless_name
from apex_build.sweep.rows import Row, curve_name, results_of, write_rows
from apex_build.sweep.shared_trunk import head_job, trunk_job
from apex_build.sweep.without_head import write_without_head

Progress = Callable[[], AbstractContextManager[Report]]


@dataclass(frozen=True)
class Outcome:
    """A point's row. `reused`: measured before. `errors`: from evaluators that failed; such a row is not recorded."""

    row: Row
    reused: bool = False
    errors: tuple[ApexError, ...] = ()


def run_sweep(
    sweep: Sweep, *, keep: bool = False, progress: Progress = lambda: nullcontext(silent)
) -> Generator[Outcome, None, None]:
    """Quantize and measure the points, in order. Each is recorded in `sweep.jsonl` before it is given.

    A file is deleted once it is measured, unless `keep`; an interrupted run leaves the current one, and the next run
    resumes there. `progress` is entered for each point. Raises what `quantization.run.run` raises, and
    OutputUnwritable.
    """
    folder = sweep.request.folder
    with locked(folder), unwinding_signals():
        check_folder(folder, sweep.parts)  # again: another sweep may have written there since
        with writing(folder):
            folder.mkdir(exist_ok=True)
        results = results_of(folder, sweep.parts)
        done = dict.fromkeys((point.identity for point in sweep.points), None) | dict(sweep.known)
        write_rows(results, [row for row in done.values() if row])  # from now on the folder is this sweep's
        todo = {point.identity for point in sweep.points if point.job and point.identity not in sweep.known}
        files = _Files(sweep) if todo else None
        for point in sweep.points:
            if files and point.identity in todo:
                with progress() as report:
                    outcome = files.measure(point, keep, report)
            else:
                known = sweep.known.get(point.identity)
                # its role in this sweep may have changed: an earlier point may now be the baseline
                outcome = (
                    Outcome(replace(known, baseline=point.baseline), True)
                    if known
                    else Outcome(planned_row(point, sweep))
                )
            if not outcome.errors:
                done[point.identity] = outcome.row
                write_rows(results, [row for row in done.values() if row])
            yield outcome
        if files:
            files.clear(keep)


def planned_works(sweep: Sweep) -> list[list[Work]]:
    """The evaluators' work for each point that will be measured, for time estimates."""
    request = sweep.request
    works = [
        plan_work(one, request.model, request.inputs, request.tools, threads=request.threads)
        for one in sweep.evaluators
    ]
    paired = sweep.baseline and any("reference" in (*one.needs, *one.uses) for one in sweep.evaluators)

    def file(point: Point) -> Model:
        assert point.job is not None
        return replace(request.model, path=request.folder / "files" / point.job.out.name)

    reference = file(sweep.baseline) if sweep.baseline and paired else request.inputs.reference
    todo = [point for point in sweep.points if point.job and point.identity not in sweep.known]
    return [
        [replace(work, task=replace(work.task, model=file(point), reference=reference)) for work in works]
        for point in todo
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


@dataclass
class _Files:
    """Files of a running sweep: the trunk that all are made from, the baseline, and the one being measured."""

    sweep: Sweep
    made: dict[str, Model] = field(default_factory=dict)

    def __post_init__(self) -> None:
        request = self.sweep.request
        self.folder = request.folder / FILES
        self.folder.mkdir(exist_ok=True)
        self.imatrices: dict[bool, Path | None] = {
            True: request.imatrix,
            False: request.imatrix_without_head or request.imatrix,
        }
        if self.sweep.derived and request.imatrix is not None:
            self.imatrices[False] = made = request.folder / headless_name(request)
            write_without_head(request.imatrix, request.model, made)

    def measure(self, point: Point, keep: bool, report: Report) -> Outcome:
        request, began = self.sweep.request, time.monotonic()
        inputs = request.inputs
        if self.sweep.baseline and any("reference" in (*one.needs, *one.uses) for one in self.sweep.evaluators):
            inputs = replace(inputs, reference=self._file(self.sweep.baseline, report))
        model = self._file(point, report)
        works = [plan_work(one, model, inputs, request.tools, threads=request.threads) for one in self.sweep.evaluators]
        results = list(evaluate([with_report(work, report) for work in works], request.folder / MEASURED))
        if not keep and not point.baseline:
            _delete(self.made.pop(model.path.name).path)
        errors = tuple(result.error for result in results if result.error)
        row = replace(
            planned_row(point, self.sweep),
            figures={result.work.evaluator.name: result.figures for result in results if not result.error},
            results={result.work.evaluator.name: result.work.identity for result in results if not result.error},
            failed={result.work.evaluator.name: result.error.message for result in results if result.error},
            seconds=round(time.monotonic() - began, 3),
            measured="" if errors else datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        return Outcome(row, errors=errors)

    def clear(self, keep: bool) -> None:
        """Remove what is left: the trunk, and the baseline unless files are kept."""
        for name, model in self.made.items():
            if not keep or name.startswith("trunk-"):
                _delete(model.path)
        with contextlib.suppress(OSError):  # not empty
            self.folder.rmdir()

    def _file(self, point: Point, report: Report) -> Model:
        job = self._here(point)
        if job.out.name not in self.made and self.sweep.trunk_once:
            # a derived imatrix has the same data for the trunk as the one that it was made of
            like = next(
                one for one in self.sweep.points if one.job and (self.sweep.derived or one.head_data == point.head_data)
            )
            name = f"trunk-{curve_name(like.head_data).replace(' ', '-')}.gguf"
            job = head_job(job, self._run(trunk_job(self._here(like), self.folder / name), report))
        return self._run(job, report)

    def _here(self, point: Point) -> Job:
        """The point's job, with the places of this run."""
        assert point.job is not None
        return replace(point.job, imatrix=self.imatrices[point.head_data], out=self.folder / point.job.out)

    def _run(self, job: Job, report: Report) -> Model:
        """The job's file, made once."""
        if job.out.name not in self.made:
            path = run(job, replace=True, threads=self.sweep.request.threads, report=report).path
            self.made[path.name] = read_model(path, _no_role)
        return self.made[job.out.name]


def _delete(path: Path) -> None:
    for one in with_manifest_and_log(path):
        one.unlink(missing_ok=True)


def _no_role(_architecture: str, _tensor: str) -> None:
    """Roles are no longer needed."""
