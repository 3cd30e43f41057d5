"""Run llama-imatrix over a calibration text: resumable, verified, and put in place only when complete."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apex_build.calibration.disk import check_disk, written
from apex_build.calibration.record import ImatrixRecord, rows_record, text_record
from apex_build.calibration.sets import CalibrationText
from apex_build.errors import CalibrationSetInvalid, ImatrixInvalid, ToolFailed, VerificationFailed
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.coverage import Coverage, coverage
from apex_build.gguf_model.fingerprint import fingerprint
from apex_build.gguf_model.imatrix import Imatrix, check_values, read_imatrix
from apex_build.gguf_model.mtp_rows import AUTO, CHOICES, tool_arguments, trained_on
from apex_build.gguf_model.runnable import check_runnable
from apex_build.native import output
from apex_build.native.arguments import resolve
from apex_build.native.early import warnings_of
from apex_build.native.memory import memory_limit
from apex_build.native.run import ToolRun, run_tool
from apex_build.native.toolset import Toolset
from apex_build.progress import Report, Step, silent
from apex_build.source.served import check_served, instead_of
from apex_build.storage.artifacts import Artifact, Replace, making
from apex_build.storage.digests import sha256_file
from apex_build.storage.json_files import read_json, write_json
from apex_build.storage.manifest import IMATRIX, Manifest
from apex_build.storage.outputs import LOG, beside, check_apart, check_place, with_manifest_and_log, work_folder
from apex_build.storage.work import check_work, files_in, remove_work, unfinished_work

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_LEAST_CHUNKS = 2  # llama-imatrix refuses a text of fewer
_RESUMABLE = 3  # chunks: llama-imatrix refuses to start where fewer are left
_NO_SAVES = 1_000_000_000
SHARDS = "shards"  # folder for a run in shards, in its work folder
# Checks the text before the run; returns what to record in the manifest.
Check = Callable[[Path], "DataclassInstance | None"]
Parts = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """How to run llama-imatrix. One sequence of `context` tokens a batch: no row is lost, and runs can be split at any
    chunk.
    """

    context: int = 512
    chunks: int | None = None  # maximum; None for the whole text
    head: bool = True  # run the draft head, where the model has one
    rows: str = AUTO  # hidden rows that it reads: those known for the architecture, or pre or post the final norm
    threads: int | None = None
    gpu_layers: int | None = None
    snapshot_every: int = 10  # chunks
    extra: tuple[str, ...] = ()  # further arguments of llama-imatrix
    memory: int | None = None  # bytes that llama-imatrix may take; None: by the model's size

    def decisive(self, tools: Toolset) -> dict[str, Any]:
        """Settings that affect the result, and so may not change between parts of one run."""
        rows = {} if self.rows == AUTO else {"rows": self.rows}
        extra = resolve(tools.tool("llama-imatrix"), self.extra)
        files = {"files": dict(extra.files)} if extra.files else {}
        return {"context": self.context, "head": self.head, "extra": list(extra.arguments), **files, **rows}


@dataclass(frozen=True)
class Calibration:
    """A finished run. `perplexity` is the trunk's over the whole text; None if not printed, or of a part alone (a
    resumed run).
    """

    path: Path
    identity: str
    coverage: Coverage
    perplexity: float | None
    seconds: float
    resumed_at: int  # chunks done by an interrupted run
    reused: bool  # the same work was done before


@dataclass(frozen=True)
class Job:
    """A run to do: writes the imatrix of `text` to `part`. `work` is the folder that survives an interruption; the
    text is in it.
    """

    model: Model
    text: CalibrationText
    tools: Toolset
    out: Path
    settings: Settings
    work: Path
    part: Path
    report: Report


@dataclass(frozen=True)
class Made:
    imatrix: Imatrix
    perplexity: float | None
    seconds: float
    resumed_at: int
    goal: DataclassInstance | None = None  # what was reached, if there was a goal


def arguments(model: Model, settings: Settings, tools: Toolset) -> list[str]:
    """The command of a run, without text, output, chunks and resumption. Raises ParameterUnknown for further arguments
    of ours.
    """
    wanted = [str(tools.tool("llama-imatrix")), "--model", str(model.path.absolute()), "--parse-special"]
    wanted += ["--ctx-size", str(settings.context), "--batch-size", str(settings.context)]
    wanted += ["--output-frequency", str(_NO_SAVES), "--save-frequency", str(settings.snapshot_every)]
    if settings.head and model.has_head:
        wanted += ["--mtp", *tool_arguments(settings.rows, model.architecture, tools.tool("llama-imatrix"))]
    if settings.threads is not None:
        wanted += ["--threads", str(settings.threads)]
    if settings.gpu_layers is not None:
        wanted += ["--n-gpu-layers", str(settings.gpu_layers)]
    return [*wanted, *resolve(tools.tool("llama-imatrix"), settings.extra).arguments]


# what llama-imatrix alone knows: options without and with a value
_OWN_FLAGS = {"--process-output", "--no-ppl", "--ppl", "--show-statistics"}
_OWN_OPTIONS = {
    "--output-format",
    "--output-frequency",
    "-ofreq",
    "--save-frequency",
    "--chunk",
    "--from-chunk",
    "--in-file",
}


def without_own_arguments(extra: Sequence[str]) -> tuple[str, ...]:
    """The additional arguments for llama-imatrix that llama-perplexity accepts too."""
    kept, value_of_own = [], False
    for argument in extra:
        if not value_of_own and argument not in _OWN_FLAGS | _OWN_OPTIONS:
            kept.append(argument)
        value_of_own = not value_of_own and argument in _OWN_OPTIONS
    return tuple(kept)


def parts_of(model: Model, text: CalibrationText, settings: Settings, tools: Toolset) -> Parts:
    """What goes into an imatrix."""
    return {
        "model": fingerprint(model),
        "text": text.sha256,
        "settings": {**settings.decisive(tools), "chunks": settings.chunks},
        "tools": tools.manifest.get("key") or sha256_file(tools.tool("llama-imatrix")),
    }


def calibrate(
    model: Model,
    text: CalibrationText,
    tools: Toolset,
    out: Path,
    settings: Settings = Settings(),
    *,
    force: bool = False,
    replace: bool = False,
    check: Check | None = None,
    make: Callable[[Job], Made] | None = None,
    more: Parts | None = None,
    report: Report = silent,
) -> Calibration:
    """Write the imatrix of `model` over `text` to `out`, with a manifest beside it (`out` + .json) and a log (`out` +
    .log).

    An interrupted run resumes from its last snapshot, if model, text, settings and tools are the same; a finished one
    is reused. `force` does neither, and replaces what is there; `replace` replaces only what was made from something
    else. `check` is called with the text's file before a run, also where it resumes; what it raises ends the run.
    `make`: how it is made, if not by one run of the tool, and `more` what that adds to what decides about the data.
    Raises OutputUnwritable, ToolFailed, ToolKilled, VerificationFailed (nothing is put in place then),
    CalibrationSetInvalid, ModelInvalid (it cannot be run).
    """
    check_runnable(model)
    check_served(model, tools)
    inputs = (*model.files, *text.files, *tools.files())
    check_place(out)
    check_apart((*with_manifest_and_log(out), *files_in(work_folder(out))), inputs)
    if (
        len(text.data) < _LEAST_CHUNKS * settings.context
    ):  # a token is at least a byte; llama-imatrix counts them exactly
        raise CalibrationSetInvalid(
            f"{text.name}: the text has {len(text.data)} bytes, and calibration needs at least {_LEAST_CHUNKS} chunks "
            "of "
            f"{settings.context} tokens",
            hint="give more text, or a smaller --context",
        )
    artifact = Artifact(out, IMATRIX, {**parts_of(model, text, settings, tools), **(more or {})})
    may: Replace = "anything" if force else "own" if replace else "nothing"
    with making(artifact, inputs=inputs, reuse=not force, replace=may, intact=lambda one: _is_whole(out, one)) as draft:
        if draft.found:
            remove_work(out)  # stopped between the last two steps
            return Calibration(out, artifact.identity, coverage(read_imatrix(out), model), None, 0.0, 0, True)
        check_work(out, force=force)
        check_disk(work_folder(out), model, len(text.data))
        place = {f"text/{text.name}": text.data}  # a separate folder: a text may have any name
        with unfinished_work(artifact, place, _worth_keeping, fresh=force) as work:
            rows_check = _checked(work, text, check, model, tools)
            made = (make or _run)(Job(model, text, tools, out, settings, work, draft.part, report))
            head_rows = rows_record(made.imatrix, model, settings.rows)
            draft.done(ImatrixRecord(text_record(text), head_rows, rows_check, made.goal))
    covered = coverage(read_imatrix(out), model)
    return Calibration(out, artifact.identity, covered, made.perplexity, made.seconds, made.resumed_at, False)


def _worth_keeping(work: Path) -> bool:
    shards = (work / SHARDS).glob(".*.work")
    return any(map(has_snapshots, (work, *shards))) or any((work / SHARDS).rglob("*.gguf"))


def _is_whole(out: Path, manifest: Manifest) -> bool:
    try:
        read_imatrix(out)
    except ImatrixInvalid:
        return False
    return manifest.describes(out)


def _checked(
    work: Path, text: CalibrationText, check: Check | None, model: Model, tools: Toolset
) -> DataclassInstance | None:
    try:
        return check(work / "text" / text.name) if check is not None else None
    except ToolFailed as error:
        if output.HEAD_UNKNOWN in error.message:
            raise _head_not_run(model, tools) from None
        raise


def _run(job: Job) -> Made:
    """Run the tool once, from the last snapshot."""
    text = job.work / "text" / job.text.name
    run = ToRun(job.model, job.tools, job.settings, text, job.out, chunks=job.settings.chunks)
    partial, made = run_resumed(run, job.work, job.report)
    partial.replace(job.part)
    return made


@dataclass(frozen=True)
class ToRun:
    """The tool over `chunks` of a text from its chunk `first`. `out`: where its file will be, and the log beside it;
    `device`: the GPUs that it may use; `stopped`: of `run_tool`.
    """

    model: Model
    tools: Toolset
    settings: Settings
    text: Path  # alone in its folder
    out: Path
    first: int = 0
    chunks: int | None = None
    device: str | None = None
    stopped: Callable[[], bool] | None = None


def run_resumed(run: ToRun, work: Path, report: Report) -> tuple[Path, Made]:
    """Run it from the last snapshot in `work`. Returns its file, verified, which is still there."""
    snapshot, done = _snapshot(work)
    left = changed(run, first=run.first + done, chunks=None if run.chunks is None else run.chunks - done)
    partial = work / "imatrix.gguf"
    partial.unlink(missing_ok=True)  # of a run that stopped before its last step
    watch = Watch(run.model, run.tools, run.settings, report, done, work)
    ran, made = run_once(left, partial, watch.line, after=snapshot)
    return partial, Made(made, None if done else perplexity_of(ran), ran.seconds, done)


def run_once(
    run: ToRun, part: Path, on_line: Callable[[str], None], *, after: Path | None = None
) -> tuple[ToolRun, Imatrix]:
    """Let the tool write `part`, its sums added to those of `after`; verified."""
    model, settings, tools = run.model, run.settings, run.tools
    command = [*arguments(model, settings, tools), "--file", run.text.name, "--output", str(part.absolute())]
    if after is not None:
        command += ["--in-file", str(after.absolute())]
    if run.first:
        command += ["--chunk", str(run.first)]
    if run.chunks is not None:
        command += ["--chunks", str(run.chunks)]
    ran = run_tool(
        command,
        cwd=run.text.parent,
        log=beside(run.out, LOG),
        on_line=on_line,
        env=None if run.device is None else {"CUDA_VISIBLE_DEVICES": run.device},
        explain=output.explain,
        memory=memory_for(model, settings),
        stopped=run.stopped,
    )
    made = written(part, run.out, model)
    verify(made, model, settings, tools)
    return ran, made


def memory_for(model: Model, settings: Settings) -> int | None:
    return settings.memory or memory_limit(sum(tensor.n_bytes for tensor in model.tensors))


def perplexity_of(ran: ToolRun) -> float | None:
    values = [value for line in ran.lines if (value := output.perplexity(line))]
    return values[-1].value if values else None


def _head_not_run(model: Model, tools: Toolset) -> VerificationFailed:
    alone = f"apex calibrate {shlex.quote(str(model.path))} --no-mtp, for an imatrix of only the trunk"
    if not any(tensor.draft_head for tensor in model.tensors):
        return VerificationFailed(
            f"{model.path}: the metadata declare a draft head ({model.architecture}.nextn_predict_layers is "
            f"{model.head_layers}), but the file has no tensors for it",
            hint=f"{alone}; or convert it again, with its head",
        )
    other = instead_of(tools, model, head=True)
    return VerificationFailed(
        f"{model.path}: the draft head was not run: this llama.cpp cannot evaluate it for {model.architecture}",
        hint=f"{other}; or {alone}" if other else alone,
    )


def verify(found: Imatrix, model: Model, settings: Settings, tools: Toolset) -> None:
    check_values(found)
    covered = coverage(found, model)
    if settings.head and model.has_head and found.head_tokens is None:
        raise _head_not_run(model, tools)
    if settings.head and model.has_head:
        asked = tool_arguments(settings.rows, model.architecture, tools.tool("llama-imatrix"))
        known = trained_on(model.architecture)
        # without a choice the tool says what its llama.cpp takes; some do not say it
        expected = CHOICES[asked[-1]] if asked else known.rows if known else None
        if expected and found.head_rows != expected and (asked or found.head_rows):
            raise VerificationFailed(
                f"{model.path}: the draft head should have been run with {expected} rows, but was run with "
                f"{found.head_rows or 'unnamed ones'}"
            )
    without = [tensor.name for tensor in covered.head if not tensor.has_data]
    if settings.head and without:
        raise VerificationFailed(
            f"{model.path}: {len(without)} weights of the draft head got no calibration data, {without[0]} among them",
            hint="give more text, or more chunks",
        )


@dataclass
class Watch:
    """Turn the tool's output into progress, and remove snapshots in `work` that are superseded."""

    model: Model
    tools: Toolset
    settings: Settings
    report: Report
    before: int = 0  # chunks done by earlier runs
    work: Path | None = None
    total: int | None = None
    seen: int = 0
    warn: Callable[[str], None] = field(init=False)

    def __post_init__(self) -> None:
        self.warn = warnings_of(self.report, "llama-imatrix")

    def line(self, line: str) -> None:
        if self.settings.head and self.model.has_head and output.head_left_out(line):
            raise _head_not_run(self.model, self.tools)
        self.warn(line)
        if plan := output.planned(line):
            self.total = self.before + plan.chunks
            if self.work is not None:
                write_json(self.work / "total.json", self.total)
            self.report(Step("calibrating", self.before, self.total, "chunks"))
        if (mark := output.chunks_done(line)) is not None and mark > self.seen and self.total is not None:
            self.seen = mark
            self.report(Step("calibrating", self.before + mark, self.total, "chunks"))
            if self.work is not None and mark % self.settings.snapshot_every == 0:
                for path, _ in _snapshots(self.work)[:-2]:
                    path.unlink(missing_ok=True)


def has_snapshots(work: Path) -> bool:
    return bool(_snapshots(work))


def _snapshots(work: Path) -> list[tuple[Path, int]]:
    """Snapshots with their numbers of chunks, oldest first."""
    found = [(path, int(number[1])) for path in work.glob("*.at_*") if (number := re.search(r"\.at_(\d+)$", path.name))]
    return sorted(found, key=lambda item: item[1])


def _snapshot(work: Path) -> tuple[Path | None, int]:
    """The newest complete snapshot to resume from, and its chunks, if enough chunks are left for llama-imatrix to
    start.
    """
    try:
        total = int(read_json(work / "total.json"))
    except (OSError, ValueError, TypeError, OverflowError):
        return None, 0
    for path, chunks in reversed(_snapshots(work)):
        try:
            found = read_imatrix(path)
            check_values(found)
        except ImatrixInvalid:  # cut short when the run was stopped
            path.unlink()
            continue
        if found.chunk_count == chunks and total - chunks >= _RESUMABLE:
            return path, chunks
    return None, 0
