"""A real llama-server on the testbed: drafts are counted, and nothing is left behind."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from children import alive, servers
from gates import gated
from waiting import BOUND, until

from apex_build.errors import EvaluationRefused, ToolFailed, ToolKilled, ToolTimeout
from apex_build.native.run import Stopped, run_tool, stopping
from apex_build.native.server import Draft, Server, drafts_printed, request, serve
from apex_build.native.toolset import Toolset, find_toolset

ARGUMENTS = ("--ctx-size", "512", "--threads", "1", "--parallel", "1", "--no-warmup")
DRAFTING = ("--spec-type", "draft-mtp", "--spec-draft-n-max", "2")


def port_is_free(server: Server) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", urlsplit(server.address).port or 0)) != 0


def test_drafts_are_counted_and_the_server_goes(
    tools: Toolset, testbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be asked for our own machine
    log = tmp_path / "log folder" / "server.log"
    with serve(tools, testbed, arguments=(*ARGUMENTS, *DRAFTING), log=log) as server:
        assert servers() == [server.process.pid]
        for _ in range(2):
            since = server.printed()
            answer = server.completion("def read(path):\n", n_predict=16, seed=1)
            assert answer["tokens_predicted"] == 16
            assert answer["timings"]["draft_n"] >= answer["timings"]["draft_n_accepted"] >= 0
            assert answer["timings"]["draft_n"] > 0
            drafts = server.drafts(answer, since)
            assert drafts and all(draft.accepted <= draft.drafted <= 2 for draft in drafts)
            assert sum(draft.drafted for draft in drafts) == answer["timings"]["draft_n"]
            assert sum(draft.accepted for draft in drafts) == answer["timings"]["draft_n_accepted"]
            # the first token comes from the prompt, and the last may be written without a draft
            assert 14 <= sum(draft.written for draft in drafts) <= 15
        with pytest.raises(ToolFailed, match="answered /completion with 400"):
            server.post("/completion", {"prompt": [{"no": 1}]})
        assert not port_is_free(server)
    assert server.process.poll() is not None
    assert port_is_free(server)
    assert "listening" in log.read_text(encoding="utf-8", errors="replace")


def test_drafts_of_a_model_whose_memory_cannot_go_back() -> None:
    """The server evaluates accepted tokens again and prints a line for that too: it is not a draft."""
    lines = (
        "0.05.414 I slot update_slots: id  0 | task 0 | accepted  2/ 3 draft tokens (restore checkpoint)",
        "0.05.415 I slot print_timing: id  0 | task 0 | draft acceptance = 0.62500 (   20 accepted /    32 generated)",
        "0.05.500 I slot update_slots: id  0 | task 0 | accepted  3/ 3 draft tokens",
        "0.05.600 I slot update_slots: id  0 | task 0 | accepted  3/ 3 draft tokens",
        "0.05.700 I slot update_slots: id  0 | task 0 | accepted  0/12 draft tokens",
    )
    drafts = drafts_printed(lines)
    assert drafts == (Draft(2, 3, 2), Draft(3, 3), Draft(0, 12))
    assert [draft.written for draft in drafts] == [4, 4, 1]
    assert drafts_printed(["nothing of the kind"]) == ()


def test_a_prompt_that_leaves_no_room(tools: Toolset, testbed: Path) -> None:
    """Counted like /completion does: a special token is one token."""
    with serve(tools, testbed, arguments=ARGUMENTS) as server:
        text = "<|im_start|>" * 400
        answer = server.completion(text, n_predict=1)
        assert answer["tokens_evaluated"] == 400
        server.check_room([("short", "x"), ("just fits", text)], 112)
        with pytest.raises(
            EvaluationRefused, match=r"long: the prompt has 400 tokens, and 113 are .* the context holds 512"
        ):
            server.check_room([("short", "x"), ("long", text)], 113)


def test_two_servers_side_by_side(tools: Toolset, testbed: Path) -> None:
    with pytest.raises(ZeroDivisionError), serve(tools, testbed, arguments=ARGUMENTS) as plain:
        with plain.beside(*DRAFTING) as drafting:
            assert sorted(servers()) == sorted([plain.process.pid, drafting.process.pid])
            assert "draft_n" in drafting.completion("def read(path):\n", n_predict=8)["timings"]
            assert "draft_n" not in plain.completion("def read(path):\n", n_predict=8)["timings"]
        assert servers() == [plain.process.pid] and port_is_free(drafting)
        with plain.beside(*DRAFTING) as again:
            raise ZeroDivisionError
    assert not servers() and port_is_free(plain) and port_is_free(again)


def test_a_server_that_stops_answering(tools: Toolset, testbed: Path) -> None:
    """It is asked to exit, and killed if it does not."""
    with (
        pytest.raises(ToolTimeout, match="did not answer /completion within 1 s"),
        serve(tools, testbed, arguments=ARGUMENTS) as server,
    ):
        server.process.send_signal(signal.SIGSTOP)
        server.completion("x", n_predict=1, timeout=1)
    assert server.process.returncode == -signal.SIGKILL
    assert port_is_free(server) and not servers()


def test_an_error_in_the_block_takes_the_server_down(tools: Toolset, testbed: Path) -> None:
    with pytest.raises(ZeroDivisionError), serve(tools, testbed, arguments=ARGUMENTS) as server:
        raise ZeroDivisionError
    assert server.process.poll() is not None
    assert port_is_free(server)


def test_a_server_that_dies_is_reported_as_killed(tools: Toolset, testbed: Path) -> None:
    with serve(tools, testbed, arguments=ARGUMENTS) as server:
        server.process.kill()
        with pytest.raises(ToolKilled, match="llama-server was ended by SIGKILL"):
            server.completion("x", n_predict=1)


def test_a_server_of_a_thread_ends_when_nobody_waits(tools: Toolset, testbed: Path) -> None:
    """As Ctrl-C elsewhere: whoever is answered gets an error. The thread's other tools end too."""
    asked, seen = threading.Event(), []

    def work() -> None:
        with stopping(asked.is_set):
            with pytest.raises(ToolKilled), serve(tools, testbed, arguments=ARGUMENTS) as server:
                threading.Timer(0.5, asked.set).start()
                while True:  # an answer ends with the context, which a quick machine fills in less
                    server.completion("x", n_predict=100_000, ignore_eos=True)
            with pytest.raises(Stopped):
                run_tool(["sleep", "60"])
            seen.append("both")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(BOUND)
    assert seen == ["both"] and not servers()


def test_a_damaged_model(tools: Toolset, testbed: Path, tmp_path: Path) -> None:
    model = tmp_path / "cut.gguf"
    with testbed.open("rb") as file:
        model.write_bytes(file.read(2_000_000))
    for _ in range(8):  # its log is written by a thread that it does not always wait for at its end, on a busy machine
        with pytest.raises(ToolFailed) as caught, serve(tools, model, arguments=ARGUMENTS):
            pass
        assert not servers()
        if "cut short or damaged" in caught.value.message:
            return
    raise AssertionError(caught.value.message)


def test_not_ready_in_time(tools: Toolset, testbed: Path, tmp_path: Path) -> None:
    with gated(tools, tmp_path / "gate", "llama-server", having="--no-warmup") as gate:
        with (
            pytest.raises(ToolTimeout, match=r"not ready within 0\.0 s"),
            serve(find_toolset(gate.root), testbed, arguments=ARGUMENTS, ready_within=0.01),
        ):
            pass
        assert not servers() and not gate.passed()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_signal_takes_the_server_down(tools: Toolset, testbed: Path, number: signal.Signals, code: int) -> None:
    program = (
        "import signal, sys, time\nfrom pathlib import Path\nfrom apex_build.native.server import serve\n"
        "from apex_build.native.toolset import find_toolset\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # tests in the background have it ignored
        "with serve(find_toolset(Path(sys.argv[1])), Path(sys.argv[2]), arguments=sys.argv[3:]) as server:\n"
        "    print(server.process.pid, flush=True)\n    time.sleep(3600)"
    )
    arguments = [sys.executable, "-c", program, str(tools.root), str(testbed), *ARGUMENTS]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        parent.send_signal(number)
        assert parent.wait(60) == code
    until(lambda: not alive(pid))


@pytest.mark.slow
@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"HTTP/1.1 200 OK\r\nX-Slow: "])
def test_an_answer_in_drops_ends_at_the_deadline(start: bytes) -> None:
    """The drip never ends: only the deadline stops it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(start)
                while True:
                    connection.sendall(b"x")
                    time.sleep(0.05)

        threading.Thread(target=drip, daemon=True).start()
        with pytest.raises(TimeoutError):
            request(f"http://127.0.0.1:{listening.getsockname()[1]}", "GET", "/health", None, 1.0)
