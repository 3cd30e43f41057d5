"""The input of an evaluator, part of the plugin API: a model file, and functions to run this build's tools on it."""

from __future__ import annotations

import glob
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from apex_build.errors import CalibrationSetInvalid, ParameterUnknown
from apex_build.evaluation.pace import tokens_of
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.fingerprint import fingerprint
from apex_build.native import output
from apex_build.native.arguments import check_no_double, resolve
from apex_build.native.devices import gpus_used
from apex_build.native.early import warnings_of
from apex_build.native.memory import memory_limit
from apex_build.native.run import ToolRun, run_tool
from apex_build.native.server import Server, serve
from apex_build.native.toolset import Toolset
from apex_build.parameters import Value
from apex_build.places import cache_folder, cache_root
from apex_build.progress import Report, Step, silent
from apex_build.storage.artifacts import Artifact, Draft, making
from apex_build.storage.digests import sha256_file, sha256_json
from apex_build.storage.disk import check_room
from apex_build.storage.locks import lock_file, locked_in_thread
from apex_build.storage.manifest import KEPT, Manifest

__all__ = ["Prompt", "Server", "Step", "Task", "read_prompts"]  # what a plugin may rely on

_ALIKE = ("llama-perplexity", "llama-server")  # these take the same arguments
_OWN = "llama-bench"  # some of this one's are others
_READY = 600.0  # seconds that a server may take to load a model, beside those of
_SLOW_DISK = 50e6  # bytes a second


@dataclass(frozen=True)
class KeptRecord:
    """What the manifest of a kept file says beyond its head."""

    name: str


@dataclass(frozen=True)
class Prompt:
    domain: str
    text: str
    origin: str = ""  # file and line, for messages


@dataclass(frozen=True)
class ToolOptions:
    """What the user adds to the commands of the tools that run a model. By themselves they put on the GPU what fits.

    `arguments` go to llama-perplexity and llama-server; one that begins with a tool's name and a colon, such as
    `llama-bench:--mmap`, to that tool alone. Raises ParameterUnknown for a tool that evaluators do not run.
    """

    gpu_layers: int | None = None
    arguments: tuple[str, ...] = ()
    memory: int | None = None  # bytes that a tool may take; None: by the model's size

    def __post_init__(self) -> None:
        for argument in self.arguments:
            name, colon, _ = argument.partition(":")
            if colon and name.startswith("llama-") and name not in (*_ALIKE, _OWN):
                raise ParameterUnknown(
                    f"--tool-argument {argument}: the tools are {', '.join((*_ALIKE, _OWN))}, not {name}"
                )

    def parts(self, tools: Toolset) -> dict[str, Any]:
        """For identities: where and how a model is evaluated changes its figures a little, and its times. Empty by
        default.

        The files among the arguments count by their contents. Raises ParameterUnknown for an argument that apex sets
        itself.
        """
        found: dict[str, Any] = {} if self.gpu_layers is None else {"gpu_layers": self.gpu_layers}
        if self.arguments:
            found["tool_arguments"] = list(self.arguments)
        files = {
            path: sha
            for tool in (*_ALIKE, _OWN)
            if (own := self.of(tool))
            for path, sha in resolve(tools.tool(tool), own).files.items()
        }
        return found | ({"tool_argument_files": files} if files else {})

    def of(self, tool: str) -> list[str]:
        """The user's own arguments for a tool."""
        if tool not in (*_ALIKE, _OWN):
            return []
        found: list[str] = []
        for argument in self.arguments:
            name, colon, rest = argument.partition(":")
            if colon and name in (*_ALIKE, _OWN):
                found += [rest] if name == tool else []
            elif tool in _ALIKE:
                found.append(argument)
        return found


@dataclass(frozen=True)
class Task:
    """One evaluator's work on one file."""

    evaluator: str
    model: Model
    tools: Toolset
    reference: Model | None = None
    texts: Mapping[str, Path] = field(default_factory=dict, hash=False)  # domain -> UTF-8 text
    prompts: tuple[Prompt, ...] = ()
    data: Path | None = None  # the file that the user gave under the evaluator's name
    settings: Mapping[str, Value] = field(default_factory=dict, hash=False)
    threads: int | None = None  # None: as many as the tools take by themselves
    report: Report = silent
    options: ToolOptions = ToolOptions()
    code: str = ""  # of the evaluator's plugin: LoadedEvaluator.code
    chunks_option: str = ""  # of a verb, for hints: its own way to set `chunks`

    @property
    def gpu(self) -> str:
        """What the tools run the model on, such as `NVIDIA H200`; empty if it is the CPU."""
        return gpus_used(self.tools, self.options.gpu_layers)

    def number(self, name: str) -> int:
        """A setting of the kind 'int'."""
        return int(self.settings[name])

    def run(self, tool: str, *arguments: str | Path, what: str = "", log: Path | None = None) -> ToolRun:
        """Run a tool of the build to its end, reporting the chunks that it counts. Raises ToolFailed, ToolKilled."""
        watch = _chunks(f"{self.evaluator}: {what or self.model.path.name}", self.report)
        own = [str(argument.absolute()) if isinstance(argument, Path) else argument for argument in arguments]
        command: list[str | Path] = [self.tools.tool(tool), *own, *self._options(tool, own)]
        with self._machine():
            return run_tool(command, on_line=watch, explain=output.explain, log=log, memory=self._memory(own))

    def needing_room(self, folder: Path, n_bytes: Callable[[int], int], what: Callable[[int], str]) -> Task:
        """This task, for a tool that writes `n_bytes(chunks)` into `folder`: where they do not fit, it is ended with
        DiskTooSmall as soon as it has read the text and says how many chunks that has. `what(chunks)` names them.
        """

        def guard(step: Step) -> None:
            if step.unit == "chunks" and step.total and step.done == 0:
                chunks = int(step.total)
                check_room(folder, n_bytes(chunks), what(chunks), hint=self.hint_of_room(chunks))
            self.report(step)

        return replace(self, report=guard)

    def hint_of_room(self, chunks: int) -> str | None:
        """What to do where the disk is too small for what is kept of so many chunks of a text."""
        if "chunks" not in self.settings:
            return None
        option = self.chunks_option or f"--set {self.evaluator}.chunks={max(1, chunks // 4)}"
        return f"fewer positions ({option}), or APEX_CACHE_DIR=FOLDER on a larger disk"

    @contextmanager
    def serve(self, *arguments: str) -> Iterator[Server]:
        """llama-server with the model, for a `with` block; on a free port of the loopback, and ended with the block."""
        options = self._options("llama-server", arguments)
        patience = _READY + sum(path.stat().st_size for path in self.model.files) / _SLOW_DISK
        with (
            self._machine(),
            serve(
                self.tools,
                self.model.path,
                arguments=[*arguments, *options],
                ready_within=patience,
                memory=self._memory(arguments),
            ) as server,
        ):
            server.tell(warnings_of(self.report, f"{self.evaluator}: {self.model.path.name}"))
            yield server

    def kept(
        self, name: str, about: Mapping[str, object], make: Callable[[Path], None], *, of: Model | None = None
    ) -> Path:
        """A file in the cache that is made once: for a model (the task's own, or `of`), these tools and how they are
        run, and all that `about` names.

        `make` writes it to the path it is given; nothing that it left half-written is ever found. `about` holds JSON
        values.
        """
        with self.keeping(name, about, of=of) as draft:
            if not draft.found:
                make(draft.part)
                draft.done(KeptRecord(name))
        return draft.artifact.out

    @contextmanager
    def keeping(self, name: str, about: Mapping[str, object], *, of: Model | None = None) -> Iterator[Draft]:
        """As `kept`, for a `with` block that makes the file and calls `done` unless it was `found`. No other run makes
        or finds it meanwhile.
        """
        artifact = self.kept_as(name, about, of=of)
        path = cache_folder("evaluation", artifact.out.parent.name) / name
        wait = f"another evaluation that makes {name}"
        with making(
            artifact, replace="anything", intact=lambda one: one.is_of_size(path), wait=wait, report=self.report
        ) as draft:
            if draft.found:
                os.utime(path)  # `apex cache prune` goes by the last use
            else:
                for left in path.parent.glob(
                    f".{glob.escape(name)}.*"
                ):  # what a killed run's tool wrote beside: it may be of many GB
                    if left not in (draft.part, lock_file(path)):
                        left.unlink(missing_ok=True)
            yield draft

    def kept_before(self, name: str, about: Mapping[str, object], *, of: Model | None = None) -> Manifest | None:
        """The manifest of the file that `kept` would find; None if it would make it."""
        artifact = self.kept_as(name, about, of=of)
        found = artifact.found()
        return found if found and found.is_of_size(artifact.out) else None

    def kept_as(self, name: str, about: Mapping[str, object], *, of: Model | None = None) -> Artifact:
        """Where `kept` keeps a file, and what makes it another one."""
        parts: dict[str, Any] = {
            **about,
            "model": fingerprint(of or self.model),
            "tools": self.tools.identity,
            "name": name,
            **self.options.parts(self.tools),
        }
        if (
            self.code
        ):  # not a built-in evaluator: another version of it may write another file, and others may use the same name
            parts |= {"evaluator": self.evaluator, "code": self.code}
        path = cache_root() / "evaluation" / sha256_json(parts)[:32] / name
        return Artifact(path, KEPT, parts, path.with_name("made-from.json"))

    def tokens_of_text(self, domain: str) -> float:
        """About how many tokens a run over this text reads: at most `chunks` of `context`, if the evaluator has these
        settings.
        """
        found = tokens_of(self.texts[domain].stat().st_size)
        chunks, context = (self.settings.get(name) for name in ("chunks", "context"))
        return min(found, float(chunks) * float(context)) if chunks and context else found

    def identity_of_text(self, domain: str) -> str:
        return sha256_file(self.texts[domain])

    def _options(self, tool: str, own: Sequence[str]) -> list[str]:
        """Arguments that the user adds to a tool's `own` ones. Raises ParameterUnknown if these include one already."""
        program, given = self.tools.tool(tool), self.options.of(tool)
        check_no_double(program, own, given)
        layers = [] if self.options.gpu_layers is None else ["--n-gpu-layers", str(self.options.gpu_layers)]
        threads = [] if self.threads is None else ["--threads", str(self.threads)]
        return [*layers, *resolve(program, given).arguments, *threads]

    def _memory(self, arguments: Sequence[str]) -> int:
        """Bytes that a tool may take beside the files that it maps."""
        if self.options.memory is not None:
            return self.options.memory
        sizes = [tensor.n_bytes for model in (self.model, self.reference) if model for tensor in model.tensors]
        contexts = [
            int(value) for name, value in pairwise(arguments) if name in ("-c", "--ctx-size") and value.isdecimal()
        ]
        vocabulary = max(max(tensor.shape) for tensor in self.model.tensors)
        return memory_limit(sum(sizes), max(contexts, default=0), vocabulary)

    @contextmanager
    def _machine(self) -> Iterator[None]:
        """All cores for one tool at a time, over all runs of apex by this user. With a number of threads the user
        divides them.
        """
        if self.threads is not None:
            yield
            return
        what = "another evaluation on this machine (--threads N: do not wait)"
        # again in this process: an evaluator may run a tool while its server is running
        with locked_in_thread(cache_folder("evaluation") / f"machine-{_this_machine()}", what=what, report=self.report):
            yield


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """One JSON object a line with `domain` and `prompt`, the text as the model is to get it. Raises
    CalibrationSetInvalid.
    """
    hint = 'one object a line: {"domain": "code", "prompt": "..."}'
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # other line breaks may stand in a prompt
    except FileNotFoundError:
        raise CalibrationSetInvalid(f"{path}: no such file", hint=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationSetInvalid(f"{path}: cannot be read as UTF-8 text: {error}", hint=hint) from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            domain, text = row["domain"], row["prompt"]
            f"{domain}{text}".encode()  # JSON can hold half a surrogate pair, which UTF-8 cannot
        except (ValueError, TypeError, KeyError, RecursionError):
            raise CalibrationSetInvalid(f"{path}:{number}: not a prompt: {line:.80}", hint=hint) from None
        if not isinstance(domain, str) or not isinstance(text, str) or not text:
            raise CalibrationSetInvalid(
                f"{path}:{number}: domain and prompt must be texts, the prompt not empty", hint=hint
            )
        prompts.append(Prompt(domain, text, f"{path.name}:{number}"))
    if not prompts:
        raise CalibrationSetInvalid(f"{path}: no prompts in it", hint=hint)
    return tuple(prompts)


def _this_machine() -> str:
    """Machines may share a cache, and containers on one machine have different names, so the kernel's machine id is
    used.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


def _chunks(task: str, report: Report) -> Callable[[str], None]:
    total: list[int] = []
    warn = warnings_of(report, task)

    def watch(line: str) -> None:
        warn(line)
        if plan := output.planned(line):
            total[:] = [plan.chunks]
            report(Step(task, 0, plan.chunks, "chunks"))
        elif total and (mark := output.chunks_done(line)) is not None:
            report(Step(task, mark, total[0], "chunks"))
        elif (probes := output.probes_planned(line)) is not None:
            total[:] = [probes]
            report(Step(task, 0, probes, "probes"))
        elif total and (done := output.probes_done(line)) is not None:
            report(Step(task, done, total[0], "probes"))

    return watch
