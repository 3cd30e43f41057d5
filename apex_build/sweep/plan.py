"""Plan a sweep: one file for each combination of values of a policy's parameters, checked before anything is
written.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_build.errors import DataMissing, EvaluationRefused, OutputUnwritable, ShapeUnfit
from apex_build.evaluation.run import plan_work
from apex_build.gguf_model.fingerprint import fingerprint
from apex_build.hookspecs import Evaluator
from apex_build.policy.plan import Plan, Wanted, make_plans
from apex_build.policy.render import template_files
from apex_build.progress import Report, silent
from apex_build.quantization.data import Data, read_data
from apex_build.quantization.naming import source_stem
from apex_build.quantization.preflight import Allowed, check_policy
from apex_build.quantization.provenance import identity as file_identity
from apex_build.quantization.run import Job, prepare
from apex_build.storage.digests import sha256_file, sha256_json
from apex_build.storage.disk import check_room
from apex_build.storage.manifest import SWEEP, manifest_of
from apex_build.storage.outputs import check_apart, check_place
from apex_build.storage.scratch import scratch_folder
from apex_build.sweep.request import Request as Request
from apex_build.sweep.request import checked, curves_of, evaluators_of, headless_name, imatrices_of, varied
from apex_build.sweep.rows import MANIFEST, RESULTS, TABLE, Row, curve_name, point_name, read_rows
from apex_build.sweep.shared_trunk import only_head_differs, same_trunk, trunk_job

MEASURED = "results.jsonl"  # of the evaluators
FILES = "files"  # folder of the quantized files
_LONGEST_NAME = 120
_ELSEWHERE = "give another folder with -o"


@dataclass(frozen=True)
class Point:
    """One file. `job` is None if the tools would refuse it, and `refused` says why."""

    values: Mapping[str, str]
    head_data: bool
    baseline: bool
    plan: Plan | None  # None too if the shapes do not allow it
    job: Job | None
    refused: str
    identity: str

    @property
    def name(self) -> str:
        return point_name(self.values, self.head_data)


@dataclass(frozen=True)
class Sweep:
    """A checked sweep. The baseline, if there is one, is the first point."""

    request: Request
    points: tuple[Point, ...]
    evaluators: tuple[Evaluator, ...]
    parts: Mapping[str, Any]  # what every point's result depends on
    derived: bool  # the imatrix without the head is made of the other
    head_only: bool  # the values change only the draft head
    trunk_once: bool  # and so the trunk is made once
    known: Mapping[str, Row]  # measured before, by identity
    room: int  # bytes of all files that exist at the same time

    @property
    def baseline(self) -> Point | None:
        return self.points[0] if self.points[0].baseline else None


def plan_sweep(request: Request, *, keep: bool = False, elsewhere: bool = False, report: Report = silent) -> Sweep:
    """Check everything and plan every file; nothing is written. `keep`: the files will be kept; `elsewhere`: they will
    be made on other machines, so this one's disk need not hold them.

    Raises ParameterUnknown, TypeUnknown, EvaluationRefused, EvaluatorUnknown, ImatrixInvalid, ImatrixMismatch,
    HeadRowsMismatch, DataMissing (where the baseline, or no point at all, can be quantized), OutputUnwritable (also for
    another sweep's folder), DiskTooSmall.
    """
    check_apart(_written(request), _inputs(request), _ELSEWHERE)
    request, baseline = checked(request)
    combinations = [
        dict(zip(request.over, values, strict=True)) for values in itertools.product(*request.over.values())
    ]
    paired = request.inputs.reference is None
    asked = [baseline, *(one for one in combinations if one != baseline)] if paired else combinations
    with scratch_folder("sweep") as scratch:
        # the files' plans show what the values change; that determines curves and evaluators
        given = request.imatrix is not None or request.imatrix_without_head is not None
        plans = _plans(request, [(values, given) for values in varied(request, asked)], {}, report)
        head_only = _only_head_differs(request, list(plans.values()))
        curves = curves_of(request, head_only=head_only)
        request, evaluators = evaluators_of(request, head_only=head_only)
        parts = _parts(request, evaluators, baseline)
        check_folder(request.folder, parts)
        imatrices, derived = imatrices_of(request, curves, scratch)
        wanted = [(values, curve) for curve in curves for values in combinations]
        if paired:
            wanted = [(baseline, curves[0]), *(one for one in wanted if one != (baseline, curves[0]))]
        plans |= _plans(request, [(values, imatrices[curve] is not None) for values, curve in wanted], plans, report)
        data = {path: read_data(path, request.model) for path in dict.fromkeys(imatrices.values()) if path}
        points = []
        for number, (values, curve) in enumerate(wanted):
            plan, path = plans[_key(values, imatrices[curve] is not None)], imatrices[curve]
            read = data[path] if path else None
            points.append(_point(request, values, curve, plan, read, parts, baseline=paired and number == 0))
        jobs = [point.job for point in points if point.job]
        if paired and points[0].job is None:
            raise DataMissing(
                f"the baseline, {points[0].name}, cannot be quantized: {points[0].refused}",
                hint="--baseline NAME=VALUE",
            )
        if not jobs:
            raise DataMissing(f"no point of the sweep can be quantized; {points[0].name}: {points[0].refused}")
        trunk_once = len(jobs) > 1 and head_only and same_trunk(jobs)
        # a derived imatrix has the same data for the trunk as the one it was made of
        trunks = (1 if derived else len({point.head_data for point in points if point.job})) if trunk_once else 0
        room = _check_disk(request, jobs, trunks, keep, elsewhere)
    known = read_rows(request.folder)
    return Sweep(request, tuple(points), tuple(evaluators), parts, derived, head_only, trunk_once, known, room)


def _plans(
    request: Request,
    asked: Sequence[tuple[Mapping[str, str], bool]],
    known: Mapping[str, Plan | ShapeUnfit],
    report: Report,
) -> dict[str, Plan | ShapeUnfit]:
    """The plans that are not known yet, of (values, whether there is an imatrix)."""
    new = {key: one for one in asked if (key := _key(*one)) not in known}
    if not new:
        return {}
    wanted = [Wanted({**request.parameters, **values}, imatrix) for values, imatrix in new.values()]
    return dict(
        zip(
            new,
            make_plans(request.model, request.policy, wanted, request.tools, report=report, imatrix=request.imatrix),
            strict=True,
        )
    )


def _key(values: Mapping[str, str], imatrix: bool) -> str:
    return sha256_json([values, imatrix])


def _only_head_differs(request: Request, plans: Sequence[Plan | ShapeUnfit]) -> bool:
    """Raises EvaluationRefused if all files are the same."""
    known = [plan for plan in plans if isinstance(plan, Plan)]
    if len(known) == len(plans) and len({tuple((one.name, one.type) for one in plan.entries) for plan in known}) == 1:
        raise EvaluationRefused(
            f"{', '.join(request.over)}: every value gives the same file of {request.model.path}",
            hint=f"apex plan {request.model.path} --policy {request.policy.name} shows what the policy does to it",
        )
    return only_head_differs(known)


def _point(
    request: Request,
    values: Mapping[str, str],
    head_data: bool,
    planned: Plan | ShapeUnfit,
    data: Data | None,
    parts: Mapping[str, Any],
    *,
    baseline: bool,
) -> Point:
    name = "-".join([source_stem(request.model.path), *(f"{key}-{value}" for key, value in values.items())])
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{sha256_json(values)[:8]}"
    name = f"{name}-{curve_name(head_data).replace(' ', '-')}-{{tag}}"
    parameters = {**request.parameters, **values}
    allowed = Allowed(uncalibrated=not head_data, head_rows=request.head_rows)
    plan, job, refused = None if isinstance(planned, ShapeUnfit) else planned, None, ""
    imatrix = data.path if data else None
    try:
        if isinstance(planned, ShapeUnfit):
            check_policy(request.policy, request.model, imatrix)
            raise planned
        job = prepare(
            request.model,
            request.policy,
            parameters,
            request.tools,
            Path(),
            imatrix=imatrix,
            allowed=allowed,
            name=name,
            plan=planned,
            data=data,
        )
    except (DataMissing, ShapeUnfit) as error:
        if imatrix is None and isinstance(error, DataMissing):
            hint = f"apex calibrate {request.model.path}, then --imatrix"
            raise DataMissing(f"this sweep needs an imatrix, and none was given: {error.message}", hint=hint) from None
        refused = error.message.replace(str(imatrix), imatrix.name) if imatrix else error.message
    file = file_identity(job.keys) if job else data.sha256 if data else ""
    identity = sha256_json({"sweep": parts, "values": values, "head_data": head_data, "file": file})
    return Point(values, head_data, baseline, plan, job, refused, identity)


def _parts(request: Request, evaluators: Sequence[Evaluator], baseline: Mapping[str, str]) -> dict[str, Any]:
    """What every point's result depends on. Not the values: more may be added to a sweep."""
    works = [
        plan_work(one, request.model, request.inputs, request.tools, threads=request.threads) for one in evaluators
    ]
    without = request.imatrix_without_head
    parts = {
        "model": fingerprint(request.model),
        "policy": request.policy.name,
        "parameters": {name: str(value) for name, value in request.parameters.items()},
        "over": list(request.over),
        "imatrix": sha256_file(request.imatrix) if request.imatrix else None,
        "imatrix_without_head": sha256_file(without) if without else None,
        "baseline": None if request.inputs.reference else dict(baseline),
        "head_rows": request.head_rows,
        "tools": request.tools.identity,
        "evaluators": [
            {key: value for key, value in work.parts.items() if key not in ("model", "tools")} for work in works
        ],
    }
    same: dict[str, Any] = json.loads(json.dumps(parts))  # as it will be read again
    return same


def check_folder(folder: Path, parts: Mapping[str, Any]) -> None:
    """Raises OutputUnwritable unless the folder is new, empty, or of the same sweep."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputUnwritable(f"{folder} is not a folder", hint=_ELSEWHERE)
    manifest = folder / MANIFEST
    if not manifest.exists():
        left_over = (f".{RESULTS}.", f".{MANIFEST}.")  # of a run that was killed before its first row
        if any(not path.name.startswith(left_over) for path in folder.iterdir()):
            raise OutputUnwritable(f"{folder} is not empty and does not contain a sweep", hint=_ELSEWHERE)
        return
    before = manifest_of(folder / RESULTS, manifest)
    if before is None or before.kind != SWEEP or not before.usable:
        raise OutputUnwritable(f"{manifest} is damaged: it is not the manifest of a sweep", hint=_ELSEWHERE)
    if other := [name for name in parts if before.parts.get(name) != parts[name]]:
        raise OutputUnwritable(
            f"{folder} contains another sweep, which differs in: {', '.join(other)}", hint=_ELSEWHERE
        )


def _written(request: Request) -> Iterator[Path]:
    """All files that a sweep may write, or that exist in its folder."""
    folder = request.folder
    yield from (folder / name for name in (MANIFEST, MEASURED, RESULTS, TABLE))
    if request.imatrix is not None:
        yield folder / headless_name(request)
    for ending in ("png", "svg"):
        yield from folder.glob(f"sweep*.{ending}")
    yield from (folder / FILES).glob("*")


def _inputs(request: Request) -> Iterator[Path]:
    given = request.inputs
    yield from request.model.files
    yield from given.reference.files if given.reference else ()
    yield from (path for path in (request.imatrix, request.imatrix_without_head) if path)
    yield from (*given.texts.values(), *given.data.values(), *given.files)
    yield from template_files(request.policy)
    yield from request.tools.files()


def _check_disk(request: Request, jobs: Sequence[Job], trunks: int, keep: bool, elsewhere: bool) -> int:
    """Room for the files that exist at the same time: the trunks, the baseline, and the largest other file, or all
    files.
    """
    largest = max(jobs, key=lambda job: job.n_bytes)
    before = trunks * trunk_job(largest, largest.out).n_bytes if trunks else 0
    before += sum(job.n_bytes for job in jobs) - largest.n_bytes if keep else jobs[0].n_bytes if len(jobs) > 1 else 0
    check_place((request.folder if request.folder.is_dir() else request.folder.parent) / largest.out.name, _ELSEWHERE)
    if not elsewhere:
        check_room(request.folder, largest.n_bytes, largest.out.name, before=before)
    return before + largest.n_bytes
