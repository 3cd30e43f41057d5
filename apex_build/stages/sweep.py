"""Stage sweep: one file for each value of a policy's parameter, measured, and what the bytes buy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from apex_build import __version__
from apex_build.cluster.connect import connected
from apex_build.cluster.points import ClusterPoints, check_cluster
from apex_build.errors import ApexError, PolicyUnknown
from apex_build.gguf_model.mtp_rows import Rows
from apex_build.hookspecs import PolicySpec
from apex_build.native.toolset import Toolset
from apex_build.parameters import Value
from apex_build.places import model_stem
from apex_build.plugins import Plugins
from apex_build.progress import Report
from apex_build.stages.evaluate import EvaluateOptions, Measuring, inputs_of
from apex_build.stages.given import ModelFile, Workplace, texts_apart, workplace
from apex_build.sweep.plan import Sweep, plan_sweep
from apex_build.sweep.report import Summary, check_scores, default_score, report_sweep, write_report
from apex_build.sweep.request import Request
from apex_build.sweep.rows import Row
from apex_build.sweep.run import Measure, in_order, measure_here, points_to_do, run_sweep


@dataclass(frozen=True)
class SweepOptions:
    """`over`: parameter -> its values; every combination is a file. `curves`: with the head's calibration data (True),
    without (False). `measured`: by what, and on what; by default the draft head's score, or the divergence where the
    head is not swept; with its `cluster` each point is quantized and measured there. `scores`: figures to show;
    `bound`: the knee is the smallest file that loses less.
    """

    over: Mapping[str, Sequence[str]] = field(hash=False)
    policy: str | None = None  # None: the policy meant for sweeps
    parameters: Mapping[str, Value] = field(default_factory=dict, hash=False)
    imatrix: Path | None = None
    imatrix_without_head: Path | None = None
    curves: tuple[bool, ...] | None = None
    baseline: Mapping[str, str] = field(default_factory=dict, hash=False)
    measured: EvaluateOptions = field(default_factory=EvaluateOptions)
    head_rows: Rows | None = None
    keep: bool = False
    scores: tuple[str, ...] = ()
    bound: float | None = None


@dataclass(frozen=True)
class Swept:
    """`reports`: for each score a table, a plot and the knees; `written`: their files; `errors`: of evaluators that
    failed.
    """

    rows: tuple[Row, ...]
    reports: tuple[Summary, ...]
    written: tuple[Path, ...]
    errors: tuple[ApexError, ...] = ()


def plan(model: ModelFile, folder: Path, options: SweepOptions, *, place: Workplace | None = None) -> Sweep:
    """Check all of it and plan every file; nothing is written. Raises as `sweep`."""
    place = place or workplace()
    found, inputs = place.model(model), inputs_of(options.measured, place)
    inputs = inputs if inputs.texts else replace(inputs, texts=texts_apart([found], options.imatrix))
    request = Request(
        model=found,
        policy=_policy(options.policy, place.plugins),
        parameters=options.parameters,
        over=options.over,
        imatrix=options.imatrix,
        folder=folder,
        tools=place.tools,
        evaluators=place.plugins.evaluators(),
        only=options.measured.only,
        inputs=inputs,
        imatrix_without_head=options.imatrix_without_head,
        curves=options.curves,
        baseline=options.baseline,
        threads=options.measured.threads,
        head_rows=options.head_rows,
    )
    elsewhere = options.measured.cluster is not None
    planned = plan_sweep(request, keep=options.keep, elsewhere=elsewhere, report=place.report)
    if elsewhere:
        check_cluster(planned, keep=options.keep)
    return planned


@contextmanager
def measuring(cluster: str | None, tools: Toolset, report: Report) -> Iterator[Measuring[Measure]]:
    """Here, or on a cluster. Raises ClusterFailed, WorkersUnfit."""
    if cluster is None:
        yield Measuring(measure_here)
        return
    with connected(cluster, tools, report) as found:
        yield Measuring(ClusterPoints(found, tools, report), found.at_once, away=True)


def sweep(model: ModelFile, folder: Path, options: SweepOptions, *, place: Workplace | None = None) -> Swept:
    """Quantize and measure every point, and write table and plots into `folder`. A sweep that was cut short is resumed.

    Raises what `sweep.plan.plan_sweep` and `sweep.run.run_sweep` raise, and EvaluationRefused for a score that nothing
    gives.
    """
    place = place or workplace()
    planned = plan(model, folder, options, place=place)
    report = place.report
    cluster = options.measured.cluster if points_to_do(planned) else None
    with measuring(cluster, place.tools, report) as found:
        ran = run_sweep(planned, keep=options.keep, progress=lambda: nullcontext(report), measure=found.measure)
        outcomes = in_order(planned, ran)
    errors = tuple(error for outcome in outcomes for error in outcome.errors)
    return reported(planned, [outcome.row for outcome in outcomes], options.scores, options.bound, errors)


def reported(
    planned: Sweep,
    rows: Sequence[Row],
    scores: Sequence[str] = (),
    bound: float | None = None,
    errors: Sequence[ApexError] = (),
) -> Swept:
    """The reports of a sweep, written. `scores`: the figures to show, by default what a reader asks first."""
    check_scores(rows, scores)
    request = planned.request
    reference = request.inputs.reference
    reports = [
        report_sweep(
            rows,
            score,
            model_stem(request.model.path),
            by_head=planned.head_only,
            bound=bound,
            reference=reference.path.name if reference else "",
            counted="positions" if all("text" in one.needs for one in planned.evaluators) else "",
            about=_about(planned),
        )
        for score in scores or (default_score(rows),)
    ]
    return Swept(tuple(rows), tuple(reports), tuple(write_report(request.folder, reports)), tuple(errors))


def _policy(name: str | None, plugins: Plugins) -> PolicySpec:
    if name is not None:
        return plugins.policy(name)
    found = [policy for policy in plugins.policies().values() if policy.sweeps]
    if len(found) != 1:
        raise PolicyUnknown(
            "no policy was given, and not exactly one of them is meant for sweeps", hint="apex policies"
        )
    return found[0]


def _about(planned: Sweep) -> str:
    """For a chart: what the swept values do not say."""
    trunk: dict[str, int] = {}
    request = planned.request
    plan = next((point.plan for point in planned.points if point.plan), None)
    for entry in plan.entries if plan else ():
        if not entry.draft_head and entry.type != "F32":
            trunk[entry.type] = trunk.get(entry.type, 0) + entry.n_bytes
    mostly = (
        f"trunk {max(trunk, key=lambda name: trunk[name])}{' and others' if len(trunk) > 1 else ''}, " if trunk else ""
    )
    pin = (request.tools.manifest.get("pin") or {}).get("name", "llama.cpp")
    of_head = mostly if planned.head_only else ""
    return f"{of_head}policy {request.policy.name}, tools {pin} {request.tools.identity[:8]}, apex {__version__}"
