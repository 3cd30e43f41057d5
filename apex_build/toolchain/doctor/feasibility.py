"""What can be built on this machine, with what, and about how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apex_build import places
from apex_build.errors import ApexError, SourceMissing
from apex_build.hookspecs import GpuTarget
from apex_build.plugins import Plugins
from apex_build.source.pins import Pin
from apex_build.source.tree import require_tree
from apex_build.storage.disk import free_bytes
from apex_build.toolchain.backends import BACKENDS
from apex_build.toolchain.build import cache
from apex_build.toolchain.build.cmake import default_jobs
from apex_build.toolchain.build.run import WORK_SIZE, plan_build
from apex_build.toolchain.cuda.plan import CudaPlan, backend_of, plan_cuda
from apex_build.toolchain.cuda.wheels import pinned_wheels
from apex_build.toolchain.machine.compilers import Compiler, find_compiler
from apex_build.toolchain.machine.gpus import Survey, resolve, targets_of

EXAMPLE = "dgx-spark"
# CPU-minutes, as measured on two cores with gcc 12 and no compiler cache
_CPU_MINUTES = 16
_CUDA_MINUTES = 40  # more, for each architecture
# CUDA's minor versions are compatible with each other, so the series decides (CUDA Compatibility, NVIDIA).
_OLDEST_DRIVER = {"12": 525, "13": 580}


@dataclass(frozen=True)
class BuildOption:
    """One possible build. `minutes` is an estimate, 0 if it is in the cache.

    `command` makes it; `why_not` says what prevents it, and `hint` what to try; `notes` are remarks.
    """

    name: str
    command: str
    why_not: str
    hint: str
    minutes: float
    cached: bool
    notes: tuple[str, ...] = ()

    @property
    def possible(self) -> bool:
        return not self.why_not


def build_options(pin: Pin, survey: Survey, plugins: Plugins) -> tuple[BuildOption, ...]:
    """The CPU build, and a CUDA build for this machine's GPUs, or an example if it has none."""
    cuda: tuple[GpuTarget, ...]
    if survey.gpus:
        cuda, name, command = targets_of(survey.gpus, plugins), "cuda, for this machine's GPUs", "apex build"
    else:
        cuda, name, command = (
            resolve([EXAMPLE], plugins),
            f"cuda, for example for {EXAMPLE}",
            f"apex build --gpu {EXAMPLE}",
        )
    return (
        _option("cpu", "apex build --backend cpu", pin, (), survey),
        _option(name, command, pin, cuda, survey),
    )


def _option(name: str, command: str, pin: Pin, targets: Sequence[GpuTarget], survey: Survey) -> BuildOption:
    notes: list[str] = []
    cached = False
    work = float(_CPU_MINUTES)
    try:
        compiler = find_compiler()
        cuda = plan_cuda(targets, compiler) if targets else None
        if cuda:
            work += _CUDA_MINUTES * len(cuda.architectures)
            notes += [f"not used: {note}" for note in cuda.notes]
            notes.append(_toolkit_note(cuda))
            notes += _driver_notes(cuda, survey)
        try:
            cached = _in_cache(require_tree(pin), pin, compiler, cuda)
        except SourceMissing:
            notes.append(f"the source is fetched first: {pin.carrier}")
        why_not, hint = ("", "") if cached else _disk_reason(cuda)
    except ApexError as error:
        why_not, hint = error.message, error.hint or ""
    minutes = 0.0 if cached else work / default_jobs()
    return BuildOption(name, command, why_not, hint, minutes, cached, tuple(note for note in notes if note))


def _in_cache(source: Path, pin: Pin, compiler: Compiler, cuda: CudaPlan | None) -> bool:
    backend = backend_of(cuda, compiler) if cuda else BACKENDS["cpu"]
    return cache.look_up(plan_build(source, backend, pin, cuda=cuda).key) is not None


def _toolkit_note(cuda: CudaPlan) -> str:
    if cuda.toolkit.parts:
        return f"CUDA {cuda.toolkit.version} in {cuda.toolkit.root}"
    wheels = pinned_wheels()
    return f"CUDA {wheels.version} from the package index: {wheels.size / 1e9:.2f} GB to download"


def _driver_notes(cuda: CudaPlan, survey: Survey) -> list[str]:
    needed = _OLDEST_DRIVER.get(cuda.toolkit.version.partition(".")[0])
    old = {gpu.driver for gpu in survey.gpus if needed and int(gpu.driver.partition(".")[0]) < needed}
    return [
        f"to compute on the GPU, its tools need driver {needed} or newer; this is {driver}" for driver in sorted(old)
    ]


def _disk_reason(cuda: CudaPlan | None) -> tuple[str, str]:
    needed = WORK_SIZE
    if cuda and not cuda.toolkit.parts:
        wheels = pinned_wheels()
        needed += wheels.size + wheels.unpacked
    root = places.cache_root()
    free = free_bytes(root)
    if free >= needed:
        return "", ""
    said = f"about {needed / 1e9:.1f} GB are needed in {root}, {free / 1e9:.1f} GB are free"
    return said, "APEX_CACHE_DIR=FOLDER names a cache on another disk"
