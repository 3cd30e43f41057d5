"""llama-server, really started on the testbed: drafts are counted, and nothing is left behind."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from apex_build.errors import ToolFailed, ToolKilled, ToolTimeout
from apex_build.native.server import Server, serve
from apex_build.native.toolset import Toolset

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
        answer = server.completion("def read(path):\n", n_predict=16, seed=1)
        assert answer["tokens_predicted"] == 16
        assert answer["timings"]["draft_n"] >= answer["timings"]["draft_n_accepted"] >= 0
        assert answer["timings"]["draft_n"] > 0
        with pytest.raises(ToolFailed, match="answered /completion with 400"):
            server.post("/completion", {"prompt": [{"no": 1}]})
        assert not port_is_free(server)
    assert server.process.poll() is not None
    assert port_is_free(server)
    assert "listening" in log.read_text(encoding="utf-8", errors="replace")


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


def test_a_damaged_model(tools: Toolset, testbed: Path, tmp_path: Path) -> None:
    model = tmp_path / "cut.gguf"
    with testbed.open("rb") as file:
        model.write_bytes(file.read(2_000_000))
    with pytest.raises(ToolFailed, match="cut short or damaged"), serve(tools, model, arguments=ARGUMENTS):
        pass


def test_not_ready_in_time(tools: Toolset, testbed: Path) -> None:
    with (
        pytest.raises(ToolTimeout, match=r"not ready within 0\.0 s"),
        serve(tools, testbed, arguments=ARGUMENTS, ready_within=0.01),
    ):
        pass


def test_sigterm_takes_the_server_down(tools: Toolset, testbed: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom apex_build.native.server import serve\n"
        "from apex_build.native.toolset import find_toolset\n"
        "with serve(find_toolset(Path(sys.argv[1])), Path(sys.argv[2]), arguments=sys.argv[3:]) as server:\n"
        "    print(server.process.pid, flush=True)\n    time.sleep(600)"
    )
    arguments = [sys.executable, "-c", code, str(tools.root), str(testbed), *ARGUMENTS]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        parent.terminate()
        assert parent.wait(30) == 143
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
