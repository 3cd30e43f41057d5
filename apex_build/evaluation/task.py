"""What an evaluator is given, part of the plugin API: a model file, and the means to run this build's tools on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from apex_build.errors import CalibrationSetInvalid
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.fingerprint import fingerprint
from apex_build.identity import sha256_file, sha256_json, whole_file, write_json
from apex_build.native import output
from apex_build.native.run import ToolRun, run_tool
from apex_build.native.server import Server, serve
from apex_build.native.toolset import Toolset
from apex_build.places import cache_root, lock_path
from apex_build.policy.parameters import Value
from apex_build.progress import Report, Step, silent

__all__ = ["Prompt", "Server", "Step", "Task", "read_prompts"]  # what a plugin may rely on


@dataclass(frozen=True)
class Prompt:
    domain: str
    text: str
    origin: str = ""  # file and line, for messages


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

    def number(self, name: str) -> int:
        """A setting of the kind 'int'."""
        return int(self.settings[name])

    def run(self, tool: str, *arguments: str | Path, what: str = "", log: Path | None = None) -> ToolRun:
        """Run a tool of the build to its end, reporting the chunks that it counts. Raises ToolFailed, ToolKilled."""
        watch = _chunks(f"{self.evaluator}: {what or self.model.path.name}", self.report)
        command = [str(self.tools.tool(tool)), *(str(argument) for argument in arguments), *self._threads()]
        with self._machine():
            return run_tool(command, on_line=watch, explain=output.explain, log=log)

    @contextmanager
    def serve(self, *arguments: str) -> Iterator[Server]:
        """llama-server with the model, for a `with` block; on a free port of the loopback, and ended with the block."""
        with self._machine(), serve(self.tools, self.model.path, arguments=[*arguments, *self._threads()]) as server:
            yield server

    def kept(self, name: str, about: Mapping[str, object], make: Callable[[Path], None], *, of: Model | None = None) -> Path:
        """A file in the cache that is made once: for a model (the task's own, or `of`), these tools, and all that `about` names.

        `make` writes it to the path it is given; nothing that it left half-written is ever found. `about` holds JSON values.
        """
        parts = {**about, "model": fingerprint(of or self.model), "tools": self.tools.identity, "name": name}
        path = cache_root() / "evaluation" / sha256_json(parts)[:32] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock_path(path)):
            if not path.is_file():
                write_json(path.with_name("made-from.json"), parts)
                with whole_file(path) as part:
                    make(part)
        return path

    def identity_of_text(self, domain: str) -> str:
        return sha256_file(self.texts[domain])

    def _threads(self) -> list[str]:
        return [] if self.threads is None else ["--threads", str(self.threads)]

    @contextmanager
    def _machine(self) -> Iterator[None]:
        """All cores for one tool at a time, over all runs of apex by this user. With a number of threads the user divides them."""
        if self.threads is not None:
            yield
            return
        lock = FileLock(lock_path(cache_root() / "evaluation" / "machine"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            self.report(Step("waiting for another evaluation on this machine (--threads N: do not wait)", 0))
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """One JSON object a line with `domain` and `prompt`, the text as the model is to get it. Raises CalibrationSetInvalid."""
    hint = 'one object a line: {"domain": "code", "prompt": "..."}'
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
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
        except (ValueError, TypeError, KeyError):
            raise CalibrationSetInvalid(f"{path}:{number}: not a prompt: {line:.80}", hint=hint) from None
        if not isinstance(domain, str) or not isinstance(text, str) or not text:
            raise CalibrationSetInvalid(f"{path}:{number}: domain and prompt must be texts, the prompt not empty", hint=hint)
        prompts.append(Prompt(domain, text, f"{path.name}:{number}"))
    if not prompts:
        raise CalibrationSetInvalid(f"{path}: no prompts in it", hint=hint)
    return tuple(prompts)


def _chunks(task: str, report: Report) -> Callable[[str], None]:
    total: list[int] = []

    def watch(line: str) -> None:
        if plan := output.planned(line):
            total[:] = [plan.chunks]
            report(Step(task, 0, plan.chunks, "chunks"))
        elif total and (mark := output.chunks_done(line)) is not None:
            report(Step(task, mark, total[0], "chunks"))

    return watch
