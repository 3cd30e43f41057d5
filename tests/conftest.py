"""Shared fixtures: the tools built by the project, and the small trained model. Nothing is mocked.

A test that runs or loads built tools requests the fixture `tools`, a fixture based on it, or
`pytest.mark.usefixtures("tools")`. It then has the mark `tools`. All others find neither a build nor the user's cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from apex_runs import run_apex

from apex_build.native.toolset import Toolset

TESTBED = Path(__file__).parent / "testbed"

# Where other work shares the cores, OpenMP's threads would spin at each barrier and slow all of it down many times
# over.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# fixtures, and the mark of tests that use one
MARKS = {
    **{"tools": "tools", "stock_imatrix": "tools"},
    **{"real_toolkit": "network", "source_tree": "network"},
    **{"series": "slow", "make_later": "slow"},  # some dozens of git processes
}
NOWHERE = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    folder = tempfile.TemporaryDirectory(prefix="apex-build-tests-")
    config.add_cleanup(folder.cleanup)
    config.stash[NOWHERE] = Path(folder.name)


def pytest_itemcollected(item: pytest.Item) -> None:
    for fixture, mark in MARKS.items():
        if fixture in getattr(item, "fixturenames", ()):
            item.add_marker(mark)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Hide the built tools from tests that do not request them, and from fixtures that such a test uses first."""
    with pytest.MonkeyPatch.context() as patch:
        nowhere = item.config.stash[NOWHERE]
        if item.get_closest_marker("tools"):
            pass
        elif item.get_closest_marker("network"):  # downloads are kept in the user's cache
            patch.setenv("APEX_TOOLS", str(nowhere / "no-tools"))
        else:
            patch.delenv("APEX_TOOLS", raising=False)
            patch.delenv("APEX_PIN", raising=False)
            patch.setenv("APEX_CACHE_DIR", str(nowhere / "cache"))
        return (yield)


@pytest.fixture(scope="session")
def testbed() -> Path:
    """A trained Qwen3.5-MoE of 15 million parameters with its MTP head, F16: 6 trunk layers, 8 experts, head in block
    6.
    """
    return TESTBED / "testbed-f16.gguf"


@pytest.fixture(scope="session")
def heldout() -> Path:
    """The folder of texts that the testbed was not trained on: chat.txt, code.txt, reasoning.txt, tool-calling.txt,
    prompts.jsonl.
    """
    return TESTBED / "heldout"


@pytest.fixture(scope="session")
def source_tree() -> Path:
    """The source of the chosen pin (APEX_PIN), fetched if it is missing."""
    from apex_build.source.fetch import ensure_source
    from apex_build.source.pins import load_pin

    return ensure_source(load_pin())


@pytest.fixture(scope="session")
def tools() -> Toolset:
    """The patched tools of the chosen pin (APEX_PIN), built if they are not in the cache (APEX_TOOLS names others)."""
    if os.environ.get("APEX_TOOLS"):
        from apex_build.native.toolset import find_toolset

        return find_toolset()
    from apex_build.source.fetch import ensure_source
    from apex_build.source.pins import load_pin
    from apex_build.toolchain.build.run import build_cpu

    pin = load_pin()
    return build_cpu(ensure_source(pin), pin)


@pytest.fixture(scope="session")
def rows_choice(tools: Toolset) -> None:
    """For tests of --mtp-rows, which some pins' tools lack."""
    from apex_build.gguf_model.mtp_rows import rows_can_be_chosen

    if not rows_can_be_chosen(tools.tool("llama-perplexity")):
        pytest.skip("these tools take the hidden rows that their llama.cpp has for an architecture")


@pytest.fixture(scope="session")
def stock_imatrix(source_tree: Path) -> Path:
    """llama-imatrix from the same tree without our patches. The compiler cache has most of it; the cache of builds
    keeps it.
    """
    from apex_build.places import cache_root, chosen_pin_name
    from apex_build.source.tree import BASE
    from apex_build.storage.locks import locked
    from apex_build.toolchain.backends import Backend
    from apex_build.toolchain.build.run import build, plan_build

    stock = cache_root() / "tests" / f"stock-{chosen_pin_name()}"
    with locked(stock, wait=True, what="other tests that make the stock tool"):
        shutil.rmtree(stock, ignore_errors=True)
        subprocess.run(["git", "clone", "--quiet", "--no-checkout", str(source_tree), str(stock)], check=True)
        subprocess.run(["git", "-C", str(stock), "checkout", "--quiet", "--detach", BASE], check=True)
        built = build(plan_build(stock, Backend("cpu", targets=("llama-imatrix",))))
    return built.toolset.tool("llama-imatrix")


@pytest.fixture(scope="session")
def calibrated(tools: Toolset, testbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imatrix of the testbed with its head, from 24 chunks of the default set."""
    out = tmp_path_factory.mktemp("calibrated") / "testbed.imatrix.gguf"
    run_apex("calibrate", testbed, "-o", out, "--chunks", 24)
    return out


@pytest.fixture(scope="session")
def headless_imatrix(tools: Toolset, testbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imatrix like the stock tool's: no data for the head."""
    out = tmp_path_factory.mktemp("headless") / "trunk.imatrix.gguf"
    run_apex("calibrate", testbed, "-o", out, "--chunks", 24, "--no-mtp")
    return out
