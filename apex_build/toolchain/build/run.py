"""Build the tools of a source tree: once for each set of inputs, whole or not at all, one build at a time in a work
folder.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from apex_build.errors import BuildFailed, BuildMissing
from apex_build.native.toolset import Toolset, find_toolset, open_build
from apex_build.progress import Report, Step, silent
from apex_build.source.pins import Pin
from apex_build.source.series import read_series, series_digest
from apex_build.source.tree import tree_identity
from apex_build.storage.artifacts import Artifact, making_folder
from apex_build.storage.digests import sha256_json
from apex_build.storage.disk import check_room, writing
from apex_build.storage.locks import locked
from apex_build.storage.manifest import BUILD
from apex_build.toolchain.backends import BACKENDS, Backend
from apex_build.toolchain.build import cache, cmake
from apex_build.toolchain.build.launcher import launcher
from apex_build.toolchain.build.record import BuildRecord, CudaRecord, FileRecord, PatchRecord, PinRecord
from apex_build.toolchain.cuda.binary import check_device_code, device_code
from apex_build.toolchain.cuda.plan import CudaPlan, cmake_settings, runtime_libraries
from apex_build.toolchain.cuda.toolkit import CudaToolkit
from apex_build.toolchain.machine.compilers import Compiler, cpu_features, find_compiler

_FLAGS = {
    "CFLAGS": ("CMAKE_C_FLAGS",),
    "CXXFLAGS": ("CMAKE_CXX_FLAGS",),
    "LDFLAGS": ("CMAKE_EXE_LINKER_FLAGS", "CMAKE_SHARED_LINKER_FLAGS", "CMAKE_MODULE_LINKER_FLAGS"),
}
WORK_SIZE = 1 << 30  # bytes on the disk during a build, generously
_SEARCHED = ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH")  # the compiler reads these by itself


@dataclass(frozen=True)
class BuildPlan:
    """All inputs of a build, and its place. `ingredients` are the parts of its key."""

    key: str
    source: Path
    backend: Backend
    pin: Pin | None
    compiler: Compiler
    options: Mapping[str, str] = field(hash=False)
    ingredients: Mapping[str, Any] = field(hash=False)
    cuda: CudaPlan | None = None

    @property
    def root(self) -> Path:
        """Where the finished build will be."""
        return cache.builds_root() / self.key

    @property
    def artifact(self) -> Artifact:
        return Artifact(self.root, BUILD, cache.parts_of(self.ingredients), self.root / "manifest.json")

    @property
    def work(self) -> Path:
        """CMake's folder: one for each source folder, compiler and options, so that an edited source rebuilds only
        what changed.
        """
        what = {"source": str(self.source), "options": dict(self.options), "compiler": _of(self.compiler)}
        if self.cuda:
            what["cuda"] = str(self.cuda.toolkit.root)
        return cache.work_root() / sha256_json(what)[:16]


@dataclass(frozen=True)
class Built:
    """The outcome: `reused` if it was in the cache; `counts`: hits and misses of the compiler cache, if known."""

    toolset: Toolset
    reused: bool
    seconds: float
    counts: Mapping[str, int] | None = field(default=None, hash=False)


def build_cpu(source: Path, pin: Pin | None = None, *, report: Report = silent) -> Toolset:
    """The CPU tools of `source` for this machine, from the cache or built now. A selected CUDA build stays selected."""
    return build(plan_build(source, BACKENDS["cpu"], pin), prefer=False, report=report).toolset


def ensure_tools(source: Path, pin: Pin, *, report: Report = silent) -> Toolset:
    """The tools in use if built from this exact source, or named by APEX_TOOLS; else the CPU tools of `source`."""
    try:
        found = find_toolset()
    except BuildMissing:
        return build_cpu(source, pin, report=report)
    named = bool(os.environ.get("APEX_TOOLS"))
    return (
        found
        if named or found.manifest.get("source") == tree_identity(source)
        else build_cpu(source, pin, report=report)
    )


def plan_build(
    source: Path, backend: Backend, pin: Pin | None = None, *, native: bool = True, cuda: CudaPlan | None = None
) -> BuildPlan:
    """Find the compiler, name all inputs. A CUDA build is never `native`: it may be moved. Raises CompilerMissing."""
    native = native and cuda is None
    source = source.resolve()
    cmake.programs()
    compiler = find_compiler()
    options = backend.cmake_options(native=native)
    for variable, names in _FLAGS.items():
        if value := os.environ.get(variable):
            options |= dict.fromkeys(names, value)
    ingredients: dict[str, Any] = {
        "backend": backend.name,
        "source": tree_identity(source),
        "pin": {"name": pin.name, "commit": pin.commit} if pin else None,
        "series": series_digest(pin) if pin else None,
        "compiler": {"kind": compiler.kind, "version": compiler.version, "target": compiler.target},
        "options": options,
        "targets": list(backend.targets),
        "cpu": cpu_features(compiler) if native else None,
        "environment": {name: value for name in _SEARCHED if (value := os.environ.get(name))},
    }
    if cuda:
        ingredients["cuda"] = cuda.ingredients()
    return BuildPlan(cache.key_of(ingredients), source, backend, pin, compiler, options, ingredients, cuda)


def build(
    plan: BuildPlan, *, jobs: int | None = None, force: bool = False, prefer: bool = True, report: Report = silent
) -> Built:
    """Make the planned build, or take it from the cache. `force` recompiles everything, `prefer` as in
    `cache.make_current`.

    An interrupted build (Ctrl-C, a power cut, an error) resumes where it stopped; it is not visible before it is
    complete. Raises BuildFailed with the compiler's messages, OutputUnwritable, DiskTooSmall.
    """
    began = time.monotonic()
    if not force and (found := cache.look_up(plan.key)):
        return _done(found, True, began, prefer)
    with making_folder(
        plan.artifact, reuse=not force, intact=lambda _: cache.look_up(plan.key) is not None, report=report
    ) as draft:
        if draft.found:  # another apex built it while we waited
            return _done(open_build(plan.root), True, began, prefer)
        if not force and (wrong := cache.damage(plan.key)):
            report(Step(f"the finished build is damaged, so it is built again: {wrong}", 0, said=True))
        with locked(plan.work, wait=True, report=report), writing(plan.work):
            if force:
                shutil.rmtree(plan.work, ignore_errors=True)
            there = sum(path.lstat().st_size for path in plan.work.rglob("*"))
            hint = "APEX_CACHE_DIR=FOLDER names a cache on another disk"
            check_room(plan.work.parent, max(0, WORK_SIZE - there), "a build", spare=0, hint=hint)
            toolkit = plan.cuda.ready(plan.compiler, report) if plan.cuda else None
            counts, name = _compile(plan, toolkit, jobs or cmake.default_jobs(), report)
            _check_unchanged(plan)
            report(Step("collecting", 0))
            draft.part.mkdir(parents=True)
            cuda = _of_cuda(plan, toolkit) if toolkit else None
            runtime, licences = (runtime_libraries(toolkit), toolkit.root / "licenses") if toolkit else ({}, None)
            files = cache.collect(plan.work / "bin", plan.backend.targets, draft.part, runtime, licences)
            draft.done(_record(plan, files, cuda, name, time.monotonic() - began))
    return _done(open_build(plan.root), False, began, prefer, counts)


def _compile(
    plan: BuildPlan, toolkit: CudaToolkit | None, jobs: int, report: Report
) -> tuple[Mapping[str, int] | None, str]:
    plan.work.mkdir(parents=True, exist_ok=True)
    options = dict(plan.options)
    if plan.pin:  # what --version prints, instead of our own commit
        options |= {
            "LLAMA_BUILD_NUMBER": "0",
            "LLAMA_BUILD_COMMIT": f"{plan.pin.commit[:9]}-{plan.ingredients['source'][:8]}",
        }
    cuda = cmake_settings(toolkit, plan.compiler, plan.work) if toolkit else None
    with launcher(plan.work.parent.parent, [plan.source, plan.work]) as front:
        cmake.configure(plan.source, plan.work, options, plan.compiler, front, report, cuda=cuda)
        cmake.compile_targets(plan.source, plan.work, plan.backend.targets, jobs, front, report)
        return front.counts(), front.name


def _of_cuda(plan: BuildPlan, toolkit: CudaToolkit) -> CudaRecord:
    """The manifest's part about CUDA, with the device code in the library. Raises BuildFailed if some is missing."""
    assert plan.cuda
    library = plan.work / "bin" / "libggml-cuda.so"
    found = device_code(library, toolkit.part("cuobjdump"))
    units = json.loads((plan.work / "compile_commands.json").read_text(encoding="utf-8"))
    check_device_code(found, plan.cuda.architectures, sum(unit["file"].endswith(".cu") for unit in units), library)
    gpus = tuple(target.name for target in plan.cuda.targets)
    chosen, architectures = plan.cuda.toolkit, tuple(plan.cuda.architectures)
    return CudaRecord(chosen.origin, chosen.version, chosen.packages, architectures, dict(sorted(found.items())), gpus)


def _check_unchanged(plan: BuildPlan) -> None:
    if tree_identity(plan.source) != plan.ingredients["source"]:
        raise BuildFailed(f"{plan.source} was edited while it was being built", hint="run apex build again")


def _record(
    plan: BuildPlan, files: Mapping[str, FileRecord], cuda: CudaRecord | None, cached_by: str, seconds: float
) -> BuildRecord:
    went_in = plan.ingredients
    return BuildRecord(
        key=plan.key,
        recipe=cache.RECIPE,
        backend=plan.backend.name,
        source=went_in["source"],
        pin=PinRecord(plan.pin.name, plan.pin.commit) if plan.pin else None,
        series=went_in["series"],
        patches=tuple(PatchRecord(patch.name, patch.sha256) for patch in read_series(plan.pin)) if plan.pin else (),
        compiler=_of(plan.compiler),
        compiler_cache=cached_by,
        options=plan.options,
        targets=tuple(plan.backend.targets),
        cpu=went_in["cpu"],
        environment=went_in["environment"],
        host=platform.machine(),
        built=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        seconds=round(seconds, 1),
        ggml_type_count=cache.ggml_type_count(plan.source),
        files=files,
        cuda=cuda,
    )


def _of(compiler: Compiler) -> dict[str, str]:
    return {name: str(value) for name, value in asdict(compiler).items()}


def _done(toolset: Toolset, reused: bool, began: float, prefer: bool, counts: Mapping[str, int] | None = None) -> Built:
    cache.make_current(toolset, prefer=prefer)
    return Built(toolset, reused, time.monotonic() - began, counts)
