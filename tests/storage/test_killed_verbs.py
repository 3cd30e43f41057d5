"""Kill the verbs at random moments: afterwards the old file or the new one exists, each with its own manifest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from apex_runs import SMALL, run_apex
from kills import kill_at_random, seconds_of

from apex_build.native.toolset import Toolset
from apex_build.storage.manifest import manifest_of
from apex_build.storage.outputs import MANIFEST, beside

KILLS = 6


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "apex_build", *map(str, words)]


def check_state(words: list[str]) -> None:
    """Raises AssertionError if a file exists that does not match its manifest."""
    out = Path(words[words.index("-o") + 1])
    found = manifest_of(out, beside(out, MANIFEST))
    assert out.exists() and found is not None and found.describes(out), f"{out}: a file without its own manifest"


def test_quantize(testbed: Path, tools: Toolset, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    run_apex("quantize", testbed, "--policy", "quality", *SMALL, "-o", out)
    old = out.read_bytes()
    words = command("quantize", testbed, "--policy", "compact", *SMALL, "--threads", 1, "-o", out, "--force")
    takes = seconds_of(words)
    kill_at_random(words, takes, 1, KILLS, lambda: check_state(words))
    subprocess.run(words, check=True, capture_output=True)
    new = out.read_bytes()
    assert new != old

    def old_again() -> None:
        check_state(words)
        assert out.read_bytes() in (old, new)
        run_apex("quantize", testbed, "--policy", "quality", *SMALL, "-o", out, "--force")

    kill_at_random(words, takes, 2, 3, old_again)
    subprocess.run(words, check=True, capture_output=True)
    assert out.read_bytes() == new and sorted(path.name for path in tmp_path.iterdir()) == [
        "x.gguf",
        "x.gguf.json",
        "x.gguf.log",
    ]


def test_calibrate(testbed: Path, tools: Toolset, tmp_path: Path) -> None:
    out = tmp_path / "x.imatrix.gguf"
    words = command("calibrate", testbed, "--chunks", 12, "--threads", 1, "--no-rows-check", "-o", out)
    subprocess.run(words, check=True, capture_output=True)
    whole = out.read_bytes()
    run_apex("calibrate", testbed, "--chunks", 6, "--threads", 1, "--no-rows-check", "-o", out, "--force")
    again = [*words, "--force"]
    kill_at_random(again, seconds_of(again), 4, KILLS, lambda: check_state(words))
    subprocess.run([*words, "--force"], check=True, capture_output=True)
    assert out.read_bytes() == whole, "a run that was killed before does not change what comes out"
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, f"{out.name}.json", f"{out.name}.log"]


def test_build_from_the_cache(tools: Toolset) -> None:
    """A finished build is reused, whenever an earlier run was killed."""
    words = command("build", "--backend", "cpu")
    kill_at_random(words, seconds_of(words), 5, KILLS)
    assert "already built" in subprocess.run(words, check=True, capture_output=True, text=True).stdout


def test_convert(tmp_path: Path) -> None:
    """Needs a Python with torch (APEX_CONVERT_PYTHON, or the environment that apex made)."""
    from checkpoints import make_checkpoint

    from apex_build.conversion.environment import choose, is_ready
    from apex_build.errors import EnvironmentUnusable

    try:
        python = choose(None)
    except EnvironmentUnusable as error:
        pytest.skip(error.message)
    if not is_ready(python):
        pytest.skip("no Python with torch")
    out = tmp_path / "out.gguf"
    folder = make_checkpoint(tmp_path / "hf")
    words = command("convert", folder, "--pre-tokenizer", "qwen2", "-o", out)
    subprocess.run(words, check=True, capture_output=True)
    whole = out.read_bytes()
    again = [*words, "--force"]
    kill_at_random(again, seconds_of(again), 6, 3, lambda: check_state(words))
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert out.read_bytes() == whole and "already made from the same inputs" in done.stdout
