"""The tools of a CUDA build on a machine without a GPU, compared with the CPU build's. Runs only if such a build is
cached.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from apex_runs import SMALL, run_apex
from gguf import GGUFReader

from apex_build.gguf_model.imatrix import read_imatrix
from apex_build.native.run import run_tool
from apex_build.native.toolset import Toolset, open_build
from apex_build.storage.digests import sha256_file
from apex_build.toolchain.build.cache import all_builds

CHUNKS = 8


@pytest.fixture(scope="session")
def cuda_tools(tools: Toolset) -> Toolset:
    for build in all_builds():
        if build.manifest["backend"] == "cuda" and build.manifest["source"] == tools.manifest.get("source"):
            return open_build(build.root)
    pytest.skip("no CUDA build of this source is in the cache: make build GPU=dgx-spark makes one")


def test_calibration_of_trunk_and_head(cuda_tools: Toolset, tools: Toolset, testbed: Path, tmp_path: Path) -> None:
    """They use other CPU instructions: sums differ in the last digits, and a tied token may go to another expert."""
    found = []
    for toolset, name in ((tools, "cpu"), (cuda_tools, "cuda")):
        out = tmp_path / f"{name}.imatrix.gguf"
        run_apex("calibrate", testbed, "-o", out, "--chunks", CHUNKS, "--tools", toolset.root)
        found.append(read_imatrix(out))
    cpu, cuda = found
    assert cuda.head_tokens == cpu.head_tokens
    assert cuda.head_tokens
    assert list(cuda.entries) == list(cpu.entries)
    for name, entry in cpu.entries.items():
        other = cuda.entries[name]
        assert sum(other.counts) == sum(entry.counts), name
        np.testing.assert_allclose(other.counts, entry.counts, atol=2, err_msg=name)
        expected, values = entry.values().sum(axis=1), other.values().sum(axis=1)
        np.testing.assert_allclose(values, expected, rtol=2e-3 if len(entry.counts) == 1 else 2e-2, err_msg=name)


@pytest.mark.parametrize("base", ["Q4_K_M", "IQ2_XXS"])
def test_quantizing_is_the_same_bit_for_bit(
    cuda_tools: Toolset, tools: Toolset, testbed: Path, calibrated: Path, tmp_path: Path, base: str
) -> None:
    """Run llama-quantize directly: apex records in its files which tools made them."""
    digests = set()
    for toolset in (tools, cuda_tools):
        out = tmp_path / "out.gguf"
        run_tool([toolset.tool("llama-quantize"), "--imatrix", calibrated, testbed, out, base], timeout=600)
        digests.add(sha256_file(out))
    assert len(digests) == 1


def test_a_plan_is_carried_out_the_same(
    cuda_tools: Toolset, tools: Toolset, testbed: Path, calibrated: Path, tmp_path: Path
) -> None:
    files = []
    for toolset, name in ((tools, "cpu"), (cuda_tools, "cuda")):
        out = tmp_path / f"{name}.gguf"
        options = ("--policy", "i-nano", *SMALL, "--set", "draft_head=IQ2_XXS", "--imatrix", calibrated)
        run_apex("quantize", testbed, *options, "-o", out, "--tools", toolset.root)
        files.append(GGUFReader(out))
    cpu, cuda = files
    differing = [name for name in cpu.fields if cpu.fields[name].contents() != cuda.fields[name].contents()]
    assert differing == ["apex.tools"]
    for tensor, other in zip(cpu.tensors, cuda.tensors, strict=True):
        assert (tensor.name, tensor.tensor_type) == (other.name, other.tensor_type)
        assert np.array_equal(tensor.data, other.data), tensor.name


def test_nothing_of_the_folder_lies_elsewhere(cuda_tools: Toolset) -> None:
    """Everything except the driver is found beside the tools, through relative paths."""
    for path in sorted(cuda_tools.bin.iterdir()):
        if path.is_symlink() or path.name.startswith(("libcu", "libnv")):
            continue
        dynamic = run_tool(["readelf", "-d", path]).lines
        paths = [line.rpartition("[")[2].rstrip("]") for line in dynamic if "RUNPATH" in line or "RPATH" in line]
        assert set(paths) <= {"$ORIGIN"}, path.name
    linked = run_tool(["ldd", cuda_tools.library("ggml-cuda")]).lines
    missing = [line.split()[0] for line in linked if "not found" in line]
    assert set(missing) <= {"libcuda.so.1"}
    for name in ("libcudart", "libcublas", "libcublasLt", "libggml-base"):
        (line,) = (line for line in linked if line.strip().startswith(f"{name}.so"))
        assert str(cuda_tools.bin) in line
