"""NVIDIA's GPUs by the names that people know them under: architecture and memory.

Architectures: the compute capability that NVIDIA lists for each GPU, with `a` (what only that generation can do:
tensor-core instructions that llama.cpp uses) where there is such a variant. Those of Volta and older need CUDA 12: 13
has no compiler for them.
"""

from __future__ import annotations

from apex_build.plugin_api import GpuTarget, hookimpl

APEX_API = 3

_COMMON = ("all-common",)  # one GPU of each architecture
_THOR = ("thor", "agx-thor", "jetson-agx-thor")
_ORIN = ("orin", "agx-orin", "jetson-agx-orin")

# name, architecture, GiB of memory as the driver reports it, description, groups, other names (nvidia-smi's too)
_GPUS: tuple[tuple[str, str, float, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("dgx-spark", "121a-real", 120, "DGX Spark and other GB10: memory shared with the CPU", _COMMON, ("gb10", "spark")),
    ("jetson-thor", "110a-real", 128, "Jetson AGX Thor, memory shared with the CPU", (), _THOR),
    ("rtx5090", "120a-real", 32, "GeForce RTX 5090", _COMMON, ()),
    ("rtx5080", "120a-real", 16, "GeForce RTX 5080", (), ()),
    ("rtx5070ti", "120a-real", 16, "GeForce RTX 5070 Ti", (), ()),
    ("rtx5070", "120a-real", 12, "GeForce RTX 5070", (), ()),
    ("rtx5060ti", "120a-real", 16, "GeForce RTX 5060 Ti; another model has 8 GB", (), ()),
    ("rtx5060", "120a-real", 8, "GeForce RTX 5060", (), ("rtx5050",)),
    ("rtx-pro-6000", "120a-real", 96, "RTX PRO 6000 Blackwell, every edition", (), ("pro6000",)),
    ("rtx-pro-4500", "120a-real", 32, "RTX PRO 4500 Blackwell; also 4000, 5000", (), ("rtx-pro-5000", "rtx-pro-4000")),
    ("b300", "103a-real", 268, "B300, sold as 288 GB", _COMMON, ()),
    ("gb300", "103a-real", 277, "GB300, each of its GPUs", (), ("dgx-station",)),
    ("b200", "100a-real", 180, "B200", _COMMON, ()),
    ("gb200", "100a-real", 186, "GB200, each of its two GPUs", (), ()),
    ("h200", "90a-real", 141, "H200", (), ()),
    ("gh200", "90a-real", 96, "GH200; a later model has 144 GB", (), ("grace-hopper",)),
    ("h100", "90a-real", 80, "H100; the NVL model has 94 GB", _COMMON, ("h800", "h20")),
    ("rtx4090", "89-real", 24, "GeForce RTX 4090", _COMMON, ("rtx4090d",)),
    ("rtx4080", "89-real", 16, "GeForce RTX 4080", (), ()),
    ("rtx4070ti", "89-real", 12, "GeForce RTX 4070 Ti", (), ()),
    ("rtx4070", "89-real", 12, "GeForce RTX 4070", (), ()),
    ("rtx4060ti", "89-real", 16, "GeForce RTX 4060 Ti; another model has 8 GB", (), ()),
    ("rtx4060", "89-real", 8, "GeForce RTX 4060", (), ("rtx4050",)),
    ("rtx-6000-ada", "89-real", 48, "RTX 6000 Ada Generation", (), ("rtx-5000-ada", "rtx-4500-ada", "rtx-4000-ada")),
    ("l40s", "89-real", 48, "L40S; the L40 is the same to a compiler", (), ("l40",)),
    ("l4", "89-real", 24, "L4", (), ()),
    ("jetson-orin", "87-real", 64, "Jetson Orin, memory shared with the CPU", (), _ORIN),
    ("rtx3090", "86-real", 24, "GeForce RTX 3090", _COMMON, ("rtx3090ti",)),
    ("rtx3080", "86-real", 10, "GeForce RTX 3080; a later model has 12 GB", (), ("rtx3080ti",)),
    ("rtx3070", "86-real", 8, "GeForce RTX 3070", (), ("rtx3070ti",)),
    ("rtx3060", "86-real", 12, "GeForce RTX 3060", (), ("rtx3060ti", "rtx3050")),
    ("a6000", "86-real", 48, "RTX A6000; the A40 is the same to a compiler", (), ("rtx-a6000", "a40")),
    ("a10", "86-real", 24, "A10, and the A10G of rented machines", (), ("a10g", "rtx-a5000", "a5000", "a16", "a2")),
    ("a100", "80-real", 80, "A100; the first model has 40 GB", _COMMON, ("a800", "a30")),
    ("t4", "75-real", 16, "Tesla T4", _COMMON, ("t4g",)),
    ("rtx2080ti", "75-real", 11, "GeForce RTX 2080 Ti", (), ()),
    ("rtx2080", "75-real", 8, "GeForce RTX 2080", (), ("rtx2070", "rtx2060", "gtx1660", "gtx1660ti", "gtx1650")),
    ("titan-rtx", "75-real", 24, "TITAN RTX", (), ("quadro-rtx-6000", "quadro-rtx-8000")),
    ("v100", "70-real", 32, "Tesla V100; another model has 16 GB. CUDA 12 is the last for it", (), ("titan-v",)),
    ("p40", "61-real", 24, "Tesla P40. CUDA 12 is the last for it", (), ("gtx1080ti", "gtx1080", "gtx1070", "gtx1060")),
    ("p100", "60-real", 16, "Tesla P100. CUDA 12 is the last for it", (), ()),
)  # fmt: skip

_SHARED = frozenset({"dgx-spark", "jetson-thor", "jetson-orin"})  # their memory is the machine's

# the CUDA toolkit whose release notes name the architecture first; 90a came one version after 90
_FIRST_CUDA = {
    "60-real": "8.0",
    "61-real": "8.0",
    "70-real": "9.0",
    "75-real": "10.0",
    "80-real": "11.0",
    "86-real": "11.1",
    "87-real": "11.4",
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
        GpuTarget(
            name,
            architecture,
            memory,
            description,
            _FIRST_CUDA[architecture],
            groups,
            aliases,
            shares_memory=name in _SHARED,
        )
        for name, architecture, memory, description, groups, aliases in _GPUS
    ]
