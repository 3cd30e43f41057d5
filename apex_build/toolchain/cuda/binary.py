"""The architectures in a built CUDA backend, read from the binary; and a stub of the driver to link with."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apex_build.errors import BuildFailed
from apex_build.native.run import run_tool
from apex_build.toolchain.cuda.toolkit import CudaToolkit
from apex_build.toolchain.machine.compilers import Compiler

_STUB_ANSWER = 34  # CUDA_ERROR_STUB_LIBRARY of cuda.h, as NVIDIA's own stub answers
_CUBIN = re.compile(r"ELF file\s+\d+:\s+\S+\.(sm_\d+[af]?)\.cubin")
_PTX = re.compile(r"PTX file\s+\d+:\s+\S+\.(sm_\d+[af]?)\.ptx")
_TEXT = re.compile(r"SASS text section\s+\d+\s*:\s*\S+\.(sm_\d+[af]?)\.elf\.bin")


@dataclass(frozen=True)
class Code:
    """The device code of one architecture in a library: object files, and kernels in them (PTX: not counted)."""

    objects: int
    kernels: int | None


def device_code(library: Path, cuobjdump: Path) -> dict[str, Code]:
    """By architecture (sm_121a; compute_90 for PTX). Raises BuildFailed if cuobjdump cannot read the library."""
    kernels = _count(_TEXT, library, cuobjdump, "--list-text")
    found = {
        name: Code(count, kernels[name]) for name, count in _count(_CUBIN, library, cuobjdump, "--list-elf").items()
    }
    ptx = _count(_PTX, library, cuobjdump, "--list-ptx")
    return found | {name.replace("sm_", "compute_"): Code(count, None) for name, count in ptx.items()}


def check_device_code(found: Mapping[str, Code], asked: Sequence[str], units: int, library: Path) -> None:
    """Raise BuildFailed unless each requested architecture (121a-real, 90-virtual) has code from every one of the
    CUDA `units`.
    """
    wrong = []
    for name in (name for given in asked for name in code_names(given)):
        code = found.get(name)
        if code is None or code.kernels == 0:
            wrong.append(f"no code for {name}")
        elif code.objects < units:
            wrong.append(f"code for {name} from {code.objects} of {units} CUDA files")
    if wrong:
        there = ", ".join(f"{name} ({code.objects})" for name, code in sorted(found.items())) or "none"
        raise BuildFailed(
            f"{library} was built, but has {'; '.join(wrong)}. It has: {there}", hint="apex build --force"
        )


def code_names(architecture: str) -> tuple[str, ...]:
    """What an entry of CMAKE_CUDA_ARCHITECTURES must leave in the binary: 121a-real -> sm_121a; 90 -> sm_90 and
    compute_90.
    """
    number, _, kind = architecture.partition("-")
    names = {"real": ("sm_",), "virtual": ("compute_",), "": ("sm_", "compute_")}[kind]
    return tuple(f"{prefix}{number}" for prefix in names)


def _count(pattern: re.Pattern[str], library: Path, cuobjdump: Path, option: str) -> Counter[str]:
    done = run_tool([cuobjdump, option, library], env={"LC_ALL": "C"}, check=False)
    nothing = any("does not contain device code" in line or "No " in line for line in done.lines)
    if done.returncode and not nothing:
        raise BuildFailed(f"{cuobjdump} cannot read {library}: {' '.join(done.lines[:2])}")
    return Counter(found[1] for line in done.lines if (found := pattern.search(line)))


def make_driver_stub(toolkit: CudaToolkit, compiler: Compiler, folder: Path) -> Path:
    """A libcuda.so to link with, since PyPI has none: every function of this toolkit's cuda.h, with the driver's
    soname. It lets llama.cpp's memory pool use the driver's virtual memory, which GGML_CUDA_NO_VMM would exclude.
    On a machine without the driver the loader then finds no libcuda.so.1, and the tools run without the CUDA backend.
    """
    library = folder / "libcuda.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    header = toolkit.part("CUDA runtime headers").with_name("cuda.h")
    done = run_tool(
        [compiler.cc, "-E", "-P", "-x", "c", f"-I{header.parent}", header], env={"LC_ALL": "C"}, timeout=120
    )
    names = sorted(set(re.findall(r"\bCUresult\s+(cu[A-Z]\w+)\s*\(", " ".join(done.lines))))
    if "cuMemCreate" not in names:
        raise BuildFailed(f"{header} declares no functions of the CUDA driver in a known form")
    source = folder / "stub.c"
    source.write_text("".join(f"int {name}(void) {{ return {_STUB_ANSWER}; }}\n" for name in names), encoding="utf-8")
    part = folder / "libcuda.so.part"
    run_tool([compiler.cc, "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", part, source], timeout=120)
    part.replace(library)
    return library
