"""llama-server during a `with` block: on the loopback, on a port that the system picks, always stopped at the end."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apex_build.errors import EvaluationRefused, ToolFailed, ToolKilled, ToolTimeout
from apex_build.native.lines import Lines
from apex_build.native.memory import memory_guard
from apex_build.native.output import draft, explain, server_address
from apex_build.native.run import failure, start, stop, stopped_in_thread, tail, unwinding_signals, where
from apex_build.native.toolset import Toolset
from apex_build.storage.scratch import scratch_folder

_LARGEST_ANSWER = 64 << 20
_LOG_READ = 4 << 20
_STOP_ASKED = 0.2  # seconds between two questions whether to stop
_LOG_WAIT = 10.0  # seconds that log lines, written by a separate thread, may come after the answer

# The server parses even a plain completion as a chat message, and answers 500 when a (small, or badly quantized) model
# wrote bytes that are not UTF-8. A parser that matches the empty string prevents it; `content` stays as it is. See
# common/peg-parser.cpp.
_NO_PARSER = json.dumps({"parsers": [{"type": "epsilon"}], "rules": {}, "root": 0})


@dataclass(frozen=True)
class Draft:
    """One draft: how many of its first tokens were accepted, and how many it had.

    `evaluations`: how often the trunk was evaluated for it. More than once if the model's memory cannot be rolled
    back into the draft: the server then evaluates the accepted tokens again, and the one that the trunk wrote after
    them.
    """

    accepted: int
    drafted: int
    evaluations: int = 1

    @property
    def written(self) -> int:
        """Tokens written with it: after the accepted ones, each evaluation gives one of the trunk's own."""
        return self.accepted + self.evaluations


@dataclass(frozen=True)
class Server:
    """A running llama-server that has loaded its model."""

    address: str
    process: subprocess.Popen[bytes]
    output: Path  # what it prints
    log: Path | None  # the same, if it outlives the server
    ready_within: float = 600.0  # seconds that it had to load the model
    command: tuple[str, ...] = ()
    memory: int | None = None  # bytes that it may take

    def completion(
        self, prompt: str, *, n_predict: int, temperature: float = 0.0, timeout: float = 600.0, **options: Any
    ) -> dict[str, Any]:
        """POST /completion. The answer has `content` and `timings`, with `draft_n` and `draft_n_accepted` where drafts
        were made.

        `options` are further fields of the request (seed, cache_prompt, stop, ...). Raises ToolFailed, ToolKilled,
        ToolTimeout.
        """
        body = {
            "prompt": prompt,
            "n_predict": n_predict,
            "temperature": temperature,
            "chat_parser": _NO_PARSER,
            **options,
        }
        return self.post("/completion", body, timeout=timeout)

    def drafts(self, answer: dict[str, Any], since: int) -> tuple[Draft, ...] | None:
        """The drafts behind a completion, in order; `since` is what `printed` returned before it.

        None if the server does not print them: a llama.cpp before LLAMA_TRACE. For one slot and one request at a time.
        Raises ToolFailed if the drafts that it printed are not those that it counted.
        """
        counted = int(answer["timings"].get("draft_n", 0))
        deadline = time.monotonic() + _LOG_WAIT
        while True:
            found = drafts_printed(_lines(self.output, since))
            total = sum(draft.drafted for draft in found)
            if total == counted:
                return found
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        if not found:
            return None
        raise ToolFailed(f"llama-server counted {counted} drafted tokens and printed {total}{where(self.log)}")

    def tell(self, watch: Callable[[str], None]) -> None:
        """Pass each line printed so far to `watch`."""
        for line in _lines(self.output):
            watch(line)

    def printed(self) -> int:
        """How many bytes it has printed so far."""
        return self.output.stat().st_size

    def check_room(self, prompts: Iterable[tuple[str, str]], n_predict: int) -> None:
        """Raises EvaluationRefused for the first prompt (name, text) that leaves no room for `n_predict` tokens after
        it.
        """
        context = int(self.get("/props")["default_generation_settings"]["n_ctx"])
        for name, text in prompts:
            # as /completion does it
            tokens = len(
                self.post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
            )
            if tokens + n_predict > context:
                raise EvaluationRefused(
                    f"{name}: the prompt has {tokens} tokens, and {n_predict} are to be written after it, "
                    f"but the context holds {context}",
                    hint="shorten the prompt or leave it out, or, for a model trained with more: --set "
                    "EVALUATOR.context=4096",
                )

    @contextmanager
    def beside(self, *arguments: str) -> Iterator[Server]:
        """A second server for the same model with additional arguments, while this one runs."""
        with _serve([*self.command, *arguments], None, self.ready_within, self.memory) as server:
            yield server

    def get(self, path: str, *, timeout: float = 600.0) -> dict[str, Any]:
        """A request without a body, answered completely by a JSON object within `timeout` seconds."""
        return self._ask("GET", path, None, timeout)

    def post(self, path: str, body: dict[str, Any], *, timeout: float = 600.0) -> dict[str, Any]:
        """A request with a JSON body, answered completely by a JSON object within `timeout` seconds."""
        return self._ask("POST", path, json.dumps(body).encode(), timeout)

    def _ask(self, method: str, path: str, body: bytes | None, timeout: float) -> dict[str, Any]:
        try:
            status, text = request(self.address, method, path, body, timeout)
        except TimeoutError:
            raise ToolTimeout(f"llama-server did not answer {path} within {timeout:.0f} s{where(self.log)}") from None
        except (OSError, http.client.HTTPException) as error:  # the connection broke
            raise self._broken(f"llama-server did not answer {path}: {error or type(error).__name__}") from None
        if status >= 400:
            said = text[:2000].decode(errors="replace")
            raise ToolFailed(f"llama-server answered {path} with {status}: {said}{where(self.log)}")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise ToolFailed(f"llama-server answered {path} with something other than a JSON object{where(self.log)}")
        return value

    def _broken(self, otherwise: str) -> Exception:
        try:
            code = self.process.wait(2)
        except subprocess.TimeoutExpired:
            return ToolFailed(f"{otherwise}{where(self.log)}")
        return failure("llama-server", code, _lines(self.output), self.log, explain)


@contextmanager
def serve(
    toolset: Toolset,
    model: Path,
    *,
    arguments: Sequence[str] = (),
    log: Path | None = None,
    ready_within: float = 600.0,
    memory: int | None = None,
) -> Iterator[Server]:
    """Start llama-server on `model`, wait until it answers, and end it (its whole process group) when the block ends in
    any way.

    `arguments`: such as ("--spec-type", "draft-mtp", "--spec-draft-n-max", "2", "-np", "1"). `log` keeps what it
    prints. `memory`: bytes that it may take, beside the model's file. Raises ToolTimeout if it is not ready within
    `ready_within` seconds, ToolFailed or ToolKilled where it ends instead.
    """
    command = [
        str(toolset.tool("llama-server")),
        "--model",
        str(model.absolute()),
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        *arguments,
    ]
    with _serve(command, log, ready_within, memory) as server:
        yield server


@contextmanager
def _serve(command: Sequence[str], log: Path | None, ready_within: float, memory: int | None) -> Iterator[Server]:
    with (
        scratch_folder("server") as scratch,
        scratch_folder("run") as folder,
        unwinding_signals(),
        ExitStack() as stack,
    ):
        path = log or scratch / "llama-server.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as output:  # a file, not a pipe: the server never blocks on it
            # LLAMA_TRACE: print the result of each draft
            process = start(command, cwd=folder, output=output, env={"LLAMA_TRACE": "1"})
        guard = stack.enter_context(memory_guard(process.pid, memory))
        stack.enter_context(_ended_when_stopped(process))
        try:
            address = _wait_ready(process, path, log, ready_within)
            yield Server(address, process, path, log, ready_within, tuple(command), memory)
        except (ToolFailed, ToolKilled):
            if guard.exceeded:
                raise guard.error("llama-server", log) from None
            raise
        finally:
            stop(process)


@contextmanager
def _ended_when_stopped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """As `run_tool` ends a tool in a block of `stopping`: whoever waits for an answer then gets an error."""
    stopped = stopped_in_thread()
    if stopped is None:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_STOP_ASKED):
            if stopped():
                process.kill()  # to a gentler signal it would answer first; it writes nothing
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def request(address: str, method: str, path: str, body: bytes | None, timeout: float) -> tuple[int, bytes]:
    """Status and body of an answer. Raises TimeoutError if it is not complete in time, even if it trickles in."""
    host, _, port = address.removeprefix("http://").partition(":")
    deadline = time.monotonic() + timeout
    connection = http.client.HTTPConnection(
        host, int(port), timeout=timeout
    )  # never through a proxy: it is on this machine
    try:
        connection.connect()
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            with suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(max(0.0, deadline - time.monotonic()), expire)
        timer.daemon = True
        timer.start()
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body is not None else {})
            answer = connection.getresponse()
            text = answer.read(_LARGEST_ANSWER)
        except (OSError, http.client.HTTPException):
            if expired.is_set():
                raise TimeoutError from None
            raise
        finally:
            timer.cancel()
        if expired.is_set():
            raise TimeoutError
        return answer.status, text
    finally:
        connection.close()


def drafts_printed(lines: Iterable[str]) -> tuple[Draft, ...]:
    """All drafts in what llama-server prints under LLAMA_TRACE."""
    drafts: list[Draft] = []
    again = False
    for line in lines:
        if found := draft(line):
            accepted, drafted, follows = found
            if again:
                drafts[-1] = replace(drafts[-1], evaluations=drafts[-1].evaluations + 1)
            else:
                drafts.append(Draft(accepted, drafted))
            again = follows
    return tuple(drafts)


def _wait_ready(process: subprocess.Popen[bytes], output: Path, log: Path | None, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    address = None
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise failure(
                "llama-server", process.returncode, _lines(output), log, explain
            )  # even with code 0: it should have stayed
        address = address or server_address(_lines(output))
        if address is not None and _healthy(address):
            return address
        time.sleep(0.05)
    raise ToolTimeout(
        f"llama-server was not ready within {seconds:.1f} s{tail(_lines(output))}{where(log)}",
        hint="is the disk slow, or the machine busy? on a second try more of the file is in memory",
    )


def _healthy(address: str) -> bool:
    try:
        return request(address, "GET", "/health", None, 5.0)[0] == 200
    except (OSError, http.client.HTTPException):  # refused before it listens; 503 while it loads
        return False


def _lines(log: Path, since: int = 0) -> list[str]:
    lines: list[str] = []
    with log.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(since, file.tell() - _LOG_READ))
        reader = Lines(lines.append)
        reader.feed(file.read())
        reader.close()
    return lines
