"""Real tools behind a gate: a test lets as many calls through as it wants, and acts while the next one waits there.

So a run is stopped at a place in its work, not at a moment, on fast and slow machines alike.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from waiting import until

from apex_build.errors import ApexError
from apex_build.gguf_model.imatrix import read_imatrix
from apex_build.native.toolset import Toolset

# The shell becomes the tool: it has the same process id and name, and ends as a tool does on every signal.
_SCRIPT = """#!/bin/sh
case " $* " in
*' {having} '*)
    echo $$ >> '{root}/came'
    read -r pass < '{root}/gate' || exit 75
    echo "$$ $*" >> '{root}/passed';;
esac
exec '{tool}' "$@"
"""


@dataclass(frozen=True)
class Gate:
    """`root`: what APEX_TOOLS names."""

    root: Path
    permits: int

    def let(self, calls: int) -> None:
        """That many more calls may pass, those that come later too."""
        os.write(self.permits, b"\n" * calls)

    def open(self) -> None:
        self.let(1000)

    def waiting(self) -> list[int]:
        """The processes that wait at the gate, in the order in which they came."""
        passed = {line.split(" ")[0] for line in self._lines("passed")}
        return [int(pid) for pid in self._lines("came") if pid not in passed and self._is_there(pid)]

    def next(self, child: subprocess.Popen[str], *, after: int, waiting: int = 1) -> list[int]:
        """Those that wait, as soon as so many calls have passed and so many more have come."""

        def found() -> list[int]:
            pids = self.waiting()
            return pids if len(self.passed()) == after and len(pids) == waiting else []

        return until(found, child)

    def passed(self) -> list[str]:
        """The arguments of the calls that passed."""
        return [line.partition(" ")[2] for line in self._lines("passed")]

    def _is_there(self, pid: str) -> bool:
        """Whether it is still the process that came, and has not ended."""
        with suppress(OSError):
            return os.fsencode(self.root) in Path(f"/proc/{pid}/cmdline").read_bytes()
        return False

    def _lines(self, name: str) -> list[str]:
        path = self.root / name
        return path.read_text().splitlines() if path.exists() else []


@contextmanager
def gated(tools: Toolset, root: Path, name: str, having: str) -> Iterator[Gate]:
    """The same build, in which calls of this tool with this word among their arguments wait.

    Those that still wait at the end of the block fail.
    """
    (root / "bin").mkdir(parents=True)
    for path in tools.bin.iterdir():
        if path.name != name:
            (root / "bin" / path.name).symlink_to(path)
    script = root / "bin" / name
    script.write_text(_SCRIPT.format(tool=tools.tool(name), root=root, having=having))
    script.chmod(0o755)
    if tools.manifest:
        files = {**tools.manifest["files"]}
        files[f"bin/{name}"] = {**files[f"bin/{name}"], "size": script.stat().st_size}
        (root / "manifest.json").write_text(json.dumps({**tools.manifest, "files": files}))
    os.mkfifo(root / "gate")
    permits = os.open(root / "gate", os.O_RDWR)  # held open: a reader waits for a line, and a line for a reader
    try:
        yield Gate(root, permits)
    finally:
        os.close(permits)


def make_endless(tool: int, first: int) -> None:
    """Give a llama-perplexity that waits at the gate more probes than it can ever score, after the first ones."""
    words = Path(f"/proc/{tool}/cmdline").read_bytes().split(b"\0")
    path = Path(os.fsdecode(words[words.index(b"--kl-divergence-probes") + 1]))
    probes = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*probes[:first], *(f"more-{number}\n" for number in range(100_000)), *probes[first:]]))


@contextmanager
def held_at_snapshot(work: Path, chunks: int = 20) -> Iterator[Path]:
    """A llama-imatrix that waits at the gate will wait again where it would write its snapshot at so many chunks: that
    file is a pipe without a reader. Yields the one before it, 10 chunks earlier.
    """
    pipe = work / f"imatrix.gguf.at_{chunks}"
    os.mkfifo(pipe)
    try:
        yield work / f"imatrix.gguf.at_{chunks - 10}"
    finally:
        pipe.unlink(missing_ok=True)


def is_whole(imatrix: Path) -> bool:
    """Whether the tool has written all of it."""
    try:
        return imatrix.exists() and bool(read_imatrix(imatrix).entries)
    except ApexError:
        return False


def started(gate: Gate, command: Sequence[object], cwd: Path | None = None) -> subprocess.Popen[str]:
    """`apex` with these tools, in a session of its own, as in a terminal of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "apex_build", *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "APEX_TOOLS": str(gate.root)}, cwd=cwd,
    )  # fmt: skip


def ended_at_gate(gate: Gate, command: Sequence[object], how: signal.Signals) -> str:
    """Send `apex` this signal as soon as its tool waits at the gate; what it said. It must end at once, and the tool
    with it.
    """
    with started(gate, command) as child:
        until(gate.waiting, child)
        child.send_signal(how)
        _, said = child.communicate(timeout=60)
    ends = {signal.SIGINT: 130, signal.SIGTERM: 143}
    assert child.returncode == ends.get(how, -how) and "Traceback" not in said, (child.returncode, said)
    until(lambda: not gate.waiting())
    return said
