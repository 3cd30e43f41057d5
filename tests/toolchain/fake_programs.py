"""Small stand-in programs for machines with or without a driver or a CUDA toolkit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, lines: Sequence[str], code: int = 0) -> None:
    """An nvidia-smi in PATH that prints these lines."""
    said = "\n".join(f"echo '{line}'" for line in lines)
    script(folder / "nvidia-smi", f"{said}\nexit {code}")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def without_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH with the compilers, but without nvidia-smi."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for path in Path(place).glob("*"):
            if path.name != "nvidia-smi" and not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)
    monkeypatch.setenv("PATH", str(folder))


def toolkit(root: Path, *, without: Sequence[str] = (), version: str = "13.0.88") -> Path:
    """A folder with empty files as parts of a CUDA toolkit, except some, and an nvcc that only prints its version."""
    release = version.rpartition(".")[0]
    script(
        root / "bin/nvcc",
        f'case "$*" in *--version*) echo "Cuda compilation tools, release {release}, V{version}";; *) exit 1;; esac',
    )
    for name in ("bin/ptxas", "bin/fatbinary", "bin/cudafe++", "bin/cuobjdump", "nvvm/bin/cicc"):
        script(root / name, "exit 1")
    texts = {
        "nvvm/libdevice/libdevice.10.bc": "",
        "include/crt/host_config.h": "#error -- unsupported GNU version! gcc versions later than 15 are not "
        "supported!\n",
        "include/cuda_runtime.h": "",
        "include/cub/cub.cuh": "",
        "include/cublas_v2.h": "",
        "lib64/libcudart.so": "",
        "lib64/libcublas.so": "",
        "lib64/libcublasLt.so": "",
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name in without:
        (root / name).unlink()
    return root
