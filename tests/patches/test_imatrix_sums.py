"""The sums that llama-imatrix collects: as accurate as the stock tool's, equal for any number of threads, finite."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf_edit import changed
from random_moe import Shape, random_moe

from apex_build.gguf_model.imatrix import Imatrix, read_imatrix
from apex_build.native.toolset import Toolset

Sums = dict[str, npt.NDArray[np.float64]]
SMALL = Shape(layers=4, hidden=128, experts=128, used=8, width=64, head_size=32, heads=4, state=32, groups=2, ranks=4)


def imatrix(tool: Path, model: Path, text: Path, out: Path, *arguments: object) -> Imatrix:
    command = [tool, "-m", model, "-f", text, "-o", out, "-t", 1, "--no-ppl", *arguments]
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace")
    assert ran.returncode == 0, ran.stderr[-3000:]
    return read_imatrix(out)


@pytest.fixture(scope="session")
def text(heldout: Path) -> Path:
    return heldout / "code.txt"


@pytest.fixture(scope="module")
def reference(tools: Toolset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that collects the same sums in double precision."""
    from apex_build.source.fetch import ensure_source
    from apex_build.source.pins import load_pin

    tree, program = ensure_source(load_pin()), tmp_path_factory.mktemp("reference") / "reference-sums"
    libraries = [tools.library(name) for name in ("llama", "ggml", "ggml-base")]
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", f"-I{tree}/include", f"-I{tree}/ggml/include"]
    command += ["-o", str(program), str(Path(__file__).parent / "reference_sums.cpp"), *map(str, libraries)]
    subprocess.run([*command, f"-Wl,-rpath,{libraries[0].parent}"], check=True, capture_output=True)
    return program


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: 4 layers of 128 experts, and the head."""
    return random_moe(tmp_path_factory.mktemp("small") / "small.gguf", SMALL)


def sums(program: Path, model: Path, text: Path, chunks: int, out: Path) -> Sums:
    subprocess.run([str(part) for part in (program, model, text, 512, chunks, out)], check=True)
    data, at, found = out.read_bytes(), 0, {}
    while at < len(data):
        end = data.index(b"\n", at)
        name, matrices, columns = data[at:end].decode().split()
        shape = int(matrices), int(columns)
        found[name] = np.frombuffer(data, "<f8", shape[0] * shape[1], end + 1).reshape(shape)
        at = end + 1 + found[name].nbytes
    return found


def worst(found: Imatrix, reference: Sums) -> float:
    """The largest relative error of a value whose expert saw any token."""
    assert {name for name in found.entries if name in reference} == set(reference)
    errors = []
    for name, right in reference.items():
        values = found.entries[name].values().astype(np.float64).reshape(right.shape)
        errors.append((np.abs(values - right) / np.where(right > 0, right, 1)).max())
    return float(max(errors))


@pytest.mark.parametrize("chunks", [1, 20])
@pytest.mark.parametrize("which", ["testbed", "small"])
def test_they_are_nearer_to_double_precision_than_the_stock_tools(
    which: str,
    chunks: int,
    request: pytest.FixtureRequest,
    reference: Path,
    stock_imatrix: Path,
    tools: Toolset,
    text: Path,
    tmp_path: Path,
) -> None:
    model = request.getfixturevalue(which)
    right = sums(reference, model, text, chunks, tmp_path / "right")
    stock = imatrix(stock_imatrix, model, text, tmp_path / "stock.gguf", "--chunks", chunks)
    found = imatrix(tools.tool("llama-imatrix"), model, text, tmp_path / "found.gguf", "--chunks", chunks)
    assert {name: entry.counts for name, entry in stock.entries.items()} == {
        n: e.counts for n, e in found.entries.items()
    }
    assert worst(found, right) <= min(2e-6, worst(stock, right))


@pytest.mark.parametrize("arguments", [[], ["-b", 2048, "-ub", 1024], ["-ub", 33]], ids=["", "long batch", "rests"])
def test_they_do_not_depend_on_the_threads(
    arguments: list[object], tools: Toolset, small: Path, text: Path, tmp_path: Path
) -> None:
    tool = tools.tool("llama-imatrix")
    one, three = (
        imatrix(tool, small, text, tmp_path / f"{n}.gguf", "--chunks", 4, "--mtp", *arguments, "-t", 1, "-tb", n)
        for n in (1, 3)
    )
    assert one.entries.keys() == three.entries.keys()
    for name, entry in one.entries.items():
        assert entry.counts == three.entries[name].counts, name
        assert np.array_equal(entry.values(), three.entries[name].values()), name


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused(
    value: float, tools: Toolset, testbed: Path, text: Path, tmp_path: Path
) -> None:
    def spoil(name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if name == "blk.2.post_attention_norm.weight":
            values[7] = value
        return values

    model = changed(testbed, tmp_path / "spoilt.gguf", spoil)
    assert model.read_bytes() != testbed.read_bytes()
    command = [tools.tool("llama-imatrix"), "-m", model, "-f", text, "-o", tmp_path / "out.gguf", "--chunks", 2]
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace")
    assert ran.returncode == 1
    assert "detected in blk.2.ffn_" in ran.stdout + ran.stderr
    assert not (tmp_path / "out.gguf").exists()
