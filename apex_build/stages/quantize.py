"""Stage quantize: files with the types of one or several policies, verified before they are put in place."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from pathlib import Path

from apex_build.errors import OutputUnwritable
from apex_build.evaluation.task import ToolOptions
from apex_build.gguf_model.metadata import Setting, who_quantizes
from apex_build.hookspecs import PolicySpec
from apex_build.native.ggml import Ggml
from apex_build.parameters import Value
from apex_build.policy.lists import read_list
from apex_build.quantization.load_check import check_input
from apex_build.quantization.naming import TEMPLATE
from apex_build.quantization.preflight import Allowed
from apex_build.quantization.run import Job, Quantized, check_outputs, prepare, run
from apex_build.quantization.split import check_shards_free, parse_size, recorded_shards, split
from apex_build.stages.given import ModelFile, Workplace, workplace
from apex_build.stages.plan import policy_of
from apex_build.storage.disk import check_room
from apex_build.storage.outputs import check_apart, with_manifest_and_log
from apex_build.sweep.auto import Choice, Question, measure, parameter_at_auto

Measuring = Callable[[Question], "Choice | None"]  # what 'auto' becomes: measured, or as it was measured before


@dataclass(frozen=True)
class QuantizeOptions:
    """`policies`: one file each; empty with a bare list of types (`tensor_types`). `name`: a template for files in a
    folder.

    `texts`: for measuring a parameter at 'auto', by default the built-in ones. `force` replaces whatever exists,
    `replace` only earlier outputs.
    """

    policies: tuple[str, ...] = ()
    parameters: Mapping[str, Value] = field(default_factory=dict, hash=False)
    imatrix: Path | None = None
    tensor_types: Path | None = None
    name: str | None = None
    split_size: str | None = None  # shards of at most this, such as 40G
    metadata: tuple[Setting, ...] = ()
    allowed: Allowed = field(default_factory=Allowed)
    load_check: bool = True
    texts: tuple[Path, ...] = ()
    gpu_layers: int | None = None  # when measuring
    threads: int | None = None
    memory: int | None = None  # bytes that a tool may take
    force: bool = False
    replace: bool = False


@dataclass(frozen=True)
class PlannedFile:
    """A file that can be written. `choice`: what a parameter at 'auto' became, and what that rests on."""

    job: Job
    choice: Choice | None


@dataclass(frozen=True)
class QuantizedFile:
    """A finished file, or the first of its shards."""

    done: Quantized
    job: Job
    choice: Choice | None

    @property
    def path(self) -> Path:
        return self.done.path


def plan_files(
    model: ModelFile,
    out: Path | None = None,
    options: QuantizeOptions = QuantizeOptions(),
    *,
    place: Workplace | None = None,
    measuring: Measuring | None = None,
) -> list[PlannedFile]:
    """Plan and check the files; nothing is written except what `measuring` caches.

    `out`: a file, or the folder of files that are named by their plans (the model's). Raises as `quantize`.
    """
    place = place or workplace()
    plugins = place.plugins
    policies = [policy_of(plugins, name, options.tensor_types) for name in dict.fromkeys(options.policies or (None,))]
    found = place.model(model)
    tools = place.tools
    types = read_list(options.tensor_types, Ggml(tools)) if options.tensor_types else None
    if len(policies) > 1 and out is not None and not out.is_dir():
        raise OutputUnwritable(
            f"{out}: with several policies the output is a folder", hint=f"mkdir -p {shlex.quote(str(out))}"
        )
    metadata = who_quantizes(options.metadata)

    def planned(policy: PolicySpec, choice: Choice | None = None) -> Job:
        named = out is None or out.is_dir()
        return prepare(
            found,
            policy,
            {**options.parameters, **({choice.parameter: choice.value} if choice else {})},
            tools,
            out or found.path.parent,
            imatrix=options.imatrix,
            allowed=options.allowed,
            metadata=(*metadata, Setting("apex.draft_loss", "STRING", choice.text)) if choice else metadata,
            name=(options.name or TEMPLATE) if named else None,
            types=types,
        )

    jobs = [planned(policy) for policy in policies]
    if options.split_size is not None:
        parse_size(options.split_size)
    _check(jobs, options, place)
    if options.load_check:
        check_input(found, tools)
    choices: list[Choice | None] = [None] * len(jobs)
    for number, policy in enumerate(policies):
        if parameter_at_auto(policy, options.parameters):
            question = Question(
                found,
                policy,
                options.parameters,
                options.imatrix,
                tools,
                plugins.evaluators(),
                place.texts(options.texts, found),
                ToolOptions(options.gpu_layers, memory=options.memory),
                options.threads,
                head_rows=options.allowed.head_rows,
            )
            choices[number] = (measuring or (lambda asked: measure(asked, report=place.report)))(question)
            jobs[number] = planned(policy, choices[number])
    _check(jobs, options, place)  # again: the measured mixture is part of the name
    jobs = [replaced(job, memory=options.memory) for job in jobs]
    return [PlannedFile(job, choice) for job, choice in zip(jobs, choices, strict=True)]


def write_file(planned: PlannedFile, options: QuantizeOptions, *, place: Workplace) -> QuantizedFile:
    """The file, verified and in its place, or its shards."""
    job, size = planned.job, options.split_size
    if size and not options.force:
        if shards := recorded_shards(job.artifact, size):
            done = Quantized(shards[0], job.plan, job.n_bytes, 0.0, job.warnings, True)
            return QuantizedFile(done, job, planned.choice)
        check_shards_free(job.out)
    done = run(
        job,
        force=options.force,
        replace=options.replace,
        threads=options.threads,
        load_check=options.load_check,
        report=place.report,
    )
    if size is not None:
        check_room(job.out.parent, job.n_bytes, f"shards of {job.out.name}, beside it until they are verified,")
        done = replaced(done, path=split(job.artifact, size, job.tools, force=options.force, report=place.report)[0])
    return QuantizedFile(done, job, planned.choice)


def quantize(
    model: ModelFile,
    out: Path | None = None,
    options: QuantizeOptions = QuantizeOptions(),
    *,
    place: Workplace | None = None,
    measuring: Measuring | None = None,
) -> tuple[QuantizedFile, ...]:
    """Quantize the model by each policy: planned, written, verified, put in place. A file made from the same parts is
    used again.

    Raises PolicyUnknown, ParameterUnknown, DataMissing, ShapeUnfit, AlreadyQuantized, HeadRowsMismatch,
    ImatrixMismatch, OutputUnwritable, DiskTooSmall, LoadFailed, ToolFailed, ToolKilled, VerificationFailed.
    """
    place = place or workplace()
    files = plan_files(model, out, options, place=place, measuring=measuring)
    return tuple(write_file(one, options, place=place) for one in files)


def _check(jobs: list[Job], options: QuantizeOptions, place: Workplace) -> None:
    check_outputs(jobs, force=options.force, replace=options.replace)
    check_apart([path for job in jobs for path in with_manifest_and_log(job.out)], place.plugins.files())
