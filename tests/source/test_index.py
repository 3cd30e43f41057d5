"""The index that pip is configured to use: what is read from pip, and how bad servers are handled."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
from source.tiny import Apex, World
from waiting import BOUND, until

from apex_build.errors import DownloadFailed, HashMismatch
from apex_build.fetching.pip_config import PipConfig, open_session, parse_pip_config, read_pip_config
from apex_build.places import cache_root
from apex_build.source.pins import DEFAULT_PIN, all_pins
from apex_build.source.sdist import download_sdist, read_archive
from apex_build.source.tree_digest import digest_of


def test_order_of_pips_settings() -> None:
    listing = """\
:env:.timeout='3'
download.cert='/download.pem'
global.cert='/global.pem'
global.extra-index-url='\\nfirst\\nsecond'
global.index-url='one'
global.no-index='false'
global.timeout='60'
install.proxy='proxy:3128'
global.trusted-host='a b:8080'
global.find-links=''
list.format='columns'
not a setting
"""
    assert parse_pip_config(listing) == PipConfig(
        index_url="one",
        extra_index_urls=("first", "second"),
        trusted_hosts=("a", "b:8080"),
        cert="/download.pem",
        proxy="proxy:3128",
        timeout=3.0,
    )


def test_pip_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = file:///srv/simple\n[download]\nretries = 2\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_TRUSTED_HOST", "inside.example")
    config = read_pip_config()
    assert config.index_url == "file:///srv/simple"
    assert config.retries == 2
    assert config.trusted_hosts == ("inside.example",)


def test_broken_pip_configuration(world: World, apex: Apex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip.conf").write_text("no section\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    said = apex("source", "fetch")
    assert said.code == DownloadFailed.exit_code
    assert "pip cannot read its own configuration" in said.err
    assert world.left_over() == []


def test_missing_certificate(world: World, apex: Apex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CERT", "/absent/ca.pem")
    said = apex("source", "fetch")
    assert said.code == DownloadFailed.exit_code
    assert "certificate /absent/ca.pem, which cannot be used" in said.err


def test_proxy_also_for_trusted_hosts() -> None:
    with open_session(PipConfig(proxy="proxy.example:3128", trusted_hosts=("inside.example",))) as session:
        for url in ("https://inside.example/simple/", "https://outside.example/simple/"):
            transport = session._transport_for_url(session.build_request("GET", url).url)
            assert "proxy" in type(transport._pool).__name__.lower()


class Server(ThreadingHTTPServer):
    """A simple index with one file. `mode` says how it misbehaves."""

    daemon_threads = True

    def __init__(self, name: str, content: bytes, mode: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.content, self.mode = name, content, mode
        self.asked: list[str] = []
        self.holding = threading.Event()

    @property
    def index(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/simple"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        mode, content = self.server.mode, self.server.content
        if mode == "drops of a header" or mode == f"drops of {'a file' if self.path.endswith('.tar.gz') else 'a page'}":
            self.drops(mode, content)
        elif not self.path.endswith(".tar.gz"):
            digest = "0" * 64 if mode == "other hash" else hashlib.sha256(content).hexdigest()
            page = f'<a href="../../files/{quote(self.server.name)}#sha256={digest}">{self.server.name}</a>'.encode()
            self.answer(200, page, "text/html")
        elif mode == "error":
            self.answer(503, b"", "text/plain")
        elif mode == "cut":
            self.answer(200, content[: len(content) // 2], "application/gzip", len(content))
        elif mode == "stall":
            self.answer(200, content[: len(content) // 2], "application/gzip", len(content), hold=True)
        elif mode == "cut once" and sum(path.endswith(".tar.gz") for path in self.server.asked) == 1:
            self.answer(200, content[: len(content) // 2], "application/gzip", len(content))
        elif mode == "moved" and not self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", f"/moved/{quote(self.server.name)}")
            self.end_headers()
        else:
            self.answer(200, content, "application/gzip")

    def drops(self, mode: str, content: bytes) -> None:
        """Sends a byte now and then, forever: no single read by the client takes long."""
        if mode != "drops of a header":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
        else:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        try:
            while True:
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.1)
        except OSError:
            return

    def answer(self, code: int, content: bytes, kind: str, length: int | None = None, hold: bool = False) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()
        if hold:
            self.server.holding.set()
            time.sleep(3600)

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def server(world: World, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Server]:
    serving = Server(world.sdist.name, world.sdist.read_bytes(), request.param)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", serving.index)
    yield serving
    serving.shutdown()
    serving.server_close()


@pytest.mark.parametrize("server", ["good", "moved", "cut once"], indirect=True)
def test_index(world: World, apex: Apex, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_RETRIES", "1")
    said = apex("source", "fetch")
    assert said.code == 0, said.err
    assert server.asked[0] == "/simple/tiny-llama/"
    assert world.left_over() == []


@pytest.mark.parametrize(
    ("server", "code", "words"),
    [
        ("error", DownloadFailed.exit_code, "the server answers 503"),
        ("cut", DownloadFailed.exit_code, "cut short after"),
        ("other hash", HashMismatch.exit_code, "is offered with sha256 0000"),
    ],
    indirect=["server"],
)
def test_bad_index(world: World, apex: Apex, server: Server, code: int, words: str) -> None:
    said = apex("source", "fetch")
    assert said.code == code
    assert words in said.err
    assert world.sdist.name in said.err
    assert "Traceback" not in said.err
    assert world.left_over() == []
    assert not world.tree.exists()


@pytest.mark.slow
@pytest.mark.parametrize("server", ["drops of a header", "drops of a page", "drops of a file"], indirect=True)
def test_a_server_that_answers_in_drops_is_given_up(
    world: World, apex: Apex, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_TIMEOUT", "0.5")
    monkeypatch.setenv("PIP_RETRIES", "2")
    said = apex("source", "fetch")
    assert said.code == DownloadFailed.exit_code
    assert "did not answer within 2 s" in said.err or "gave up: nothing received for 2 s" in said.err
    assert "Traceback" not in said.err
    assert world.left_over() == []


@pytest.mark.parametrize("server", ["good"], indirect=True)
def test_one_index_out_of_order_does_not_spoil_the_others(
    world: World, apex: Apex, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", server.index)
    assert apex("source", "fetch").code == 0


def test_no_index_answers(world: World, apex: Apex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://somebody:secret@127.0.0.1:9/simple")
    said = apex("source", "fetch")
    assert said.code == DownloadFailed.exit_code
    assert "no package index that pip is configured with offers" in said.err
    assert "refused" in said.err
    assert "secret" not in said.err
    assert world.left_over() == []


@pytest.mark.parametrize("server", ["stall"], indirect=True)
def test_interrupted_download(world: World, server: Server) -> None:
    command = [sys.executable, "-m", "apex_build", "source", "fetch", "--pin", str(world.toml)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.holding.wait(BOUND)
    until(lambda: world.left_over(), process)
    process.send_signal(signal.SIGINT)
    _out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert world.left_over() == []


@pytest.mark.network
def test_pinned_sdists_are_found_and_hold_the_pinned_trees() -> None:
    """With the index that this machine's pip is configured to use; downloads stay in the user's cache."""
    for pin in all_pins():
        if pin.name != DEFAULT_PIN and not (cache_root() / "downloads" / pin.sha256).is_dir():
            continue  # one large download is enough
        sdist = download_sdist(pin)
        assert sdist.stat().st_size == pin.size
        assert digest_of(read_archive(sdist, pin.folder, pin.commit)) == pin.tree_digest
