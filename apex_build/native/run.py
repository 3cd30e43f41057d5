"""Run a native tool: stream its output, log it, and never leave a child process behind."""

from __future__ import annotations

import errno
import logging
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from apex_build.errors import OutputUnwritable, Terminated, ToolFailed, ToolKilled, ToolTimeout
from apex_build.native.lines import Lines
from apex_build.native.memory import memory_guard
from apex_build.native.surroundings import bound, environment, is_tool
from apex_build.places import BUILD_HINT
from apex_build.printable import printable
from apex_build.storage.disk import writing
from apex_build.storage.scratch import scratch_folder
from apex_build.system import require_linux

_log = logging.getLogger("apex_build")
Explain = Callable[[Sequence[str]], "tuple[str, str | None] | None"]

_KEPT_LINES = 50_000  # enough for any real run; a runaway tool must not fill our memory
_SHOWN_LINES = 15
_GRACE = 5.0  # seconds between SIGINT, SIGTERM and SIGKILL
_DRAIN = 0.5  # seconds that a daemon holding the pipe may delay us after the tool has exited
_UNSTARTED = re.compile(r"setpriv: failed to execute .*: (.*)")
_UNSAID = re.compile(r"[\s=\-#*.]*")
_asked = threading.local()  # `stopped`: of the block of `stopping` that the thread is in


@dataclass(frozen=True)
class ToolRun:
    """A finished run. `lines`: the last 50,000 of stdout and stderr merged, without progress that `\\r` rewrote."""

    returncode: int
    lines: tuple[str, ...]
    seconds: float


def run_tool(
    arguments: Sequence[str | Path],
    *,
    log: Path | None = None,
    on_line: Callable[[str], None] | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str | None] | None = None,
    explain: Explain | None = None,
    timeout: float | None = None,
    check: bool = True,
    memory: int | None = None,
    on_death: str = "KILL",
    stopped: Callable[[], bool] | None = None,
) -> ToolRun:
    """Run a program to its end, in a new empty folder unless `cwd` is given: tools look for code in their current
    folder.

    `on_line` gets each line as soon as it is complete, and before that the unfinished line so far each time it has
    grown (progress such as `[12]5.3412,`). `env` is added to our own environment (see surroundings.py), None takes a
    name out. All output goes to `log` unchanged, under a line with the command. `explain` is given the lines of a
    failed run and may return (diagnosis, hint). `memory`: bytes that it may take, beside the files that it maps. A
    `Path` among the arguments is made absolute.

    Whatever ends this function early (Ctrl-C, SIGTERM, an error in `on_line`) also ends the tool and every process it
    started: SIGINT, then SIGTERM, then SIGKILL. The tool runs in its own session, so the terminal's Ctrl-C reaches only
    us. Where we are killed ourselves the kernel sends it the signal `on_death`. In a thread, which no Ctrl-C reaches,
    `stopped` (by default that of `stopping`) is called several times a second: if it returns true, the tool is stopped
    and Stopped raised.

    Raises ToolFailed (not startable; with `check` also a code other than 0), ToolKilled (with `check`: ended by a
    signal; more memory than it may have), ToolTimeout (`timeout` seconds are over); OutputUnwritable (the log).
    """
    command = [str(argument.absolute()) if isinstance(argument, Path) else argument for argument in arguments]
    name = Path(command[0]).name
    lines: deque[str] = deque(maxlen=_KEPT_LINES)
    began = time.monotonic()
    stopped = stopped or stopped_in_thread()
    with _log_file(log) as write, unwinding_signals(), _folder(cwd) as folder, ExitStack() as stack:
        write(f"$ {shlex.join(command)}\n".encode(errors="surrogateescape"))
        child = start(command, cwd=folder, env=env, on_death=on_death)
        guard = stack.enter_context(memory_guard(child.pid, memory))
        reader = Lines(lines.append, on_line)
        try:
            for block in _output_of(child, None if timeout is None else began + timeout, stopped):
                write(block)
                reader.feed(block)
            reader.close()
            code = child.wait()
        except _OutOfTime:
            raise ToolTimeout(
                f"{name} did not end within {timeout:.0f} s and was stopped{tail(lines)}{where(log)}",
                hint="try again on a machine with less load",
            ) from None
        finally:
            stop(child)
    if guard.exceeded:
        raise guard.error(name, log)
    if code in (126, 127) and (found := _UNSTARTED.match(lines[0] if lines else "")):
        raise _unstartable(command[0], found[1])
    if code and check:
        raise failure(name, code, lines, log, explain)
    return ToolRun(code, tuple(lines), time.monotonic() - began)


def start(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str | None] | None = None,
    output: IO[bytes] | None = None,
    on_death: str = "KILL",
) -> subprocess.Popen[bytes]:
    """Start a program in its own session, stdout and stderr in one pipe or the file `output`. End it with `stop`.

    `cwd` must contain only files that we put there.
    """
    require_linux(f"running {Path(command[0]).name}")
    _log.debug("$ %s", shlex.join(command))
    program = shutil.which(command[0])
    if program is None:
        there = Path(command[0]).exists()
        raise _unstartable(command[0], os.strerror(errno.EACCES if there else errno.ENOENT))
    if is_tool(Path(program)) and (found := next(cwd.glob("libggml-*"), None)):
        raise ToolFailed(f"{found}: {Path(program).name} would run this file's code", hint="give the file another name")
    try:
        return subprocess.Popen(
            [*bound(on_death), program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=output or subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=environment(Path(program), env),
            start_new_session=True,
        )
    except OSError as error:
        raise _unstartable(command[0], error.strerror or str(error)) from None


def _unstartable(program: str, why: str) -> ToolFailed:
    return ToolFailed(f"cannot start {program}: {why}", hint=f"{BUILD_HINT}, if it is one of the native tools")


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with scratch_folder("run") as folder:
        yield folder


def stop(child: subprocess.Popen[bytes]) -> None:
    """End a child started by `start`, and every process of its session, unless it has exited; close its pipe."""
    running = child.poll() is None
    # a shell's background job has SIGINT ignored, and so has its child
    polite = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    try:
        for number in polite:
            if child.poll() is None:
                _signal_group(child, number)
                _wait_draining(child, _GRACE)
    finally:  # also when a second Ctrl-C comes while we wait
        if running:
            for process in (*_session_members(child.pid), child.pid):
                if child.returncode is None or process != child.pid:
                    _kill(process)
            _reap(child)
        if child.stdout:
            child.stdout.close()


def _reap(child: subprocess.Popen[bytes]) -> None:
    """As child.wait(), which would wait forever for Popen's own lock if Ctrl-C came while poll() held it."""
    with suppress(ChildProcessError):
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    if child.poll() is None:
        child.returncode = -signal.SIGKILL  # where the interrupted poll() has reaped it and lost its status
        with suppress(ChildProcessError):
            child.returncode = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])


class Stopped(Exception):
    """A tool was ended because `stopped` asked for it."""


class _OutOfTime(Exception):
    """The deadline of a run passed."""


@contextmanager
def stopping(stopped: Callable[[], bool]) -> Iterator[None]:
    """Within the block, tools and servers that this thread runs are ended as soon as `stopped` says so."""
    before = stopped_in_thread()
    _asked.stopped = stopped
    try:
        yield
    finally:
        _asked.stopped = before


def stopped_in_thread() -> Callable[[], bool] | None:
    """What `stopping` gave this thread."""
    found: Callable[[], bool] | None = getattr(_asked, "stopped", None)
    return found


def _output_of(
    child: subprocess.Popen[bytes], deadline: float | None, stopped: Callable[[], bool] | None
) -> Iterator[bytes]:
    """Blocks of output as they come. Ends with the pipe, or soon after the child when a daemon it left keeps the pipe
    open.
    """
    assert child.stdout is not None
    pipe = child.stdout.fileno()
    poll = select.poll()
    poll.register(pipe, select.POLLIN | select.POLLHUP)
    ended: float | None = None
    while True:
        now = time.monotonic()
        if ended is None and child.poll() is not None:
            ended = now
        if poll.poll(100):
            block = os.read(pipe, 1 << 16)
            if not block:
                return
            yield block
        elif ended is not None and now - ended > _DRAIN:
            return
        if deadline is not None and now > deadline and ended is None:
            raise _OutOfTime
        if stopped is not None and ended is None and stopped():
            raise Stopped


def _wait_draining(child: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait for a child that is being stopped, and keep reading: it cannot exit while it blocks on a full pipe."""
    deadline = time.monotonic() + seconds
    poll = select.poll()
    if child.stdout:
        poll.register(child.stdout.fileno(), select.POLLIN)
    while child.poll() is None and time.monotonic() < deadline:
        if poll.poll(50) and child.stdout and not os.read(child.stdout.fileno(), 1 << 16):
            poll.unregister(child.stdout.fileno())
            break
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(child.pid, number)
    except (ProcessLookupError, PermissionError):  # just ended
        return


def _session_members(session: int) -> list[int]:
    """Processes of a session that we started (ninja gives each compiler its own process group, so the group is not
    enough).
    """
    members = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:  # state, ppid, pgrp, session: proc(5)
            members.append(int(entry.parent.name))
    return members


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


@contextmanager
def unwinding_signals() -> Iterator[None]:
    """While a child runs, SIGTERM and SIGHUP unwind us as Ctrl-C does, so that the child ends before we do."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def unwind(number: int, _frame: FrameType | None) -> None:
        raise Terminated(128 + number)

    ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, unwind)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _log_file(path: Path | None) -> Iterator[Callable[[bytes], object]]:
    if path is None:
        yield lambda _block: None
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("wb", buffering=0)
    except OSError as error:
        raise OutputUnwritable(f"cannot write the log {path}: {error.strerror or error}") from None

    def write(block: bytes) -> None:
        with writing(path):
            file.write(block)

    with file:
        yield write


def failure(
    name: str, code: int, lines: Sequence[str], log: Path | None, explain: Explain | None
) -> ToolFailed | ToolKilled:
    """The error for a run that ended with `code` (negative: by that signal)."""
    diagnosis, hint = (explain(lines) if explain else None) or (None, None)
    said = f": {diagnosis}" if diagnosis else ""
    if code < 0:
        try:
            number = signal.Signals(-code).name
        except ValueError:
            number = f"signal {-code}"
        if number == "SIGKILL" and not diagnosis:
            said = ": the program does not do this itself; the system does, when memory runs out"
            hint = "look for 'Out of memory' in dmesg; use a smaller context or batch, or more swap"
        return ToolKilled(f"{name} was ended by {number}{said}{tail(lines)}{where(log)}", hint=hint)
    return ToolFailed(f"{name} ended with code {code}{said}{tail(lines)}{where(log)}", hint=hint)


def tail(lines: Sequence[str]) -> str:
    """The last meaningful lines, for the end of a message."""
    shown = [line for line in lines if not _UNSAID.fullmatch(line)][-_SHOWN_LINES:]
    return "".join(f"\n  | {printable(line)}" for line in shown)


def where(log: Path | None) -> str:
    return f"\n  all of its output: {log}" if log else ""
