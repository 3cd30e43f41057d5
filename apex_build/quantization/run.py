"""Run llama-quantize, from a plan to a verified file in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from apex_build.errors import ModelInvalid, ModelMissing
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.coverage import Coverage, matrices_of
from apex_build.gguf_model.examine import check_copy_free, write_examined
from apex_build.gguf_model.fused import crossed
from apex_build.gguf_model.header import read_header
from apex_build.gguf_model.imatrix import Imatrix, read_imatrix
from apex_build.gguf_model.metadata import Setting
from apex_build.gguf_model.runnable import trunk_blocks
from apex_build.hookspecs import PolicySpec
from apex_build.native import output
from apex_build.native.ggml import Ggml
from apex_build.native.memory import memory_limit
from apex_build.native.run import run_tool, unwinding_signals
from apex_build.native.tensor_data import codec
from apex_build.native.toolset import Toolset
from apex_build.parameters import Value
from apex_build.policy.lists import TypeList
from apex_build.policy.plan import Entry, Plan, make_plan
from apex_build.policy.render import template_files
from apex_build.policy.size import file_size, imatrix_keys
from apex_build.progress import Report, Step, silent
from apex_build.quantization.against import not_compared
from apex_build.quantization.data import Data, read_data
from apex_build.quantization.load_check import check_input, check_loads
from apex_build.quantization.naming import file_name
from apex_build.quantization.preflight import Allowed, check_output, check_plan, check_policy
from apex_build.quantization.provenance import Value as Keyed
from apex_build.quantization.provenance import description, override, provenance
from apex_build.quantization.verify import verify
from apex_build.storage.artifacts import Artifact, Replace, making
from apex_build.storage.disk import tool_writing
from apex_build.storage.manifest import QUANTIZED
from apex_build.storage.outputs import LOG, beside, check_apart, check_place
from apex_build.storage.scratch import scratch_folder


@dataclass(frozen=True)
class Job:
    """A planned file that is not yet written. `n_bytes`: its size."""

    model: Model
    plan: Plan
    covered: Coverage | None
    imatrix: Path | None
    out: Path
    keys: dict[str, Keyed]
    n_bytes: int
    warnings: tuple[str, ...]
    tools: Toolset
    policy: PolicySpec
    types: TypeList | None = None
    derived: bool = False  # llama-quantize gets a copy of the imatrix: see `data_path`
    memory: int | None = None  # bytes that llama-quantize may take; None: by the model's size

    @property
    def artifact(self) -> Artifact:
        """The file's metadata names everything that it is made from."""
        return Artifact(self.out, QUANTIZED, self.keys)

    @property
    def inputs(self) -> Iterator[Path]:
        yield from self.model.files
        if self.imatrix:
            yield self.imatrix
        if self.types:
            yield self.types.path
        yield from template_files(self.policy)
        yield from self.tools.files()

    @property
    def data_path(self) -> Path | None:
        """The file that llama-quantize reads calibration data from: the imatrix, or its examined copy beside the
        output.
        """
        if self.imatrix is None or not self.derived:
            return self.imatrix
        return self.out.absolute().parent / f"{self.imatrix.stem}.examined.gguf"


@dataclass(frozen=True)
class QuantizedRecord:
    """What the manifest says beyond its head. `input` and the imatrices are names of files."""

    policy: str
    parameters: Mapping[str, Value]
    base_type: str
    rules: tuple[str, ...]
    tensors: tuple[Entry, ...]
    warnings: tuple[str, ...]
    input: str
    imatrix: str | None
    examined_imatrix: str | None


@dataclass(frozen=True)
class Quantized:
    """A finished file. `reused`: it already existed, made from the same parts."""

    path: Path
    plan: Plan
    n_bytes: int
    seconds: float
    warnings: tuple[str, ...]
    reused: bool


def prepare(
    model: Model,
    policy: PolicySpec,
    parameters: dict[str, Value],
    tools: Toolset,
    out: Path,
    *,
    imatrix: Path | None = None,
    allowed: Allowed = Allowed(),  # noqa: B008  frozen
    metadata: Sequence[Setting] = (),
    name: str | None = None,
    types: TypeList | None = None,
    plan: Plan | None = None,
    data: Data | None = None,
) -> Job:
    """Plan and check a file: see preflight. The output's place is checked by `check_outputs` and
    `run`.

    `metadata`: keys to set in the file. With `name` (see naming.file_name) `out` is the folder of a file that is named
    by its plan. `types`: a list of types that goes before the policy's rules. `plan` and `data`: pass them if they
    have already been made.
    """
    check_policy(policy, model, imatrix)
    if imatrix is not None and data is None:
        data = read_data(imatrix, model)
    covered = data.covered if data else None
    plan = plan or make_plan(model, policy, parameters, tools, imatrix, types)
    remarks = check_plan(plan, model, covered, policy, Ggml(tools), allowed)
    warnings = [*(data.warnings if data else ()), *remarks, *not_compared(plan, codec(tools))]
    if name is not None:
        out = out / file_name(model.path, plan, policy, name)
    rows = covered.imatrix.head_rows if covered and any(tensor.has_data for tensor in covered.head) else None
    keys = {
        **provenance(plan, policy, model, data.sha256 if data else "", tools, rows),
        **description(plan, model, metadata, tools),
    }
    derived = data is not None and data.derived
    if data and derived:
        keys["apex.imatrix.examined"] = "; ".join(data.warnings)[:100]
    job = Job(model, plan, covered, imatrix, out, keys, 0, tuple(warnings), tools, policy, types, derived)
    return replace(job, n_bytes=file_size(plan, model, added_keys(job, covered.imatrix if covered else None)))


def added_keys(job: Job, imatrix: Imatrix | None) -> dict[str, str | int | float | bool]:
    """Metadata that the run adds to the model's."""
    added: dict[str, str | int | float | bool] = {**job.keys}
    if imatrix is not None and job.data_path is not None:
        added |= imatrix_keys(Path(job.data_path.name), imatrix)
    return added


def arguments(job: Job, rules: Path, out: Path, *, threads: int | None = None) -> list[str]:
    """llama-quantize's command; run it in the imatrix's folder, so that the file records only its name."""
    wanted = [str(job.tools.tool("llama-quantize")), "--tensor-type-file", str(rules)]
    if job.data_path is not None:
        wanted += ["--imatrix", job.data_path.name]
    if any(Ggml(job.tools).type_traits(entry.from_type).quantized for entry in job.plan.entries):
        wanted.append("--allow-requantize")
    for key, value in job.keys.items():
        wanted += ["--override-kv", override(key, value)]
    wanted += [str(job.model.path.absolute()), str(out.absolute()), job.plan.base_type]
    return wanted if threads is None else [*wanted, str(threads)]


def check_outputs(jobs: Sequence[Job], *, force: bool = False, replace: bool = False) -> None:
    """Check all jobs before the first is written. Raises OutputUnwritable,
    DiskTooSmall.
    """
    taken: dict[Path, int] = {}
    may = _may_replace(force, replace)
    for job in jobs:
        if force or not _recorded(job):
            before = taken.get(job.out.parent, 0)
            check_output(job.artifact, job.inputs, job.n_bytes, replace=may, before=before)
            _check_copy(job)
            taken[job.out.parent] = before + job.n_bytes


def run(
    job: Job,
    *,
    force: bool = False,
    replace: bool = False,
    threads: int | None = None,
    load_check: bool = True,
    wait: str = "",
    report: Report = silent,
) -> Quantized:
    """Write, verify, put in place, with a manifest (`out` + .json) and a log (`out` + .log) beside it.

    `load_check`: the tools load the model before anything is written, and the file before it is put in place. A file
    made from the same parts is used again, unless `force`; another is replaced only with `force` or `replace`. `wait`:
    for what, where another run makes the file now. A failed or interrupted run leaves the previous output. Raises
    OutputUnwritable, DiskTooSmall, LoadFailed, ToolFailed, ToolKilled, VerificationFailed.
    """
    out = job.out
    sizes = {tensor.name: tensor.n_bytes for tensor in job.model.tensors}
    progress = _Progress(sizes, report, f"quantizing {out.name}")
    may = _may_replace(force, replace)
    with (
        making(
            job.artifact,
            inputs=job.inputs,
            reuse=not force,
            replace=may,
            n_bytes=job.n_bytes,
            wait=wait,
            report=report,
        ) as draft,
        scratch_folder("quantize") as scratch,
        unwinding_signals(),  # also while the file is verified
    ):
        if draft.found:
            return Quantized(out, job.plan, job.n_bytes, 0.0, job.warnings, True)
        if load_check:
            check_input(job.model, job.tools)
        data = _examined(job)
        rules, folder = scratch / "rules.txt", scratch / "run"
        folder.mkdir()
        if job.data_path is not None:
            (folder / job.data_path.name).symlink_to(job.data_path.absolute())
        rules.write_text(job.plan.rules, encoding="utf-8")
        with tool_writing(draft.part, out, job.n_bytes):
            ran = run_tool(
                arguments(job, rules, draft.part, threads=threads),
                cwd=folder,
                log=beside(out, LOG),
                on_line=progress.line,
                explain=output.explain,
                memory=job.memory or memory_limit(sum(sizes.values())),
            )
        progress.end()
        verify(draft.part, job.plan, job.keys, job.n_bytes, job.tools, source=job.model, imatrix=data, report=report)
        if load_check and trunk_blocks(job.model):
            check_loads(draft.part, job.tools, f"{out} as llama-quantize wrote it")
        draft.done(_record(job))
    return Quantized(out, job.plan, job.n_bytes, ran.seconds, job.warnings, False)


def _check_copy(job: Job) -> None:
    """Raises OutputUnwritable if the examined copy of the imatrix would replace another file."""
    if job.derived and job.data_path is not None:
        check_place(job.data_path)
        check_apart([job.data_path], job.inputs)
        check_copy_free(job.data_path)


def _examined(job: Job) -> Imatrix | None:
    """The data that the run uses; writes the copy of the imatrix if one is needed."""
    if job.imatrix is None or job.data_path is None:
        return None
    found, _ = crossed(read_imatrix(job.imatrix), job.model)
    if job.derived:
        _check_copy(job)
        write_examined(found, job.data_path, matrices_of(job.model))
    return found


@dataclass
class _Progress:
    """Progress in bytes of the tensors that llama-quantize has written."""

    sizes: dict[str, int]
    report: Report
    task: str
    done: int = 0
    current: str = ""

    def end(self) -> None:
        total = sum(self.sizes.values()) / 1e6
        self.report(Step(self.task, total, total, "MB"))

    def line(self, line: str) -> None:
        if (found := output.tensors_done(line)) and found[2] != self.current:
            self.done += self.sizes.get(self.current, 0)
            self.current = found[2]
            self.report(Step(self.task, self.done / 1e6, sum(self.sizes.values()) / 1e6, "MB"))


def _may_replace(force: bool, replace: bool) -> Replace:
    return "anything" if force else "own" if replace else "nothing"


def _recorded(job: Job) -> bool:
    """Whether the output is there with its size, and its manifest says that it was made from the same parts."""
    try:
        return job.artifact.found() is not None and read_header(job.out).file_size == job.n_bytes
    except (ModelMissing, ModelInvalid):
        return False


def _record(job: Job) -> QuantizedRecord:
    plan = job.plan
    return QuantizedRecord(
        policy=plan.policy,
        parameters=dict(plan.parameters),
        base_type=plan.base_type,
        rules=tuple(plan.rules.splitlines()),
        tensors=plan.entries,
        warnings=job.warnings,
        input=job.model.path.name,
        imatrix=job.imatrix.name if job.imatrix else None,
        examined_imatrix=job.data_path.name if job.data_path and job.derived else None,
    )
