"""A sweep's points as tasks of a cluster: each file is quantized, measured and deleted by a worker."""

from __future__ import annotations

import zlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apex_build.cluster import worker as remote
from apex_build.cluster.connect import Cluster
from apex_build.cluster.tasks import ClusterTasks, order_of, order_of_file
from apex_build.errors import EvaluationRefused
from apex_build.evaluation.run import append_record
from apex_build.loaded import origin_of
from apex_build.native.toolset import Toolset
from apex_build.progress import Report
from apex_build.quantization.run import Job
from apex_build.storage.digests import sha256_json
from apex_build.sweep.files import Measured, Recipe, imatrices_for, paired_baseline, recipes_of
from apex_build.sweep.plan import MEASURED, Point, Sweep
from apex_build.sweep.run import Progress

if TYPE_CHECKING:
    from distributed import Future


@dataclass
class ClusterPoints:
    cluster: Cluster
    tools: Toolset
    report: Report

    def __call__(
        self, sweep: Sweep, points: Sequence[Point], *, keep: bool, progress: Progress
    ) -> Generator[tuple[Point, Measured], None, None]:
        """`sweep.run.Measure`; `keep` was refused (`check_cluster`). What evaluators gave is recorded as it arrives."""
        if not points:
            return
        request, orders = sweep.request, self._orders(sweep, points)
        files = {Path(one.path) for order in orders for one in _files_of(order)}
        models = (request.model, *([request.inputs.reference] if request.inputs.reference else []))
        tasks = ClusterTasks(self.cluster, self.tools, models, tuple(sorted(files)))
        bars = [ExitStack() for _ in points]
        reports = [bar.enter_context(progress()) for bar in bars]

        def submit(number: int) -> Future:
            # also by the model's path: two clients may mean the same file by two names
            key = sha256_json([points[number].identity, orders[number].model.path])
            return tasks.submit(remote.run_point, orders[number], f"apex-point-{key[:32]}", reports[number])

        with closing(tasks.each(range(len(points)), submit, self.report)) as done:
            for number, future in done:
                measured: Measured = tasks.result(future, points[number].name)
                for row in measured.records:
                    append_record(request.folder / MEASURED, row)
                bars[number].close()
                yield points[number], measured
        with suppress(Exception):  # of a scheduler that is gone: apex cache prune removes it there
            self.cluster.client.run(remote.end_sweep, orders[0].sweep, workers=sorted(self.cluster.fit))

    def _orders(self, sweep: Sweep, points: Sequence[Point]) -> list[remote.PointOrder]:
        request, inputs, baseline = sweep.request, sweep.request.inputs, paired_baseline(sweep)
        imatrices = imatrices_for(sweep)
        recipes = recipes_of(sweep, [*points, *([baseline] if baseline else [])], imatrices, Path())
        files = {path: order_of_file(path) for path in imatrices.values() if path}
        model = order_of(request.model)
        name = sha256_json([sweep.parts, model.path])[:32]
        wanted = {kind for one in sweep.evaluators for kind in (*one.needs, *one.uses)}
        texts = {domain: _packed(path) for domain, path in inputs.texts.items()} if "text" in wanted else {}
        data = {name: (path.name, _packed(path)) for name, path in inputs.data.items()}
        return [
            remote.PointOrder(
                sweep=name,
                recipe=_recipe(recipes[point.identity], files),
                baseline=_recipe(recipes[baseline.identity], files) if baseline else None,
                keep=point.baseline,
                model=model,
                reference=order_of(inputs.reference) if inputs.reference else None,
                tools=self.tools.identity,
                evaluators=tuple((one.name, one.version, origin_of(one)[1]) for one in sweep.evaluators),
                texts=texts,
                prompts=inputs.prompts,
                data=data,
                settings=dict(inputs.settings),
                options=inputs.options,
                threads=request.threads,
            )
            for point in points
        ]


def check_cluster(sweep: Sweep, *, keep: bool) -> None:
    """Raises EvaluationRefused if a cluster cannot do this."""
    if timed := [one.name for one in sweep.evaluators if one.timed]:
        raise EvaluationRefused(
            f"{timed[0]} measures times, and the cluster's machines may differ",
            hint="leave out --cluster, or choose other evaluators: --only NAME",
        )
    if keep:
        raise EvaluationRefused(
            "--keep: with --cluster the workers make the files, and delete them",
            hint="leave out --keep; apex quantize makes a single file",
        )


def _recipe(recipe: Recipe, files: Mapping[Path, remote.ModelOrder]) -> remote.RecipeOrder:
    def order(job: Job) -> remote.JobOrder:
        imatrix = files[job.imatrix] if job.imatrix else None
        return remote.JobOrder(
            job.out.name, job.plan, job.keys, job.n_bytes, job.warnings, imatrix, job.derived, job.memory
        )

    return remote.RecipeOrder(order(recipe.job), order(recipe.trunk) if recipe.trunk else None)


def _files_of(order: remote.PointOrder) -> list[remote.ModelOrder]:
    recipes = [order.recipe, *([order.baseline] if order.baseline else [])]
    jobs = [job for one in recipes for job in (one.job, one.trunk) if job]
    return [job.imatrix for job in jobs if job.imatrix]


def _packed(path: Path) -> bytes:
    return zlib.compress(path.read_bytes(), 6)
