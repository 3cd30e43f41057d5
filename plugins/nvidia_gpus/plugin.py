"""NVIDIA's GPUs by the names that people know them under: architecture and memory.

Architectures: the compute capability that NVIDIA lists for each GPU, with `a` (what only that generation can do: tensor-core
instructions that llama.cpp uses) where there is such a variant. Volta and older are left out: CUDA 13 has no compiler for them.
"""

from __future__ import annotations

from apex_build.hookspecs import GpuTarget, hookimpl

_COMMON = ("all-common",)  # one GPU of each architecture

# name, architecture, GiB of memory as the driver reports it, what it is, groups
_GPUS: tuple[tuple[str, str, float, str, tuple[str, ...]], ...] = (
    ("dgx-spark", "121a-real", 128, "DGX Spark and its kin: GB10, memory shared with the CPU", _COMMON),
    ("jetson-thor", "110a-real", 128, "Jetson AGX Thor, memory shared with the CPU", ()),
    ("rtx5090", "120a-real", 32, "GeForce RTX 5090", _COMMON),
    ("rtx5080", "120a-real", 16, "GeForce RTX 5080", ()),
    ("rtx5070ti", "120a-real", 16, "GeForce RTX 5070 Ti", ()),
    ("rtx5070", "120a-real", 12, "GeForce RTX 5070", ()),
    ("rtx-pro-6000", "120a-real", 96, "RTX PRO 6000 Blackwell, every edition", ()),
    ("b300", "103a-real", 268, "B300, sold as 288 GB", _COMMON),
    ("b200", "100a-real", 180, "B200", _COMMON),
    ("gb200", "100a-real", 186, "GB200, each of its two GPUs", ()),
    ("h200", "90a-real", 141, "H200", ()),
    ("gh200", "90a-real", 96, "GH200; a later model has 144 GB", ()),
    ("h100", "90a-real", 80, "H100; the NVL model has 94 GB", _COMMON),
    ("rtx4090", "89-real", 24, "GeForce RTX 4090", _COMMON),
    ("rtx4080", "89-real", 16, "GeForce RTX 4080", ()),
    ("rtx-6000-ada", "89-real", 48, "RTX 6000 Ada Generation", ()),
    ("l40s", "89-real", 48, "L40S; the L40 is the same to a compiler", ()),
    ("l4", "89-real", 24, "L4", ()),
    ("rtx3090", "86-real", 24, "GeForce RTX 3090", _COMMON),
    ("rtx3080", "86-real", 10, "GeForce RTX 3080; a later model has 12 GB", ()),
    ("rtx3060", "86-real", 12, "GeForce RTX 3060", ()),
    ("a6000", "86-real", 48, "RTX A6000; the A40 is the same to a compiler", ()),
    ("a10", "86-real", 24, "A10, and the A10G of rented machines", ()),
    ("a100", "80-real", 80, "A100; the first model has 40 GB", _COMMON),
    ("t4", "75-real", 16, "Tesla T4", _COMMON),
    ("rtx2080ti", "75-real", 11, "GeForce RTX 2080 Ti", ()),
)

# the CUDA toolkit whose release notes name the architecture first; 90a came one version after 90
_FIRST_CUDA = {
    "75-real": "10.0",
    "80-real": "11.0",
    "86-real": "11.1",
    "89-real": "11.8",
    "90a-real": "12.0",
    "100a-real": "12.8",
    "103a-real": "12.9",
    "110a-real": "13.0",
    "120a-real": "12.8",
    "121a-real": "12.9",
}


@hookimpl
def apex_gpu_targets() -> list[GpuTarget]:
    return [
        GpuTarget(name, architecture, memory, description, _FIRST_CUDA[architecture], groups)
        for name, architecture, memory, description, groups in _GPUS
    ]
