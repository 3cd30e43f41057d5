"""Choose and check the CUDA toolkit for a build, before anything is compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from apex_build.errors import ToolkitUnusable
from apex_build.hookspecs import GpuTarget
from apex_build.progress import Report, silent
from apex_build.toolchain.backends import Backend, cuda_backend, with_ptx
from apex_build.toolchain.cuda import toolkit as cuda_toolkit
from apex_build.toolchain.cuda import wheels as cuda_wheels
from apex_build.toolchain.cuda.binary import make_driver_stub
from apex_build.toolchain.cuda.toolkit import CudaToolkit, driver_stub
from apex_build.toolchain.machine.compilers import Compiler, accepts
from apex_build.toolchain.machine.gpus import LAST_CUDA_12, architectures, dropped_by

Toolchain = Literal["auto", "system", "pypi"]


@dataclass(frozen=True)
class CudaPlan:
    """Additional inputs of a CUDA build. `notes`: why found toolkits are not used."""

    targets: tuple[GpuTarget, ...]
    architectures: tuple[str, ...]
    toolkit: CudaToolkit
    notes: tuple[str, ...] = ()

    def ingredients(self) -> dict[str, object]:
        return self.toolkit.ingredients()

    def ready(self, compiler: Compiler, report: Report = silent) -> CudaToolkit:
        """The toolkit, fetched if it comes from PyPI, and checked by its own files. Raises ToolkitUnusable, or as
        `install`.
        """
        toolkit = cuda_wheels.install(report=report) if self.toolkit.origin == "pypi" else self.toolkit
        if reason := cuda_toolkit.unfit(toolkit, self.targets, compiler):
            raise ToolkitUnusable(reason, hint=_hint(toolkit, self.targets, compiler))
        return toolkit


def plan_cuda(
    targets: Sequence[GpuTarget], compiler: Compiler, toolchain: Toolchain = "auto", *, ptx: bool = False
) -> CudaPlan:
    """Choose the toolkit: `auto` takes this machine's first one that is complete and suits GPUs and compiler, else
    PyPI's.

    Nothing is fetched here. Raises ToolkitUnusable, which says for each toolkit why it cannot be used.
    """
    asked = architectures(targets)
    toolkit, notes = _choose(tuple(targets), compiler, toolchain)
    return CudaPlan(tuple(targets), with_ptx(asked) if ptx else asked, toolkit, notes)


def backend_of(plan: CudaPlan, compiler: Compiler, *, all_kv_types: bool = False) -> Backend:
    """The CUDA backend for this plan, with the CPU backends that the compiler can build."""
    machine = compiler.target.partition("-")[0]
    return cuda_backend(plan.architectures, machine, lambda flag: accepts(compiler, flag), all_kv_types=all_kv_types)


def cmake_settings(toolkit: CudaToolkit, compiler: Compiler, work: Path) -> Mapping[str, str]:
    """CMake variables for this toolkit's place. None of them changes the build."""
    stub = driver_stub(toolkit) or make_driver_stub(toolkit, compiler, work / "driver-stub")
    return {
        "CMAKE_CUDA_COMPILER": str(toolkit.part("nvcc")),
        "CUDAToolkit_ROOT": str(toolkit.root),
        "CUDA_cuda_driver_LIBRARY": str(stub),
    }


def runtime_libraries(toolkit: CudaToolkit) -> dict[str, Path]:
    """The CUDA libraries that the backend is linked with, by the name that the loader looks for (libcublas.so.13)."""
    found = {}
    for part in cuda_toolkit.RUNTIME:
        library = toolkit.part(part)
        named = min((path.name for path in library.parent.glob(f"{library.name}.*")), key=len, default=library.name)
        found[named] = library.with_name(named).resolve()
    return found


def _choose(
    targets: tuple[GpuTarget, ...], compiler: Compiler, toolchain: Toolchain
) -> tuple[CudaToolkit, tuple[str, ...]]:
    notes: list[str] = []
    unfit: CudaToolkit | None = None
    if toolchain != "pypi":
        for toolkit in cuda_toolkit.system_toolkits():
            reason = cuda_toolkit.unfit(toolkit, targets, compiler)
            if reason is None:
                return toolkit, tuple(notes)
            unfit = unfit or toolkit
            notes.append(reason)
        if toolchain == "system":
            said = "".join(f"\n  {note}" for note in notes) or ": none was found"
            raise ToolkitUnusable(
                f"no CUDA toolkit of this machine can build for {', '.join(target.name for target in targets)}{said}",
                hint=_old_hint(targets)
                or (cuda_toolkit.HINT if unfit is None or unfit.missing else _hint(unfit, targets, compiler)),
            )
    said = "".join(f"\n  {note}" for note in notes)
    try:
        wheels = cuda_wheels.pinned_wheels()
    except ToolkitUnusable as error:
        raise ToolkitUnusable(error.message + said, hint=error.hint) from None
    toolkit = cuda_wheels.planned(wheels)
    reason = cuda_toolkit.cannot_compile_for(toolkit, targets, wheels.gpu_codes) or cuda_toolkit.too_new(
        compiler, wheels.newest_host.get(compiler.kind), "the package index", wheels.version
    )
    if reason:
        raise ToolkitUnusable(reason + said, hint=_hint(toolkit, targets, compiler, wheels.newest_host))
    return toolkit, tuple(notes)


def _hint(
    toolkit: CudaToolkit, targets: Sequence[GpuTarget], compiler: Compiler, limits: Mapping[str, int] | None = None
) -> str:
    newest = (limits or cuda_toolkit.host_limits(toolkit)).get(compiler.kind)
    if newest and int(compiler.version.split(".")[0]) > newest:
        return cuda_toolkit.older_compiler_hint(newest, compiler.kind)
    if old := _old_hint(targets):
        return old
    if toolkit.origin == "pypi":
        return "--cuda-toolchain system with a toolkit that is new enough, which CUDA_HOME=FOLDER names"
    return cuda_toolkit.HINT


def _old_hint(targets: Sequence[GpuTarget]) -> str:
    """A hint for GPUs that current toolkits no longer compile for; '' if there are none. No newer toolkit or wheels
    would help.
    """
    old = [target for target in targets if dropped_by(target.architecture)]
    if not old:
        return ""
    options = " ".join(f"--gpu {target.name}" for target in old)
    alone = ", in a separate build" if len(old) < len(targets) else ""
    return (
        f"it needs an older toolkit, at most CUDA {LAST_CUDA_12}{alone}: "
        f"CUDA_HOME=FOLDER apex build {options} --cuda-toolchain system"
    )
