"""Run child processes: small real ones, their output, and every way for them to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from children import alive
from waiting import until

from apex_build.errors import DiskTooSmall, OutputUnwritable, ToolFailed, ToolKilled, ToolTimeout
from apex_build.native.run import run_tool, start, stop


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def until_gone(pid: int) -> None:
    until(lambda: not alive(pid))


def number_in(path: Path) -> int:
    """The process id that a child writes there, in a line; 0 as long as it has not."""
    text = path.read_text() if path.is_file() else ""
    return int(text) if text.endswith("\n") else 0


def test_both_streams_in_one_and_a_log_of_all(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "run.log"
    done = run_tool(
        python("import sys; print('out'); print('err', file=sys.stderr); print('10%\\r20%\\rdone')"), log=log
    )
    assert done.returncode == 0
    assert done.lines == ("out", "err", "done")
    text = log.read_bytes()
    assert text.startswith(b"$ ")
    assert text.endswith(b"out\nerr\n10%\r20%\rdone\n")


def test_unfinished_progress_comes_before_the_child_ends(tmp_path: Path) -> None:
    seen, came = tmp_path / "seen", []
    code = (  # the second word is written only once the first has been seen
        "import pathlib, sys, time\nsys.stdout.write('[1]5.3,'); sys.stdout.flush()\n"
        f"while not pathlib.Path({str(seen)!r}).exists(): time.sleep(0.02)\nsys.stdout.write('[2]5.3,')"
    )

    def note(line: str) -> None:
        came.append(line)
        seen.touch()

    run_tool(python(code), on_line=note, timeout=60)
    assert came[0] == "[1]5.3," and came[-1] == "[1]5.3,[2]5.3,"


def test_a_failure_shows_the_last_words_our_diagnosis_and_the_log(tmp_path: Path) -> None:
    code = (
        "import sys\nfor i in range(40): print('line', i)\nprint('\\x1b[31merror: no such thing'); print('====='); "
        "sys.exit(3)"
    )
    with pytest.raises(ToolFailed) as caught:
        run_tool(
            python(code),
            log=tmp_path / "a.log",
            explain=lambda lines: (f"it is the thing after {lines[-3]}", "do the thing"),
        )
    message = caught.value.message
    assert "ended with code 3: it is the thing after line 39" in message
    assert "| error: no such thing" in message
    assert "\x1b" not in message
    assert "| line 39" in message
    assert "| line 1\n" not in message
    assert "====" not in message
    assert str(tmp_path / "a.log") in message
    assert caught.value.hint == "do the thing"


def test_the_code_of_a_failed_run_can_be_looked_at_instead() -> None:
    assert run_tool(python("raise SystemExit(7)"), check=False).returncode == 7


def test_a_child_that_a_signal_ended() -> None:
    with pytest.raises(ToolKilled) as caught:
        run_tool(python("import os, signal; print('half-way'); os.kill(os.getpid(), signal.SIGKILL)"))
    assert "SIGKILL" in caught.value.message
    assert "half-way" in caught.value.message
    assert "memory" in str(caught.value.hint)


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ToolFailed, match=r"cannot start .*nothing-here: No such file"):
        run_tool([tmp_path / "nothing-here"])


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputUnwritable):
        run_tool(python("print()"), log=tmp_path / "file" / "a.log")


@pytest.mark.slow
def test_a_child_past_its_time_is_ended_with_its_own_children(tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    # the grandchild has a process group of its own, as a compiler under Ninja has; a shell starts at once, on a busy
    # machine too
    code = f"set -m; echo began; sleep 3600 & echo $! > {marker}; sleep 3600"
    for seconds in (2, 20, 100):  # time to begin, on a busy machine too
        with pytest.raises(ToolTimeout, match=rf"did not end within {seconds} s") as caught:
            run_tool(["bash", "-c", code], timeout=seconds)
        if number_in(marker):
            break
    assert "began" in caught.value.message
    until_gone(number_in(marker))


def test_an_error_in_the_callback_ends_the_child(tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    code = f"import os, time; open({str(marker)!r}, 'w').write(str(os.getpid()) + '\\n'); print('x'); time.sleep(3600)"

    def fail(_line: str) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_tool(python(code), on_line=fail)
    until_gone(number_in(marker))


STUBBORN = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN);"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("kind", ["plain", "stubborn", "flood"])
def test_ctrl_c_and_sigterm_end_the_child_too(tmp_path: Path, number: signal.Signals, code: int, kind: str) -> None:
    marker = tmp_path / "pid"
    body = f"open({str(marker)!r}, 'w').write(str(os.getpid()) + '\\n');"
    child = {
        "plain": f"import os, time; {body} time.sleep(600)",
        "stubborn": f"import os, time; {STUBBORN} {body} time.sleep(600)",
        "flood": f"import os; {body}\nwhile True: print('x' * 1000)",
    }[kind]
    ours = (
        "import sys, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from apex_build.native import run\nrun._GRACE = 0.5\n"
        "try: run.run_tool([sys.executable, '-u', '-c', sys.argv[1]])\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    parent = subprocess.Popen([sys.executable, "-c", ours, child])
    pid = until(lambda: number_in(marker), parent)
    parent.send_signal(number)
    assert parent.wait(60) == code
    until_gone(pid)


def test_ctrl_c_in_the_midst_of_a_poll_does_not_hold_us_up(tmp_path: Path) -> None:
    """It leaves Popen's own lock held, and nobody will release it."""
    child = start(["sleep", "600"], cwd=tmp_path)
    lock = child._waitpid_lock  # type: ignore[attr-defined]
    assert lock.acquire(False)
    stop(child)
    assert child.returncode == -signal.SIGINT and not Path(f"/proc/{child.pid}").exists()


def test_ctrl_c_after_a_poll_has_reaped_the_child_does_not_hold_us_up(tmp_path: Path) -> None:
    """As above, and the status is lost too."""
    child = start(["true"], cwd=tmp_path)
    assert child._waitpid_lock.acquire(False)  # type: ignore[attr-defined]
    os.waitpid(child.pid, 0)
    stop(child)
    assert child.returncode == -signal.SIGKILL


def test_a_daemon_that_keeps_the_pipe_does_not_hold_us_up() -> None:
    daemon = (
        "import os, time\npid = os.fork()\nif not pid:\n    os.setsid()\n    time.sleep(3600)\n    "
        "os._exit(0)\nprint(pid)"
    )
    (line,) = run_tool(python(daemon)).lines
    assert alive(int(line)), "it held us up until it ended"
    os.kill(int(line), signal.SIGKILL)


def test_the_environment_is_added_to_and_taken_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APEX_TEST_GONE", "1")
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "32")  # would change what a tool computes, unseen by any manifest
    code = (
        "import os; print(os.environ.get('APEX_TEST_GONE'), os.environ.get('APEX_TEST_NEW'), "
        "os.environ.get('LLAMA_ARG_CTX_SIZE'))"
    )
    assert run_tool(python(code), env={"APEX_TEST_GONE": None, "APEX_TEST_NEW": "2"}).lines == ("None 2 None",)
    assert os.environ["LLAMA_ARG_CTX_SIZE"] == "32"


def test_a_log_for_which_there_is_no_room_is_named() -> None:
    with pytest.raises(DiskTooSmall, match=r"^/dev/full: the disk is full"):
        run_tool(python("print()"), log=Path("/dev/full"))
