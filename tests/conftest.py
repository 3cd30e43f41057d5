"""What all tests share: the tools that the project built, and the small trained model. Nothing is mocked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from apex_build.native.toolset import Toolset

TESTBED = Path(__file__).parent / "testbed"


@pytest.fixture(scope="session")
def testbed() -> Path:
    """A trained Qwen3.5-MoE of 15 million parameters with its MTP head, F16: 6 trunk layers, 8 experts, head in block 6."""
    return TESTBED / "testbed-f16.gguf"


@pytest.fixture(scope="session")
def heldout() -> Path:
    """Folder of text that the testbed was not trained on: chat.txt, code.txt, reasoning.txt, tool-calling.txt, prompts.jsonl."""
    return TESTBED / "heldout"


@pytest.fixture(scope="session")
def tools() -> Toolset:
    """The patched tools of the default pin, built if they are not in the cache (APEX_TOOLS names others)."""
    if os.environ.get("APEX_TOOLS"):
        from apex_build.native.toolset import find_toolset

        return find_toolset()
    from apex_build.source.fetch import ensure_source
    from apex_build.source.pins import load_pin
    from apex_build.toolchain.build import build_cpu

    pin = load_pin()
    return build_cpu(ensure_source(pin), pin)


@pytest.fixture(scope="session")
def stock_imatrix(tools: Toolset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama-imatrix of the same tree without our patches."""
    raise NotImplementedError


@pytest.fixture(scope="session")
def calibrated(tools: Toolset, testbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imatrix of the testbed with its head, over 24 chunks of the default set."""
    out = tmp_path_factory.mktemp("calibrated") / "testbed.imatrix.gguf"
    run_apex("calibrate", testbed, "-o", out, "--chunks", 24)
    return out


@pytest.fixture(scope="session")
def headless_imatrix(tools: Toolset, testbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imatrix as the stock tool makes it: nothing for the head."""
    out = tmp_path_factory.mktemp("headless") / "trunk.imatrix.gguf"
    run_apex("calibrate", testbed, "-o", out, "--chunks", 24, "--no-mtp")
    return out


def run_apex(*arguments: object, code: int = 0, **options: object) -> subprocess.CompletedProcess[str]:
    """`apex` as a process of its own. A traceback is never an answer."""
    command = [sys.executable, "-m", "apex_build", *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=900, **options)  # type: ignore[call-overload]
    assert "Traceback" not in ran.stderr, ran.stderr
    assert ran.returncode == code, f"code {ran.returncode}, expected {code}\n{ran.stdout[-2000:]}\n{ran.stderr[-3000:]}"
    return ran


# The shipped model has six trunk layers: with these, edge, near and middle all occur.
SMALL = ("--set", "edge=1", "--set", "near=1", "--set", "attention_edge=1")
