"""llama-imatrix over a calibration text: resumable, checked, and in place only when it is whole."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from apex_build.calibration.sets import CalibrationText
from apex_build.errors import CalibrationSetInvalid, ImatrixInvalid, OutputUnwritable, VerificationFailed
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.coverage import Coverage, coverage
from apex_build.gguf_model.fingerprint import fingerprint
from apex_build.gguf_model.imatrix import Imatrix, check_values, read_imatrix
from apex_build.identity import beside, check_place, read_json, sha256_file, sha256_json, write_json
from apex_build.native import output
from apex_build.native.run import run_tool
from apex_build.native.toolset import Toolset
from apex_build.places import lock_path
from apex_build.progress import Report, Step, silent

_LEAST_CHUNKS = 2  # llama-imatrix refuses a text of fewer
_RESUMABLE = 3  # chunks: llama-imatrix refuses to start where fewer are left
_NO_SAVES = 1_000_000_000


@dataclass(frozen=True)
class Settings:
    """How to run llama-imatrix. One sequence of `context` tokens a batch: no row is lost, and runs can be split at any chunk."""

    context: int = 512
    chunks: int | None = None  # at the most; None for the whole text
    head: bool = True  # run the draft head, where the model has one
    threads: int | None = None
    gpu_layers: int | None = None
    snapshot_every: int = 10  # chunks
    extra: tuple[str, ...] = ()  # further arguments of llama-imatrix

    @property
    def decisive(self) -> dict[str, Any]:
        """What changes the result, and so may not change between the parts of one run."""
        return {"context": self.context, "head": self.head, "extra": list(self.extra)}


@dataclass(frozen=True)
class Calibration:
    """A finished run. `perplexity` is the trunk's over the text, of the part since the last resumption; None if not printed."""

    path: Path
    identity: str
    coverage: Coverage
    perplexity: float | None
    seconds: float
    resumed_at: int  # chunks that an interrupted run had done
    reused: bool  # the same work was done before: nothing was run


def arguments(model: Model, settings: Settings, tools: Toolset) -> list[str]:
    """The command of a run, without text, output, chunks and resumption."""
    wanted = [str(tools.tool("llama-imatrix")), "--model", str(model.path.absolute()), "--parse-special"]
    wanted += ["--ctx-size", str(settings.context), "--batch-size", str(settings.context)]
    wanted += ["--output-frequency", str(_NO_SAVES), "--save-frequency", str(settings.snapshot_every)]
    if settings.head and model.head_layers:
        wanted.append("--mtp")
    if settings.threads is not None:
        wanted += ["--threads", str(settings.threads)]
    if settings.gpu_layers is not None:
        wanted += ["--n-gpu-layers", str(settings.gpu_layers)]
    return [*wanted, *settings.extra]


def identity(model: Model, text: CalibrationText, settings: Settings, tools: Toolset) -> dict[str, Any]:
    """What goes into an imatrix."""
    return {
        "model": fingerprint(model),
        "text": text.sha256,
        "settings": {**settings.decisive, "chunks": settings.chunks},
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
    report: Report = silent,
) -> Calibration:
    """Write the imatrix of `model` over `text` to `out`, with a manifest beside it (`out` + .json) and a log (`out` + .log).

    An interrupted run goes on from its last snapshot, if model, text, settings and tools are the same; a finished one is reused.
    `force` does neither, and replaces what is there; `replace` replaces only what was made from something else.
    Raises OutputUnwritable, ToolFailed, ToolKilled, VerificationFailed (nothing is put in place then), CalibrationSetInvalid.
    """
    check_place(out, (*model.files, text.path) if text.path else model.files)
    if len(text.data) < _LEAST_CHUNKS * settings.context:  # a token is a byte at the least; llama-imatrix counts them exactly
        raise CalibrationSetInvalid(
            f"{text.name}: the text has {len(text.data)} bytes, and calibration needs at least {_LEAST_CHUNKS} chunks of "
            f"{settings.context} tokens",
            hint="give more text, or a smaller --context",
        )
    parts = identity(model, text, settings, tools)
    key = sha256_json(parts)
    work = out.with_name(f".{out.name}.work")
    try:
        with FileLock(lock_path(out), timeout=0):
            if not force and (done := _finished(out, key, model)):
                shutil.rmtree(work, ignore_errors=True)  # ended between the last two steps
                return done
            if out.exists() and not (force or replace):
                raise OutputUnwritable(
                    f"{out} exists and was made from something else", hint="give another name with -o, or --force to replace it"
                )
            _prepare(work, key, text, fresh=force)
            manifest = {"identity": key, "from": parts, "text": _text_json(text)}
            done = _run(model, text, tools, out, settings, work, manifest, report)
            shutil.rmtree(work)
            return done
    except Timeout:
        raise OutputUnwritable(f"{out} is being written by another run of apex") from None


def _finished(out: Path, key: str, model: Model) -> Calibration | None:
    try:
        manifest = read_json(beside(out, ".json"))
        if manifest.get("identity") != key or manifest.get("sha256") != sha256_file(out):
            return None
        return Calibration(out, key, coverage(read_imatrix(out), model), None, 0.0, 0, True)
    except (OSError, ValueError, AttributeError, ImatrixInvalid):
        return None


def _prepare(work: Path, key: str, text: CalibrationText, *, fresh: bool) -> None:
    """The folder of an unfinished run: kept if it is of the same work, made anew otherwise."""
    try:
        same = not fresh and read_json(work / "identity.json") == key and (work / "text" / text.name).is_file()
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(work, ignore_errors=True)
        (work / "text").mkdir(parents=True)  # of its own: a text may have any name
        (work / "text" / text.name).write_bytes(text.data)
        write_json(work / "identity.json", key)


def _run(
    model: Model,
    text: CalibrationText,
    tools: Toolset,
    out: Path,
    settings: Settings,
    work: Path,
    manifest: dict[str, Any],
    report: Report,
) -> Calibration:
    snapshot, done = _snapshot(work)
    partial = work / "imatrix.gguf"
    command = [*arguments(model, settings, tools), "--file", text.name, "--output", f"../{partial.name}"]
    if snapshot is not None:
        command += ["--in-file", f"../{snapshot.name}", "--chunk", str(done)]
    if settings.chunks is not None:
        command += ["--chunks", str(settings.chunks - done)]
    watch = _Watch(work, done, settings, report)
    log = beside(out, ".log")
    ran = run_tool(command, cwd=work / "text", log=log, on_line=watch.line, explain=output.explain)
    _verify(read_imatrix(partial), model, settings)
    values = [value for line in ran.lines if (value := output.perplexity(line))]
    # The manifest first: a file in place without it would not be known again.
    write_json(beside(out, ".json"), {**manifest, "sha256": sha256_file(partial)})
    partial.replace(out)
    covered = coverage(read_imatrix(out), model)
    return Calibration(out, manifest["identity"], covered, values[-1].value if values else None, ran.seconds, done, False)


def _verify(found: Imatrix, model: Model, settings: Settings) -> None:
    check_values(found)
    covered = coverage(found, model)
    if settings.head and model.head_layers and found.head_tokens is None:
        raise VerificationFailed(
            f"{model.path}: the draft head was not run: this llama.cpp cannot evaluate it for {model.architecture}",
            hint="apex calibrate --no-mtp, for an imatrix of the trunk alone",
        )
    without = [tensor.name for tensor in covered.head if not tensor.has_data]
    if settings.head and without:
        raise VerificationFailed(
            f"{model.path}: {len(without)} weights of the draft head got no calibration data, {without[0]} among them",
            hint="give more text, or more chunks",
        )


@dataclass
class _Watch:
    """Turns the tool's output into progress, and removes snapshots that a newer one has made useless."""

    work: Path
    before: int  # chunks done by earlier runs
    settings: Settings
    report: Report
    total: int | None = None
    seen: int = 0

    def line(self, line: str) -> None:
        if plan := output.planned(line):
            self.total = self.before + plan.chunks
            write_json(self.work / "total.json", self.total)
            self.report(Step("calibrating", self.before, self.total, "chunks"))
        if (mark := output.chunks_done(line)) is not None and mark > self.seen and self.total is not None:
            self.seen = mark
            self.report(Step("calibrating", self.before + mark, self.total, "chunks"))
            if mark % self.settings.snapshot_every == 0:
                for path, _ in _snapshots(self.work)[:-2]:
                    path.unlink(missing_ok=True)


def _snapshots(work: Path) -> list[tuple[Path, int]]:
    """Snapshots with their numbers of chunks, oldest first."""
    found = [(path, int(number[1])) for path in work.glob("*.at_*") if (number := re.search(r"\.at_(\d+)$", path.name))]
    return sorted(found, key=lambda item: item[1])


def _snapshot(work: Path) -> tuple[Path | None, int]:
    """The newest snapshot to go on from, and the chunks it holds: whole, and with enough left for llama-imatrix to start."""
    try:
        total = int(read_json(work / "total.json"))
    except (OSError, ValueError, TypeError):
        return None, 0
    for path, chunks in reversed(_snapshots(work)):
        try:
            found = read_imatrix(path)
            check_values(found)
        except ImatrixInvalid:  # cut short by what ended the run
            path.unlink()
            continue
        if found.chunk_count == chunks and total - chunks >= _RESUMABLE:
            return path, chunks
    return None, 0


def _text_json(text: CalibrationText) -> dict[str, Any]:
    parts = [{"domain": p.domain, "source": p.source, "documents": p.documents, "bytes": p.n_bytes} for p in text.parts]
    return {"name": text.name, "bytes": len(text.data), "sha256": text.sha256, "parts": parts}
