"""Real CUDA builds with the toolkit from the package index: a tiny project, and three small files of llama.cpp's
backend.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_cuda import CMAKE_LISTS, H100, SPARK, make_cuda_source, part_of, tiny_plan

from apex_build.errors import BuildFailed, ToolkitUnusable
from apex_build.native.run import run_tool
from apex_build.progress import silent
from apex_build.source.fetch import ensure_source
from apex_build.source.pins import load_pin
from apex_build.toolchain.build import cache as build_cache
from apex_build.toolchain.build import cmake
from apex_build.toolchain.build.launcher import launcher
from apex_build.toolchain.build.run import build, plan_build
from apex_build.toolchain.cuda import toolkit as cuda_toolkit
from apex_build.toolchain.cuda.binary import device_code, make_driver_stub
from apex_build.toolchain.cuda.plan import backend_of, cmake_settings, plan_cuda
from apex_build.toolchain.cuda.toolkit import CudaToolkit, judge
from apex_build.toolchain.cuda.wheels import pinned_wheels
from apex_build.toolchain.machine.compilers import find_compiler

BUILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny_cuda import H100, SPARK, tiny_plan
from apex_build.toolchain.build.run import build
plan = tiny_plan(Path(sys.argv[2]), {"h100": H100, "dgx-spark": SPARK}[sys.argv[3]])
print(*build(plan).toolset.manifest["cuda"]["device_code"])
"""


def test_a_folder_that_runs_from_anywhere_without_a_driver(toolkit: CudaToolkit, cache: Path, tmp_path: Path) -> None:
    source = make_cuda_source(tmp_path / "source")
    built = build(tiny_plan(source, SPARK, H100, ptx=True), jobs=2)
    manifest = built.toolset.manifest
    assert manifest["cuda"]["device_code"] == {
        "compute_90": {"objects": 2, "kernels": None},
        "sm_121a": {"objects": 2, "kernels": 2},
        "sm_90a": {"objects": 2, "kernels": 2},
    }
    assert manifest["cuda"]["gpus"] == ["dgx-spark", "h100"]
    assert manifest["cuda"]["packages"]["nvidia-cublas"].keys() == {"version", "sha256"}
    runtime = {name for name, about in manifest["files"].items() if about.get("part") == "cuda-runtime"}
    assert runtime == {"bin/libcublas.so.13", "bin/libcublasLt.so.13", "bin/libcudart.so.13"}
    assert "licenses/nvidia-cublas/License.txt" in manifest["files"]
    assert build_cache.verify(built.toolset) == len(manifest["files"])
    again = build(tiny_plan(source, H100, SPARK, ptx=True))
    assert again.reused

    moved = tmp_path / "elsewhere"
    shutil.move(built.toolset.root, moved)
    dynamic = run_tool(["readelf", "-d", moved / "bin" / "libggml-cuda.so"]).lines
    assert [line.rpartition("[")[2].rstrip("]") for line in dynamic if "PATH" in line] == ["$ORIGIN"]
    assert "libcuda.so.1" in "\n".join(dynamic)
    (said,) = run_tool([moved / "bin" / "tool"]).lines
    assert said == "with a GPU's driver" or "libcuda.so.1: cannot open shared object file" in said
    # with something in the driver's place everything else is found beside the tool
    stub = make_driver_stub(toolkit, find_compiler(), tmp_path / "stub")
    (tmp_path / "stub" / "libcuda.so.1").symlink_to(stub)
    assert run_tool([moved / "bin" / "tool"], env={"LD_LIBRARY_PATH": str(tmp_path / "stub")}).lines == (
        "with a GPU's driver",
    )


def test_an_architecture_that_is_not_in_the_binary(toolkit: CudaToolkit, cache: Path, tmp_path: Path) -> None:
    lists = CMAKE_LISTS + "set_target_properties(ggml-cuda PROPERTIES CUDA_ARCHITECTURES 90a-real)\n"
    source = make_cuda_source(tmp_path / "source", CMakeLists_txt=lists)
    with pytest.raises(
        BuildFailed, match=r"libggml-cuda\.so was built, but has no code for sm_121a\. It has: sm_90a \(2\)"
    ):
        build(tiny_plan(source, SPARK, H100))
    assert [path.name for path in (cache / "builds").iterdir() if not path.name.startswith(".")] == []


def test_two_builds_for_different_gpus_at_once(toolkit: CudaToolkit, cache: Path, tmp_path: Path) -> None:
    source = make_cuda_source(tmp_path / "source")
    children = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD, str(Path(__file__).parents[1]), str(source), name],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
        for name in ("h100", "dgx-spark")
    ]
    said = [child.communicate(timeout=300)[0].strip() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert said == ["sm_90a", "sm_121a"]
    assert len(build_cache.all_builds()) == 2


def test_half_a_real_toolkit(
    toolkit: CudaToolkit, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = part_of(toolkit, tmp_path / "cuda", ("cublas",))
    assert judge(root).missing == ("cuBLAS headers", "cuBLAS", "cuBLASLt")
    monkeypatch.setattr(cuda_toolkit, "_PLACES", ())
    monkeypatch.setenv("CUDA_HOME", str(root))
    with pytest.raises(ToolkitUnusable, match="missing: cuBLAS headers, cuBLAS, cuBLASLt"):
        plan_cuda([SPARK], find_compiler(), "system")


def test_what_is_known_of_the_toolkit_before_it_is_there(toolkit: CudaToolkit) -> None:
    wheels = pinned_wheels()
    assert cuda_toolkit.host_limits(toolkit) == wheels.newest_host
    assert cuda_toolkit._gpu_codes(toolkit.part("nvcc")) is not None
    assert sorted(cuda_toolkit._gpu_codes(toolkit.part("nvcc")) or ()) == sorted(wheels.gpu_codes)
    size = sum(path.stat().st_size for path in toolkit.root.rglob("*") if path.is_file() and not path.is_symlink())
    assert 0.9 * wheels.unpacked < size <= wheels.unpacked


def test_three_files_of_the_real_backend(toolkit: CudaToolkit, cache: Path, tmp_path: Path) -> None:
    """Configured like a build for a GPU, and compiled as far as a test can."""
    pin, compiler = load_pin(), find_compiler()
    cuda = plan_cuda([SPARK], compiler, "pypi")
    plan = plan_build(ensure_source(pin), backend_of(cuda, compiler), pin, cuda=cuda)
    work = tmp_path / "work"
    work.mkdir()
    objects = [f"ggml/src/ggml-cuda/CMakeFiles/ggml-cuda.dir/{name}.cu.o" for name in ("scale", "clamp", "arange")]
    with launcher(cache, [plan.source, work]) as front:
        settings = cmake_settings(toolkit, compiler, work)
        cmake.configure(plan.source, work, plan.options, compiler, front, silent, cuda=settings)
        cmake.compile_targets(plan.source, work, objects, 2, front, silent)
    for name in objects:
        found = device_code(work / name, toolkit.part("cuobjdump"))
        assert list(found) == ["sm_121a"]
        assert found["sm_121a"].kernels
