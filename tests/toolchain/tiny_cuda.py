"""A tiny CMake project with a CUDA backend instead of llama.cpp, and complete and incomplete toolkits."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from apex_build.hookspecs import GpuTarget
from apex_build.toolchain.backends import Backend
from apex_build.toolchain.build.run import BuildPlan, plan_build
from apex_build.toolchain.cuda.plan import plan_cuda
from apex_build.toolchain.cuda.toolkit import CudaToolkit
from apex_build.toolchain.machine.compilers import find_compiler

SPARK = GpuTarget("dgx-spark", "121a-real", 120, "", "12.9")
H100 = GpuTarget("h100", "90a-real", 80, "", "12.0")

CMAKE_LISTS = """
cmake_minimum_required(VERSION 3.18)
project(tiny C CXX)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
find_package(CUDAToolkit REQUIRED)
enable_language(CUDA)
add_library(ggml-cuda SHARED scale.cu pool.cu)
target_link_libraries(ggml-cuda PRIVATE CUDA::cudart CUDA::cublas CUDA::cuda_driver)
add_executable(tool tool.cpp)
add_dependencies(tool ggml-cuda)
target_link_libraries(tool ${CMAKE_DL_LIBS})
"""
FILES = {
    "CMakeLists.txt": CMAKE_LISTS,
    "scale.cu": """
#include <cublas_v2.h>
__global__ void scale(float * x) { x[threadIdx.x] *= 2; }
extern "C" int handles() { cublasHandle_t handle; return cublasCreate(&handle) == CUBLAS_STATUS_SUCCESS; }
void call(float * x) { scale<<<1, 32>>>(x); }
""",
    "pool.cu": """
#include <cuda.h>
__global__ void fill(int * x) { *x = 1; }
extern "C" int reserve() { CUdeviceptr at; return cuMemAddressReserve(&at, 1 << 20, 0, 0, 0); }
void call(int * x) { fill<<<1, 1>>>(x); }
""",
    "tool.cpp": """
#include <cstdio>
#include <dlfcn.h>
int main() { std::puts(dlopen("libggml-cuda.so", RTLD_NOW) ? "with a GPU's driver" : dlerror()); }
""",
}


def make_cuda_source(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in {**FILES, **{name.replace("_", ".", 1): text for name, text in files.items()}}.items():
        (folder / name).write_text(text)
    for arguments in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "tiny"],
    ):
        subprocess.run(["git", "-C", str(folder), *arguments], check=True)
    return folder


NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release {short}, V{version}" ;;
  *--list-gpu-code*) for code in {codes}; do echo "sm_$code"; done ;;
  *) echo "#$ TOP=$(dirname "$0")/.." ;;
esac
"""
LIMITS = """
#if __GNUC__ > {gcc}
#error -- unsupported GNU version! gcc versions later than {gcc} are not supported! ...
#endif
#if (__clang_major__ >= 21)
#error -- unsupported clang version! clang version must be less than 21 and greater than 3.2 . ...
#endif
"""


def fake_toolkit(
    root: Path, *, version: str = "13.0.88", codes: str = "80 90 120 121", gcc: int = 15, without: str = " "
) -> Path:
    """A toolkit's version files, without a compiler. Files whose paths contain `without` are left out."""
    short = version.rpartition(".")[0]
    major, minor = short.split(".")
    files = {
        "bin/nvcc": NVCC.format(version=version, short=short, codes=codes),
        "include/crt/host_config.h": LIMITS.format(gcc=gcc),
        "include/cuda_runtime.h": "",
        "include/cuda_runtime_api.h": f"#define CUDART_VERSION  {major}0{minor}0\n",
        "include/cccl/cub/cub.cuh": "",
        "include/cublas_v2.h": "",
        "nvvm/bin/cicc": "",
        "nvvm/libdevice/libdevice.10.bc": "",
        **{f"bin/{name}": "" for name in ("ptxas", "fatbinary", "cudafe++", "cuobjdump")},
        **{f"lib64/lib{name}.so": "" for name in ("cudart", "cublas", "cublasLt")},
    }
    for name, text in files.items():
        if without not in name:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
            (root / name).chmod(0o755)
    return root


def tiny_plan(source: Path, *targets: GpuTarget, ptx: bool = False) -> BuildPlan:
    cuda = plan_cuda(targets, find_compiler(), "pypi", ptx=ptx)
    options = {
        "CMAKE_CUDA_ARCHITECTURES": ";".join(cuda.architectures),
        "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
        "CMAKE_INSTALL_RPATH": "$ORIGIN",
    }
    return plan_build(source, Backend("cuda", options, ("tool",)), cuda=cuda)


def part_of(toolkit: CudaToolkit, root: Path, without: Iterable[str]) -> Path:
    """A copy of a toolkit, made of links, without files whose paths contain one of these words."""

    def left_out(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if any(word in f"{folder}/{name}"[len(str(toolkit.root)) :] for word in without)]

    shutil.copytree(
        toolkit.root, root, ignore=left_out, symlinks=True, copy_function=lambda a, b: Path(b).hardlink_to(a)
    )
    return root
