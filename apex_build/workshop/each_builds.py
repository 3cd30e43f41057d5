"""Check that a series builds after every patch: compile each commit on top of the last, in one work folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from apex_build.errors import BuildFailed
from apex_build.progress import Report, Step, silent
from apex_build.source.git import git
from apex_build.source.pins import Pin
from apex_build.source.tree import BASE, check_out, commit_identity, require_tree
from apex_build.storage.disk import check_room, writing
from apex_build.storage.locks import locked
from apex_build.toolchain.backends import BACKENDS, Backend
from apex_build.toolchain.build import cache, cmake
from apex_build.toolchain.build.launcher import launcher
from apex_build.toolchain.build.run import WORK_SIZE
from apex_build.toolchain.machine.compilers import find_compiler
from apex_build.workshop import results
from apex_build.workshop.overview import Overview


def build_each(
    found: Overview, *, backend: Backend = BACKENDS["cpu"], jobs: int | None = None, report: Report = silent
) -> Iterator[tuple[str, str | None]]:
    """Compile the source up to each patch, unless it is known whether that builds. Yields (patch, compiler errors or
    None).

    If the series is empty, compiles the base. Results are remembered.
    """
    pin, path = found.pin, require_tree(found.pin)
    todo = [
        (one.patch.name, one.commit, one.identity)
        for one, known in zip(found.standing, found.known, strict=True)
        if one.commit and one.identity and known.builds is None
    ]
    if not found.standing and found.whole.builds is None:
        base = git(path, "rev-parse", "--verify", f"refs/tags/{BASE}^{{commit}}")
        todo = [(BASE, base, commit_identity(path, base))]
    for number, (name, commit, identity) in enumerate(todo, 1):
        said = _told(report, f"{number} of {len(todo)}, {name[:-6] if name.endswith('.patch') else name}")
        error = compile_commit(pin, commit, backend, backend.targets, jobs=jobs, report=said)
        results.remember(identity, "builds", {"ok": error is None, "error": error})
        yield name, error


def _told(report: Report, detail: str) -> Report:
    return lambda step: report(step if step.said else replace(step, detail=detail))


def workplace(pin: Pin) -> Path:
    """The folder with the workshop's checkout of a pin (`source`) and its CMake build (`build`). Lock it before use."""
    return cache.work_root() / f"patches-{pin.name}"


def compile_commit(
    pin: Pin, commit: str, backend: Backend, targets: Sequence[str], *, jobs: int | None = None, report: Report = silent
) -> str | None:
    """Compile a commit of the pin's tree in a separate folder; returns the compiler's errors if it fails."""
    folder = workplace(pin)
    source, work = folder / "source", folder / "build"
    with locked(folder, wait=True, report=report), writing(folder):
        check_room(
            cache.work_root(), 0 if work.is_dir() else WORK_SIZE, "a build", hint="APEX_CACHE_DIR=FOLDER: another disk"
        )
        check_out(require_tree(pin), commit, source)
        work.mkdir(parents=True, exist_ok=True)
        with launcher(cache.work_root().parent, [source, work]) as front:
            try:
                report(Step("configuring", 0))
                cmake.configure(source, work, backend.cmake_options(native=True), find_compiler(), front, report)
                cmake.compile_targets(source, work, targets, jobs or cmake.default_jobs(), front, report)
            except BuildFailed as error:
                return compilers_words(error)
    return None


def compilers_words(error: BuildFailed) -> str:
    lines = [line.strip(" |") for line in error.message.splitlines()[1:]]
    return "\n".join([line for line in lines if line][:12]) or error.message
