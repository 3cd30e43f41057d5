"""CPUs with AMX: several sequences in a batch. Without the patch, these kernels read and write out of bounds."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from apex_build.native.toolset import Toolset
from apex_build.source.fetch import ensure_source
from apex_build.source.pins import load_pin

# What ggml's own CMake file sets for its variant `sapphirerapids`, without what these kernels do not use
FEATURES = [
    "fma",
    "f16c",
    "avx2",
    "bmi2",
    "avx512f",
    "avx512cd",
    "avx512vl",
    "avx512dq",
    "avx512bw",
    "avx512vbmi",
    "avx512vnni",
    "amx-tile",
    "amx-int8",
]
NEEDED = ("avx512_vnni", "avx512vl", "avx512bw")


def test_a_batch_of_matrices(tools: Toolset, tmp_path: Path) -> None:
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if not all(flag in flags for flag in NEEDED):
        pytest.skip(f"this CPU lacks one of {', '.join(NEEDED)}")
    tree, program = ensure_source(load_pin()), tmp_path / "amx-batches"
    libraries = [tools.library(name) for name in ("ggml", "ggml-cpu", "ggml-base")]
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", *(f"-m{feature}" for feature in FEATURES)]
    command += [f"-I{tree}/ggml/{folder}" for folder in ("include", "src", "src/ggml-cpu")]
    command += [str(Path(__file__).parent / "amx_batches.cpp"), f"{tree}/ggml/src/ggml-cpu/amx/mmq.cpp"]
    command += [*map(str, libraries), f"-Wl,-rpath,{libraries[0].parent}", "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    errors = dict(line.split() for line in ran.stdout.splitlines())
    assert float(errors["F16"]) < 1e-5
    assert float(errors["Q8_0"]) < 2e-2  # the activations are rounded to 8 bits
