"""Convert a checkpoint with the pinned source's converter: checks before, whole or not at all, the draft head
checked after.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from apex_build.conversion import driver
from apex_build.conversion.account import Account, dropped, left_out, read_account
from apex_build.conversion.checkpoint import Checkpoint, fingerprint, read_checkpoint
from apex_build.conversion.converter import architectures, family, has_other_file, pre_tokenizers, quantizations
from apex_build.conversion.environment import Python, choose, ensure, is_ready, versions
from apex_build.conversion.heads import require_head
from apex_build.errors import (
    CheckpointInvalid,
    ConversionFailed,
    ModelInvalid,
    ParameterUnknown,
    ToolFailed,
    ToolKilled,
)
from apex_build.gguf_model.header import Header, read_header
from apex_build.gguf_model.metadata import Setting
from apex_build.native.run import run_tool, unwinding_signals
from apex_build.near import near_hint
from apex_build.places import newer_converter
from apex_build.progress import Report, Step, silent
from apex_build.source.tree import tree_identity
from apex_build.storage.artifacts import Artifact, Replace, check_free, making
from apex_build.storage.disk import check_room, tool_writing
from apex_build.storage.manifest import CONVERTED, Json, Manifest, manifest_of
from apex_build.storage.outputs import LOG, MANIFEST, beside, check_apart, check_place, with_manifest_and_log
from apex_build.storage.scratch import scratch_folder

OUTTYPES = ("auto", "f16", "bf16", "f32", "q8_0")
_BYTES = {"f32": 4.0, "q8_0": 34 / 32}  # a value; the others take 2
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_MARK = "apex: every tensor is accounted for"  # printed by driver.py before the first byte is written
_WRITING = re.compile(r"Writing:\s+(\d+)%")
_METHODS = {
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8",
    "gptq": "GPTQ",
    "mlx": "MLX",
    "modelopt": "ModelOpt",
}
_EXPLAINED = (
    (
        "pre-tokenizer was not recognized",
        "the converter does not know this tokenizer",
        "apex convert --pre-tokenizer NAME (qwen35 for Qwen3.5 and 3.6)",
    ),
    ("wants its own code to run", "the checkpoint needs its own code, which is never run", None),
    ("execute code", "the checkpoint needs its own code, which is never run", None),
    (
        "Can not map tensor",
        "the converter does not know one of the tensors",
        "if the model is right without it: apex convert --drop NAME",
    ),
    ("No space left on device", "the disk is full", "free some space, or write to another disk"),
    (
        "No module named",
        "the converter's Python lacks a package",
        "apex convert --python PATH, with a Python that has it",
    ),
)


@dataclass(frozen=True)
class Job:
    """A checked conversion that can start. `n_bytes`: about how much it will write; `drop`: names that are left out."""

    checkpoint: Checkpoint
    source: Path
    out: Path
    outtype: str
    pre_tokenizer: str | None
    head: bool  # keep the draft head; False leaves it out
    python: Python
    n_bytes: int
    force: bool = False  # replace an existing `out`
    drop: frozenset[str] = frozenset()
    metadata: tuple[Setting, ...] = ()
    warnings: tuple[str, ...] = ()
    can_omit_head: bool = False
    threads: int | None = None

    @property
    def may_replace(self) -> Replace:
        return "anything" if self.force else "nothing"


@dataclass(frozen=True)
class CheckpointRecord:
    architecture: str
    files: Mapping[str, int]  # name -> bytes


@dataclass(frozen=True)
class ConverterRecord:
    source: str
    packages: Mapping[str, str | None]


@dataclass(frozen=True)
class ConvertedRecord:
    """What the manifest says beyond its head. `left_out`: names of the checkpoint's tensors, by the reason."""

    checkpoint: CheckpointRecord
    converter: ConverterRecord
    converted: str
    head_layers: int
    outtype: str
    pre_tokenizer: str | None
    left_out: Mapping[str, list[str]]
    metadata: Mapping[str, Json]
    tensors: int


@dataclass(frozen=True)
class Converted:
    """A converted model. `reused`: it was there, made from the same parts."""

    path: Path
    manifest: Manifest
    head_layers: int
    tensors: int
    left_out: Mapping[str, list[str]] = field(hash=False)
    reused: bool = False


def prepare(
    folder: Path,
    source: Path,
    out: Path,
    *,
    outtype: str = "auto",
    pre_tokenizer: str | None = None,
    head: bool = True,
    python: Path | None = None,
    drop: Sequence[str] = (),
    metadata: Sequence[Setting] = (),
    threads: int | None = None,
    force: bool = False,
) -> Job:
    """Refuse what cannot succeed, before any work. `source` is a pinned tree, `python` the converter's interpreter (see
    environment.choose), `drop` patterns of tensors that may be left out, `metadata` keys to set.

    Raises CheckpointInvalid (what is missing, an architecture that the converter lacks, a declared head without
    tensors), ParameterUnknown (pre-tokenizer, a pattern), OutputUnwritable, DiskTooSmall, EnvironmentUnusable.
    """
    checkpoint = read_checkpoint(folder)
    known = architectures(source)
    if checkpoint.architecture not in known:
        hint = near_hint(checkpoint.architecture, known, newer_converter(source.name), cutoff=0.6)
        raise CheckpointInvalid(
            f"the converter of {source.name} does not know the architecture {checkpoint.architecture}", hint=hint
        )
    warnings = _check_quantization(checkpoint, source)
    left = dropped(checkpoint, drop)
    kept = replace(checkpoint, tensors={name: info for name, info in checkpoint.tensors.items() if name not in left})
    code = family(source, checkpoint.architecture)
    if head:
        require_head(kept, code, source.name)
    if pre_tokenizer is not None and pre_tokenizer not in (names := pre_tokenizers(source)):
        hint = near_hint(pre_tokenizer, names, f"one of: {', '.join(names)}", n=5, cutoff=0.4)
        raise ParameterUnknown(f"llama.cpp has no pre-tokenizer {pre_tokenizer!r}", hint=hint)
    n_bytes = int(checkpoint.n_elements * _BYTES.get(outtype, 2.0))
    check_place(out)
    check_apart(with_manifest_and_log(out), _files_of(checkpoint.path))
    before = manifest_of(out, beside(out, MANIFEST))
    again = (
        not force and before is not None and before.kind == CONVERTED and before.is_of_size(out)
    )  # perhaps of the same parts
    what = f"the model of {checkpoint.path.name}, about,"
    if not again:
        check_free(Artifact(out, CONVERTED, {}), "anything" if force else "nothing")
        check_room(out.parent, n_bytes, what)
    job = Job(
        checkpoint,
        source,
        out.absolute(),
        outtype,
        pre_tokenizer,
        head,
        choose(python),
        n_bytes,
        force,
        left,
        tuple(metadata),
        warnings,
        code.can_omit_head,
        threads,
    )
    if again and not (is_ready(job.python) and _artifact(job, job.python.executable).found()):
        check_free(Artifact(out, CONVERTED, {}))
    return job


def account_for(job: Job, report: Report = silent) -> dict[str, list[str]] | None:
    """What a conversion would leave out, by reason, as in `run`; None until the converter's Python has been made.

    Raises CheckpointInvalid for tensors that would be lost, ConversionFailed.
    """
    if not is_ready(job.python):
        return None
    with scratch_folder("convert") as scratch:
        found = _convert(job, job.python.executable, scratch / "never.gguf", scratch, None, report, stop=True)
        return _left_out(job, found)


def run(job: Job, report: Report = silent) -> Converted:
    """Convert to `job.out`, with a manifest (`out` + .json) and the converter's output (`out` + .log) beside it.

    Raises ConversionFailed, ToolKilled, EnvironmentUnusable; then only the log is left.
    """
    log = beside(job.out, LOG)
    python = ensure(job.python, log, report)
    artifact = _artifact(job, python)
    with (
        making(
            artifact,
            inputs=_files_of(job.checkpoint.path),
            reuse=not job.force,
            replace=job.may_replace,
            n_bytes=job.n_bytes,
        ) as draft,
        scratch_folder("convert") as scratch,
        unwinding_signals(),
    ):
        if draft.found:
            return _converted(job.out, draft.found, reused=True)
        with tool_writing(draft.part, job.out, int(job.n_bytes * 0.9)):  # n_bytes is about right
            account = _convert(job, python, draft.part, scratch, log, report)
        header = _verify(job, draft.part, account)
        report(Step("hashing", 0))
        made = draft.done(_record(job, python, header, _left_out(job, account)))
    return _converted(job.out, made, reused=False)


def _artifact(job: Job, python: Path) -> Artifact:
    """What goes into the model: checkpoint, converter, the packages that it reads tokenizers and tensors with, its
    orders.
    """
    parts: dict[str, Json] = {
        "checkpoint": fingerprint(job.checkpoint),
        "source": tree_identity(job.source),
        "packages": _packages(python),
        "outtype": job.outtype,
        "pre_tokenizer": job.pre_tokenizer,
        "head": job.head,
        "drop": sorted(job.drop),
        "metadata": {one.key: one.value for one in job.metadata},
    }
    return Artifact(job.out, CONVERTED, parts)


def _packages(python: Path) -> dict[str, str | None]:
    have = versions(python)
    return {name: have.get(name) for name in ("torch", "transformers", "numpy")}


def _converted(out: Path, manifest: Manifest, *, reused: bool) -> Converted:
    said = manifest.details
    return Converted(out, manifest, int(said["head_layers"]), int(said["tensors"]), dict(said["left_out"]), reused)


def _files_of(folder: Path) -> Iterator[Path]:
    """The checkpoint's files: all in its folder except converted ones."""
    return (path for path in folder.rglob("*") if not path.name.endswith((".gguf", f".gguf{MANIFEST}", f".gguf{LOG}")))


def _convert(
    job: Job, python: Path, part: Path, scratch: Path, log: Path | None, report: Report, *, stop: bool = False
) -> Account:
    """Run the converter to its end or, with `stop`, until everything is known but nothing is written. A lost tensor
    stops it.
    """
    account: list[Account] = []

    def progress(line: str) -> None:
        if found := _WRITING.search(line):
            report(Step("converting", int(found[1]), 100, "%"))
        elif line.strip() == _MARK:
            account.append(read_account(scratch / "account.json"))
            _left_out(job, account[0])

    report(Step("converting", 0, 100, "%"))
    arguments = ["--outfile", str(part), "--outtype", job.outtype]
    if not job.head and job.can_omit_head:
        arguments.append("--no-mtp")
    orders = {
        "pre_tokenizer": job.pre_tokenizer,
        "drop": sorted(job.drop),
        "metadata": [[one.key, one.kind, one.value] for one in job.metadata],
        "account": str(scratch / "account.json"),
        "mark": _MARK,
        "stop": stop,
    }
    (scratch / "orders.json").write_text(json.dumps(orders), encoding="utf-8")
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(scratch),
        "PYTHONDONTWRITEBYTECODE": "1",  # the source tree is not changed
        "PYTHONUNBUFFERED": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    if job.threads is not None:  # of torch and NumPy, whichever library they were built with
        environment |= dict.fromkeys(_THREADS, str(job.threads))
    command: list[str | Path] = [
        python,
        driver.__file__,
        job.source.resolve(),
        job.checkpoint.path.resolve(),
        scratch / "orders.json",
        *arguments,
    ]
    try:
        run_tool(command, log=log, on_line=progress, cwd=scratch, env=environment, explain=_explain)
    except ToolKilled:
        raise
    except ToolFailed as error:
        message = error.message.replace(python.name, "the converter", 1)
        raise ConversionFailed(message, hint=error.hint) from None
    if not account:
        raise ConversionFailed(
            "the converter exited without writing an account of the tensors", hint="apex source verify"
        )
    return account[0]


def _left_out(job: Job, account: Account) -> dict[str, list[str]]:
    other = has_other_file(job.source, job.checkpoint.architecture)
    return left_out(job.checkpoint, account, job.drop, head=job.head, other_file=other, source=job.source.name)


def _check_quantization(checkpoint: Checkpoint, source: Path) -> tuple[str, ...]:
    """Raises CheckpointInvalid for a checkpoint quantized in a way that the converter cannot undo; a warning for the
    others.
    """
    method = checkpoint.quantization
    if method is None:
        return ()
    original = "take the original checkpoint in 16 bits"
    if method not in quantizations(source):
        raise CheckpointInvalid(
            f"{checkpoint.path} is already quantized, by {_METHODS.get(method, method)}, which the converter of "
            f"{source.name} "
            "cannot undo",
            hint=original,
        )
    return (
        f"{checkpoint.path} is already quantized, by {_METHODS.get(method, method)}: its loss is permanent; "
        f"{original} "
        "where there is one",
    )


def _explain(lines: Sequence[str]) -> tuple[str, str | None] | None:
    text = "\n".join(lines)
    return next(((diagnosis, hint) for words, diagnosis, hint in _EXPLAINED if words in text), None)


def _verify(job: Job, part: Path, account: Account) -> Header:
    """Check that the written file is a complete model with the tensors accounted for, and the promised draft head."""
    try:
        header = read_header(part)
    except ModelInvalid as error:
        raise ConversionFailed(f"the converter wrote a damaged file: {error.message}") from None
    promised = job.checkpoint.head_layers if job.head else 0
    architecture = header.metadata.get("general.architecture")
    found = header.metadata.get(f"{architecture}.nextn_predict_layers", 0)
    trunk = int(header.metadata.get(f"{architecture}.block_count", 0)) - found
    names = {tensor.name for tensor in header.tensors}
    if odd := sorted(names ^ set(account.written)):
        raise ConversionFailed(
            f"the converter wrote other tensors than it said: {odd[0]} is {'new' if odd[0] in names else 'missing'}"
        )
    absent = [
        f"blk.{layer}.{name}"
        for layer in range(trunk, trunk + promised)
        for name in ("nextn.eh_proj.weight", "nextn.enorm.weight", "nextn.hnorm.weight")
        if f"blk.{layer}.{name}" not in names
    ]
    if not job.head and found:
        raise ConversionFailed(
            f"the converter cannot leave out the draft head of {job.checkpoint.architecture}",
            hint="apex convert without --no-head",
        )
    if promised and (found != promised or absent):
        what = (
            f"{', '.join(absent[:3])} are missing"
            if absent
            else f"{architecture}.nextn_predict_layers is {found}, expected {promised}"
        )
        raise ConversionFailed(
            f"the converter left out the draft head of {job.checkpoint.architecture}: {what}",
            hint=f"{newer_converter(job.source.name)} may keep it; apex convert --no-head converts without it",
        )
    return header


def _record(job: Job, python: Path, header: Header, left: dict[str, list[str]]) -> ConvertedRecord:
    checkpoint = job.checkpoint
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    architecture = header.metadata.get("general.architecture")
    return ConvertedRecord(
        checkpoint=CheckpointRecord(
            checkpoint.architecture, {name: (checkpoint.path / name).stat().st_size for name in files}
        ),
        converter=ConverterRecord(tree_identity(job.source), _packages(python)),
        converted=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        head_layers=header.metadata.get(f"{architecture}.nextn_predict_layers", 0),
        outtype=job.outtype,
        pre_tokenizer=job.pre_tokenizer or header.metadata.get("tokenizer.ggml.pre"),
        left_out=left,
        metadata={one.key: one.value for one in job.metadata},
        tensors=len(header.tensors),
    )
