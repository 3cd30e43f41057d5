"""CUDA toolkits: the parts that one must have, and checks of installed ones."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from apex_build.errors import ToolFailed, ToolkitUnusable, ToolTimeout
from apex_build.hookspecs import GpuTarget
from apex_build.native.run import ToolRun, run_tool
from apex_build.toolchain.machine.compilers import Compiler
from apex_build.toolchain.machine.gpus import capability_number, dropped_by

_VARIABLES = ("CUDAToolkit_ROOT", "CUDA_HOME", "CUDA_PATH")
_PLACES = ("/usr/local/cuda", "/usr/local/cuda-*", "/opt/cuda")
_TARGETS = {"x86_64": ("x86_64-linux",), "aarch64": ("sbsa-linux", "aarch64-linux")}

# part -> where it may be; {include} and {lib} are the toolkit's folders of headers and libraries
PARTS: Mapping[str, tuple[str, ...]] = {
    "nvcc": ("bin/nvcc",),
    "ptxas": ("bin/ptxas",),
    "fatbinary": ("bin/fatbinary",),
    "cudafe++": ("bin/cudafe++",),
    "cicc": ("nvvm/bin/cicc",),
    "libdevice": ("nvvm/libdevice/libdevice.10.bc",),
    "compiler headers": ("{include}/crt/host_config.h",),
    "CUDA runtime headers": ("{include}/cuda_runtime.h",),
    "CUDA runtime": ("{lib}/libcudart.so",),
    "CCCL headers": ("{include}/cub/cub.cuh", "{include}/cccl/cub/cub.cuh"),
    "cuBLAS headers": ("{include}/cublas_v2.h",),
    "cuBLAS": ("{lib}/libcublas.so",),
    "cuBLASLt": ("{lib}/libcublasLt.so",),
    "cuobjdump": ("bin/cuobjdump",),
}
RUNTIME = ("CUDA runtime", "cuBLAS", "cuBLASLt")  # must be beside the tools
_STUB = ("{lib}/stubs/libcuda.so",)


@dataclass(frozen=True)
class CudaToolkit:
    """A toolkit root, complete or not. `parts` has a path for each part of PARTS, None if it is missing.

    `version` is nvcc's (13.0.88), empty if nvcc is missing or cannot be run; `packages` are the wheels of a toolkit
    from PyPI. A toolkit from PyPI may not be fetched yet: then `root` is its future place, and `parts` is empty.
    """

    root: Path
    version: str
    origin: str  # system or pypi
    parts: Mapping[str, Path | None] = field(default_factory=dict, hash=False)
    packages: Mapping[str, Mapping[str, str]] = field(default_factory=dict, hash=False)
    remarks: Mapping[str, str] = field(default_factory=dict, hash=False)  # why an existing part counts as missing

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(name for name, path in self.parts.items() if path is None)

    def part(self, name: str) -> Path:
        path = self.parts.get(name)
        if path is None:
            raise ToolkitUnusable(f"the CUDA toolkit in {self.root} has no {name}", hint=HINT)
        return path

    def ingredients(self) -> dict[str, object]:
        """What goes into a build's key: versions and packages, not the place."""
        return {
            "origin": self.origin,
            "version": self.version,
            "packages": {name: dict(of) for name, of in self.packages.items()},
        }


HINT = "--cuda-toolchain pypi gets a complete toolkit from the package index, without root"


def judge(root: Path, origin: str = "system", packages: Mapping[str, Mapping[str, str]] | None = None) -> CudaToolkit:
    """Look for each part of a toolkit in `root`."""
    parts = {name: _first(root, patterns) for name, patterns in PARTS.items()}
    nvcc = parts["nvcc"]
    version = _nvcc_version(nvcc) if nvcc else ""
    of_headers = _runtime_version(parts["CUDA runtime headers"])
    remarks = {}
    if version and of_headers and of_headers != ".".join(version.split(".")[:2]):
        parts["CUDA runtime headers"] = None
        remarks["CUDA runtime headers"] = f"those there are of CUDA {of_headers}"
    return CudaToolkit(root, version, origin, parts, packages or {}, remarks)


def system_toolkits() -> tuple[CudaToolkit, ...]:
    """This machine's toolkits, complete or not: named by a variable, with nvcc in PATH, or in the usual places."""
    roots = [Path(os.environ[name]) for name in _VARIABLES if os.environ.get(name)]
    if nvcc := shutil.which("nvcc"):
        roots.append(_root_of(Path(nvcc)))
    for place in _PLACES:
        roots += sorted(Path("/").glob(place.lstrip("/")), reverse=True)
    found: dict[Path, CudaToolkit] = {}
    for root in roots:
        if root.is_dir() and root.resolve() not in found:
            toolkit = judge(root)
            if any(toolkit.parts.values()):
                found[root.resolve()] = toolkit
    return tuple(found.values())


def driver_stub(toolkit: CudaToolkit) -> Path | None:
    """The toolkit's libcuda.so to link with where no driver is installed."""
    return _first(toolkit.root, _STUB)


def unfit(toolkit: CudaToolkit, targets: Iterable[GpuTarget], compiler: Compiler) -> str | None:
    """Why this toolkit cannot build for these GPUs with this compiler; None if it can."""
    if toolkit.missing:
        return f"{toolkit.root} is an incomplete CUDA toolkit ({_listed(toolkit)})"
    if not toolkit.version:
        return f"{toolkit.root}: its nvcc cannot be run"
    return cannot_compile_for(toolkit, targets) or newer_compiler(toolkit, compiler)


def cannot_compile_for(
    toolkit: CudaToolkit, targets: Iterable[GpuTarget], known: Sequence[int] | None = None
) -> str | None:
    """The first GPU that this toolkit cannot compile for, and the version that can.

    `known`: the architectures of a toolkit that is not fetched yet (90, 121); else nvcc is asked.
    """
    known = known or _gpu_codes(toolkit.parts.get("nvcc"))
    for target in targets:
        number = capability_number(target.architecture)
        needed = target.minimum_cuda
        older = dropped_by(target.architecture)
        if needed and _numbers(toolkit.version) < _numbers(needed):
            needs = f"needs CUDA {needed} or newer"
        elif known and number not in known:
            needs = f"needs a CUDA older than {older}" if older else f"needs a CUDA newer than {toolkit.version}"
        else:
            continue
        compiles = f", which compiles for {', '.join(f'sm_{code}' for code in sorted(known))}" if known else ""
        return f"{target.name} ({target.architecture}) {needs}; {_called(toolkit)} is {toolkit.version}{compiles}"
    return None


def newer_compiler(toolkit: CudaToolkit, compiler: Compiler) -> str | None:
    """Why nvcc would refuse this host compiler: its own limit, read from include/crt/host_config.h."""
    newest = host_limits(toolkit).get(compiler.kind)
    return too_new(compiler, newest, _called(toolkit), toolkit.version)


def too_new(compiler: Compiler, newest: int | None, called: str, version: str) -> str | None:
    if newest is None or int(compiler.version.split(".")[0]) <= newest:
        return None
    name = {"GNU": "gcc", "Clang": "clang"}[compiler.kind]
    return f"nvcc {version} of {called} takes {name} up to {newest}; {compiler.cxx} is {name} {compiler.version}"


def older_compiler_hint(newest: int, kind: str) -> str:
    """A hint for a host compiler that is too new: an installed older one, or to install one."""
    stem = {"GNU": "g++", "Clang": "clang++"}[kind]
    for number in range(newest, 8, -1):
        if shutil.which(f"{stem}-{number}"):
            return f"CXX={stem}-{number} apex build ..."
    return f"install {stem}-{newest} and set CXX={stem}-{newest}"


def host_limits(toolkit: CudaToolkit) -> dict[str, int]:
    """The newest major version of each host compiler that nvcc accepts, by the compiler's kind."""
    header = toolkit.parts.get("compiler headers")
    text = header.read_text(encoding="utf-8", errors="replace") if header else ""
    limits = {}
    if found := re.search(r"gcc versions later than (\d+) are not supported", text):
        limits["GNU"] = int(found[1])
    if found := re.search(r"clang version must be less than (\d+)", text):
        limits["Clang"] = int(found[1]) - 1
    return limits


def told(toolkit: CudaToolkit) -> str:
    """A line about a toolkit, for the user."""
    version = f"CUDA {toolkit.version}" if toolkit.version else "no nvcc"
    return f"{toolkit.root}: {version}, {_listed(toolkit) if toolkit.missing else 'complete'}"


def _listed(toolkit: CudaToolkit) -> str:
    there = [name for name in PARTS if name not in toolkit.missing]
    missing = [f"{name} ({remark})" if (remark := toolkit.remarks.get(name)) else name for name in toolkit.missing]
    return f"missing: {', '.join(missing)}; there: {', '.join(there) or 'nothing'}"


def _called(toolkit: CudaToolkit) -> str:
    return (
        "the CUDA toolkit from the package index" if toolkit.origin == "pypi" else f"the CUDA toolkit in {toolkit.root}"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _first(root: Path, patterns: Sequence[str]) -> Path | None:
    targets = [f"targets/{name}" for name in _TARGETS.get(platform.machine(), ())]
    places = {
        "{include}": ["include", *(f"{t}/include" for t in targets)],
        "{lib}": ["lib64", *(f"{t}/lib" for t in targets), "lib"],
    }
    for pattern in patterns:
        key = pattern.partition("/")[0]
        for folder in places.get(key, [key]):
            path = root / folder / pattern.partition("/")[2]
            if path.is_file():
                return path
    return None


def _root_of(nvcc: Path) -> Path:
    """The root that this nvcc uses. nvcc is asked; the one in PATH may be a script."""
    said = _ask(nvcc, "--dryrun", "-x", "cu", os.devnull)
    for line in said.lines if said else ():
        if found := re.fullmatch(r"#\$ TOP=(.+)", line.strip()):
            return Path(os.path.normpath(found[1]))
    return nvcc.resolve().parent.parent


def _nvcc_version(nvcc: Path) -> str:
    said = _ask(nvcc, "--version")
    found = re.search(r"\bV(\d+\.\d+\.\d+)", "\n".join(said.lines)) if said else None
    return found[1] if found else ""


def _runtime_version(header: Path | None) -> str:
    """CUDART_VERSION of cuda_runtime_api.h: 13000 -> 13.0."""
    try:
        text = (header.parent / "cuda_runtime_api.h").read_text(encoding="utf-8", errors="replace") if header else ""
    except OSError:
        return ""
    found = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", text)
    return f"{int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}" if found else ""


def _gpu_codes(nvcc: Path | None) -> tuple[int, ...] | None:
    said = _ask(nvcc, "--list-gpu-code") if nvcc else None
    return tuple(int(found) for found in re.findall(r"\bsm_(\d+)\b", " ".join(said.lines))) or None if said else None


def _ask(nvcc: Path, *arguments: str) -> ToolRun | None:
    return _ask_once(nvcc, arguments, nvcc.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _ask_once(nvcc: Path, arguments: tuple[str, ...], _time: int) -> ToolRun | None:
    clean = {"LC_ALL": "C", "NVCC_APPEND_FLAGS": None, "NVCC_PREPEND_FLAGS": None}
    try:
        done = run_tool([nvcc, *arguments], env=clean, timeout=60, check=False)
    except (ToolFailed, ToolTimeout):
        return None
    return done if done.returncode == 0 else None
