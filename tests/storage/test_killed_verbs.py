"""Kill the verbs at random moments: afterwards the old file or the new one exists, each with its own manifest."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from apex_runs import SMALL, run_apex

from apex_build.native.toolset import Toolset
from apex_build.storage.manifest import manifest_of
from apex_build.storage.outputs import MANIFEST, beside

KILLS = 6
MOST = 60  # tries for that many kills


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "apex_build", *map(str, words)]


def kill_at_random(words: list[str], seed: int, kills: int = KILLS) -> float:
    """Kill it that often, at moments of the time that it takes: tries that end by themselves first do not count.

    Returns how many seconds it takes.
    """
    chance, killed, tries = random.Random(seed), 0, 0
    began = time.monotonic()
    subprocess.run(words, check=True, capture_output=True)
    takes = time.monotonic() - began
    while killed < kills:
        tries += 1
        assert tries <= MOST, f"{' '.join(words)}: killed {killed} times in {MOST} tries, and it took {takes:.2f} s"
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        began = time.monotonic()
        try:
            child.wait(chance.uniform(0.05, 1.0) * takes)
            takes = min(takes, time.monotonic() - began)  # the first run was slowed down
        except subprocess.TimeoutExpired:
            child.kill()
            killed += child.wait() == -signal.SIGKILL
        if "-o" in words:
            check_state(words)
    return takes


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
    takes = kill_at_random(words, seed=1)
    subprocess.run(words, check=True, capture_output=True)
    new = out.read_bytes()
    assert new != old
    # what is replaced: the old one again, then killed in the middle
    for seed in (2, 3):
        run_apex("quantize", testbed, "--policy", "quality", *SMALL, "-o", out, "--force")
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(random.Random(seed).uniform(0.3, 1) * takes)
        child.kill()
        child.wait()
        check_state(words)
        assert out.read_bytes() in (old, new)
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
    kill_at_random([*words, "--force"], seed=4)
    subprocess.run([*words, "--force"], check=True, capture_output=True)
    assert out.read_bytes() == whole, "a run that was killed before does not change what comes out"
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, f"{out.name}.json", f"{out.name}.log"]


def test_build_from_the_cache(tools: Toolset) -> None:
    """A finished build is reused, whenever an earlier run was killed."""
    words = command("build", "--backend", "cpu")
    kill_at_random(words, seed=5)
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
    kill_at_random([*words, "--force"], seed=6, kills=3)
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert out.read_bytes() == whole and "already made from the same inputs" in done.stdout
