"""Output: when it cannot be printed, and what must not reach a terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from apex_runs import run_apex

from apex_build.cli.streams import escaped
from apex_build.errors import DiskTooSmall

NAME = "a\x1b]0;title\x07\u202e\x9bb.gguf"


def apex(
    *arguments: object, shell: Callable[[], None] | None = None, **streams: object
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "apex_build", *map(str, arguments)]
    return subprocess.run(command, check=False, preexec_fn=shell, timeout=120, **streams)  # type: ignore[call-overload,no-any-return]


@pytest.mark.slow
def test_nothing_to_write_to(testbed: Path) -> None:
    done = apex("inspect", testbed, shell=lambda: os.close(1), stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    done = apex("inspect", testbed, shell=lambda: os.close(2), stdout=subprocess.PIPE)
    assert done.returncode == 0 and b"draft head" in done.stdout
    done = apex("inspect", testbed / "nothing", shell=lambda: os.closerange(0, 3))
    assert done.returncode not in (0, 1, 120)


def test_full_streams(testbed: Path, tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = apex("inspect", testbed, stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == DiskTooSmall.exit_code
        assert done.stderr == b"error: standard output: No space left on device\n"
        done = apex("inspect", testbed, stderr=full, stdout=subprocess.PIPE)
        assert done.returncode == 0 and b"draft head" in done.stdout
        assert apex("inspect", tmp_path / "no", stderr=full).returncode == 40


def test_a_reader_that_has_had_enough(testbed: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = apex("inspect", testbed, "--json", "--tensors", stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.fixture
def odd(testbed: Path, tmp_path: Path) -> Path:
    (tmp_path / NAME).symlink_to(testbed)
    return tmp_path / NAME


@pytest.mark.slow
def test_names_cannot_steer_a_terminal(odd: Path) -> None:
    for more in ((), ("--json",)):
        said = run_apex("inspect", odd, *more).stdout
        assert not set("\x1b\x07\x9b\u202e") & set(said)
        assert "\\u202e" in said
    assert json.loads(run_apex("inspect", odd, "--json").stdout)["path"] == str(odd)


def test_what_is_harmless_stays() -> None:
    assert escaped("\tline\n\u00fc \U0001f642 \u200d") == "\tline\n\u00fc \U0001f642 \u200d"
    assert escaped("\x1b[2J\u2066\r") == "\\x1b[2J\\u2066\\r"
