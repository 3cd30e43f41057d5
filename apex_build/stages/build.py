"""Stage build: the tools of a pin, for this machine's CPU or for GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from apex_build.hookspecs import GpuTarget
from apex_build.progress import Report, silent
from apex_build.source.fetch import ensure_source
from apex_build.source.pins import Pin, load_pin
from apex_build.toolchain.backends import BACKENDS
from apex_build.toolchain.build.run import BuildPlan, Built, plan_build
from apex_build.toolchain.build.run import build as build_planned
from apex_build.toolchain.cuda.plan import Toolchain, backend_of, plan_cuda
from apex_build.toolchain.machine.compilers import find_compiler


@dataclass(frozen=True)
class BuildOptions:
    """`gpus`: for these, with CUDA (toolchain.machine.gpus finds them by name); none: for the CPU. `native`: for
    this CPU only.
    """

    gpus: tuple[GpuTarget, ...] = ()
    toolchain: Toolchain = "auto"
    ptx: bool = False
    all_kv_types: bool = False
    native: bool = True
    jobs: int | None = None  # compilers at once; None: by CPUs and memory
    force: bool = False


def check_build(options: BuildOptions = BuildOptions()) -> None:
    """Checks that need no source. Raises CompilerMissing, ToolkitUnusable."""
    compiler = find_compiler()
    if options.gpus:
        plan_cuda(options.gpus, compiler, options.toolchain, ptx=options.ptx)


def plan(source: Path, pin: Pin | None, options: BuildOptions = BuildOptions()) -> BuildPlan:
    """All inputs of the build, and its key. The plan's `cuda.notes` say which toolkits were skipped."""
    if not options.gpus:
        return plan_build(source, BACKENDS["cpu"], pin, native=options.native)
    compiler = find_compiler()
    cuda = plan_cuda(options.gpus, compiler, options.toolchain, ptx=options.ptx)
    return plan_build(source, backend_of(cuda, compiler, all_kv_types=options.all_kv_types), pin, cuda=cuda)


def build(options: BuildOptions = BuildOptions(), *, pin: Pin | None = None, report: Report = silent) -> Built:
    """Build the tools of a pin (the default one), or take them from the cache; the source is fetched if it is missing.

    Raises CompilerMissing, ToolkitUnusable, BuildFailed, DiskTooSmall, and what `fetch` raises.
    """
    check_build(options)
    pin = pin or load_pin()
    return build_planned(
        plan(ensure_source(pin, report), pin, options), jobs=options.jobs, force=options.force, report=report
    )
