"""A sweep's files: how each is made, measured and deleted, in whatever folder: the sweep's own, or a worker's."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from apex_build.errors import ApexError
from apex_build.evaluation.run import Inputs, evaluate, plan_work, record, with_report
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.model import read_model
from apex_build.hookspecs import Evaluator, Figure
from apex_build.native.toolset import Toolset
from apex_build.progress import Report
from apex_build.quantization.run import Job, run
from apex_build.storage.outputs import with_manifest_and_log
from apex_build.sweep.plan import Point, Sweep
from apex_build.sweep.request import headless_name
from apex_build.sweep.rows import curve_name
from apex_build.sweep.shared_trunk import head_job, trunk_job
from apex_build.sweep.without_head import write_without_head

_TRUNK = "trunk-"


@dataclass(frozen=True)
class Recipe:
    """How a file is made: from the model, or from the file of `trunk`, which is made first and kept for others."""

    job: Job
    trunk: Job | None = None


@dataclass(frozen=True)
class Measured:
    """What measuring a point gave, by evaluator: figures and their identities in the results file, or the error.

    `records`: the lines of the results file.
    """

    figures: Mapping[str, tuple[Figure, ...]]
    results: Mapping[str, str]
    errors: Mapping[str, ApexError]
    seconds: float
    records: tuple[Mapping[str, Any], ...] = ()


@dataclass
class Files:
    """The files of a running sweep: the trunk that all are made from, the baseline, and the one being measured.

    `wait`: what to wait for where another run makes the same file; without it that is an error.
    """

    folder: Path
    tools: Toolset
    evaluators: Sequence[Evaluator]
    inputs: Inputs
    threads: int | None = None
    wait: str = ""
    made: dict[str, Model] = field(default_factory=dict)

    def measure(
        self, recipe: Recipe, baseline: Recipe | None, results: Path | None, report: Report, *, keep: bool
    ) -> Measured:
        """Make the file, and that of `baseline`, which stays; measure, and delete the file unless `keep`."""
        began, inputs = time.monotonic(), self.inputs
        if baseline is not None:
            inputs = replace(inputs, reference=self._file(baseline, report))
        model = self._file(recipe, report)
        works = [plan_work(one, model, inputs, self.tools, threads=self.threads) for one in self.evaluators]
        found = list(evaluate([with_report(work, report) for work in works], results))
        if not keep:
            _delete(self.made.pop(model.path.name).path)
        good = [one for one in found if one.error is None]
        return Measured(
            figures={one.work.evaluator.name: one.figures for one in good},
            results={one.work.evaluator.name: one.work.identity for one in good},
            errors={one.work.evaluator.name: one.error for one in found if one.error is not None},
            seconds=round(time.monotonic() - began, 3),
            records=tuple(map(record, good)),
        )

    def clear(self, keep: bool) -> None:
        """Remove what is left: the trunk, and the baseline unless files are kept."""
        for name, model in self.made.items():
            if not keep or name.startswith(_TRUNK):
                _delete(model.path)
        with contextlib.suppress(OSError):  # not empty
            self.folder.rmdir()

    def _file(self, recipe: Recipe, report: Report) -> Model:
        job = recipe.job
        if job.out.name not in self.made and recipe.trunk is not None:
            job = head_job(job, self._run(recipe.trunk, report))
        return self._run(job, report)

    def _run(self, job: Job, report: Report) -> Model:
        """The job's file, made once."""
        if job.out.name not in self.made:
            path = run(job, replace=True, threads=self.threads, wait=self.wait, report=report).path
            self.made[path.name] = read_model(path, _no_role)
        return self.made[job.out.name]


def imatrices_for(sweep: Sweep) -> dict[bool, Path | None]:
    """Curve -> imatrix. That without the head's entries is written to the sweep's folder, if it is derived."""
    request = sweep.request
    found: dict[bool, Path | None] = {True: request.imatrix, False: request.imatrix_without_head or request.imatrix}
    if sweep.derived and request.imatrix is not None:
        found[False] = made = request.folder / headless_name(request)
        write_without_head(request.imatrix, request.model, made)
    return found


def recipes_of(
    sweep: Sweep, points: Iterable[Point], imatrices: Mapping[bool, Path | None], folder: Path
) -> dict[str, Recipe]:
    """By the point's identity, of those that can be quantized. `folder`: where the files will be."""

    def placed(point: Point) -> Job:
        assert point.job is not None
        return replace(point.job, imatrix=imatrices[point.head_data], out=folder / point.job.out)

    trunks: dict[str, Job] = {}

    def trunk_of(point: Point) -> Job:
        # a derived imatrix has the same data for the trunk as the one that it was made of
        like = next(one for one in sweep.points if one.job and (sweep.derived or one.head_data == point.head_data))
        if like.identity not in trunks:
            name = f"{_TRUNK}{curve_name(like.head_data).replace(' ', '-')}.gguf"
            trunks[like.identity] = trunk_job(placed(like), folder / name)
        return trunks[like.identity]

    return {
        point.identity: Recipe(placed(point), trunk_of(point) if sweep.trunk_once else None)
        for point in points
        if point.job
    }


def paired_baseline(sweep: Sweep) -> Point | None:
    """The baseline, where an evaluator compares with it."""
    paired = any("reference" in (*one.needs, *one.uses) for one in sweep.evaluators)
    return sweep.baseline if paired else None


def _delete(path: Path) -> None:
    for one in with_manifest_and_log(path):
        one.unlink(missing_ok=True)


def _no_role(_architecture: str, _tensor: str) -> None:
    """Roles are no longer needed."""
