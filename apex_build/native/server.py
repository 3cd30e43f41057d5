"""llama-server for the length of a `with` block: on the loopback, on a port the system picks, gone at the end whatever happens."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_build.errors import ToolFailed, ToolTimeout
from apex_build.native.lines import Lines
from apex_build.native.output import explain
from apex_build.native.run import failure, start, stop, tail, unwinding_signals, where
from apex_build.native.toolset import Toolset

_LISTENING = re.compile(r"listening on (http://127\.0\.0\.1:\d+)")
_LARGEST_ANSWER = 64 << 20
_LOG_READ = 4 << 20

# The server parses even a plain completion as a chat message, and answers 500 when a (small, or badly quantized) model wrote
# bytes that are not UTF-8. A parser that matches the empty string prevents it; `content` stays as it is. See common/peg-parser.cpp.
_NO_PARSER = json.dumps({"parsers": [{"type": "epsilon"}], "rules": {}, "root": 0})

# Never through a proxy: the address is this machine's own.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Server:
    """A running llama-server that has loaded its model."""

    address: str
    process: subprocess.Popen[bytes]
    output: Path  # what it prints
    log: Path | None  # the same, where it outlives the server

    def completion(
        self, prompt: str, *, n_predict: int, temperature: float = 0.0, timeout: float = 600.0, **options: Any
    ) -> dict[str, Any]:
        """POST /completion. The answer has `content` and `timings`, with `draft_n` and `draft_n_accepted` where drafts were made.

        `options` are further fields of the request (seed, cache_prompt, stop, ...). Raises ToolFailed, ToolKilled, ToolTimeout.
        """
        body = {"prompt": prompt, "n_predict": n_predict, "temperature": temperature, "chat_parser": _NO_PARSER, **options}
        return self.post("/completion", body, timeout=timeout)

    def post(self, path: str, body: dict[str, Any], *, timeout: float = 600.0) -> dict[str, Any]:
        """One request with a JSON body, answered by a JSON object."""
        request = urllib.request.Request(  # noqa: S310  our own http address
            self.address + path, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        try:
            with _OPENER.open(request, timeout=timeout) as answer:
                text = answer.read(_LARGEST_ANSWER)
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode(errors="replace")
            raise ToolFailed(f"llama-server answered {path} with {error.code}: {said}{where(self.log)}") from None
        except TimeoutError:
            raise ToolTimeout(f"llama-server did not answer {path} within {timeout:.0f} s{where(self.log)}") from None
        except OSError as error:  # URLError is one; the connection broke
            raise self._broken(f"llama-server did not answer {path}: {getattr(error, 'reason', error)}") from None
        try:
            value = json.loads(text)
        except ValueError:
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
    toolset: Toolset, model: Path, *, arguments: Sequence[str] = (), log: Path | None = None, ready_within: float = 600.0
) -> Iterator[Server]:
    """Start llama-server on `model`, wait until it answers, and end it (its whole process group) when the block ends in any way.

    `arguments`: such as ("--spec-type", "draft-mtp", "--spec-draft-n-max", "2", "-np", "1"). `log` keeps what it prints.
    Raises ToolTimeout where it is not ready within `ready_within` seconds, ToolFailed or ToolKilled where it ends instead.
    """
    with tempfile.TemporaryDirectory(prefix="apex-server-") as scratch, unwinding_signals():
        path = log or Path(scratch) / "llama-server.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [str(toolset.tool("llama-server")), "--model", str(model), "--host", "127.0.0.1", "--port", "0", *arguments]
        with path.open("wb") as output:  # a file, not a pipe: nobody has to read it for the server to go on
            process = start(command, output=output)
        try:
            yield Server(_wait_ready(process, path, log, ready_within), process, path, log)
        finally:
            stop(process)


def _wait_ready(process: subprocess.Popen[bytes], output: Path, log: Path | None, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    address = None
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise failure("llama-server", process.returncode, _lines(output), log, explain)  # a code of 0 too: it was to stay
        if address is None and (found := _LISTENING.findall("\n".join(_lines(output)))):
            address = str(found[-1])
        if address is not None and _healthy(address):
            return address
        time.sleep(0.05)
    raise ToolTimeout(
        f"llama-server was not ready within {seconds:.1f} s{tail(_lines(output))}{where(log)}",
        hint="a larger model needs longer to load: allow it more time, or use a smaller context",
    )


def _healthy(address: str) -> bool:
    try:
        with _OPENER.open(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:  # 503 while it loads, refused before
        return False


def _lines(log: Path) -> list[str]:
    lines: list[str] = []
    with log.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - _LOG_READ))
        reader = Lines(lines.append)
        reader.feed(file.read())
        reader.close()
    return lines
