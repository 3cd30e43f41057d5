"""Run CMake and Ninja, both from wheels in this environment, in a work folder that is kept between builds."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from apex_build import system
from apex_build.errors import BuildFailed, CompilerMissing
from apex_build.native.run import run_tool
from apex_build.printable import printable
from apex_build.progress import Report, Step
from apex_build.storage.json_files import read_json, write_json
from apex_build.toolchain.build import ninja
from apex_build.toolchain.build.launcher import Launcher
from apex_build.toolchain.machine.compilers import Compiler

_MEMORY_PER_JOB = 1.5 * (1 << 30)  # bytes; llama.cpp's largest files need about this


def default_jobs() -> int:
    """As many compilers as our CPUs and memory allow."""
    cpus = system.cpus()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return cpus
    return max(1, min(cpus, int(available / _MEMORY_PER_JOB)))


def programs() -> tuple[Path, Path]:
    """cmake and ninja. Raises CompilerMissing if this environment lacks them."""
    try:
        import cmake
        import ninja as ninja_wheel

        found = Path(cmake.CMAKE_BIN_DIR) / "cmake", Path(ninja_wheel.BIN_DIR) / "ninja"
    except ImportError as error:
        raise CompilerMissing(
            f"{error.name} is not installed in this environment", hint="pip install cmake ninja"
        ) from None
    for path in found:
        if not os.access(path, os.X_OK):
            raise CompilerMissing(
                f"{path} is gone from this environment", hint="pip install --force-reinstall cmake ninja"
            )
    return found


def configure(
    source: Path,
    work: Path,
    options: Mapping[str, str],
    compiler: Compiler,
    launcher: Launcher,
    report: Report,
    *,
    cuda: Mapping[str, str] | None = None,
) -> None:
    """Run CMake's configure step in `work`. A stale work folder is emptied, and configured again. Raises BuildFailed.

    `cuda`: where its toolkit is, as CMake variables.
    """
    cmake, ninja_program = programs()
    again = (work / "CMakeCache.txt").exists()
    settings = {
        **options,
        "CMAKE_MAKE_PROGRAM": str(ninja_program),
        "CMAKE_C_COMPILER": str(compiler.cc),
        "CMAKE_CXX_COMPILER": str(compiler.cxx),
        "CMAKE_C_COMPILER_LAUNCHER": str(launcher.program or ""),
        "CMAKE_CXX_COMPILER_LAUNCHER": str(launcher.program or ""),
    }
    if cuda:
        settings |= {
            **cuda,
            "CMAKE_CUDA_HOST_COMPILER": str(compiler.cxx),
            "CMAKE_CUDA_COMPILER_LAUNCHER": str(launcher.program or ""),
        }
    definitions = [f"-D{name}={value}" for name, value in sorted(settings.items())]
    report(Step("configuring", 0))
    log = _log(work, "configure")
    done = run_tool(
        [cmake, "-S", source, "-B", work, "-G", "Ninja", "--no-warn-unused-cli", *definitions],
        log=log,
        env={**launcher.env, **_environment()},
        check=False,
    )
    if done.returncode and again:
        shutil.rmtree(work)
        configure(source, work, options, compiler, launcher, report, cuda=cuda)
    elif done.returncode:
        raise BuildFailed(
            f"CMake cannot configure {source}{_quoted(ninja.configure_errors(done.lines))}\n  all of its output: {log}"
        )


def compile_targets(
    source: Path, work: Path, targets: Sequence[str], jobs: int, launcher: Launcher, report: Report
) -> None:
    """Run Ninja on everything out of date. Raises BuildFailed with the compiler's error lines."""
    _, ninja_program = programs()

    def progress(line: str) -> None:
        if step := ninja.steps_done(line):
            report(Step("compiling", *step, "steps"))

    env = {**launcher.env, **_environment(), "NINJA_STATUS": ninja.STATUS}
    if _turned_back(source, work):
        run_tool([ninja_program, "-C", work, "-t", "clean"], env=env)
    write_json(work / _TIMES, {"began": time.time_ns(), "files": _times(source)})
    log = _log(work, "build")
    command: list[str | Path] = [ninja_program, "-C", work, "-j", str(jobs), *targets]
    # on SIGTERM ninja ends its compilers too
    done = run_tool(command, log=log, on_line=progress, env=env, check=False, on_death="TERM")
    if done.returncode:
        memory = any("Killed" in line for line in done.lines)
        raise BuildFailed(
            f"the compiler failed on {source}{_quoted(ninja.compile_errors(done.lines))}\n  all of its output: {log}",
            hint="apex build --jobs 1, which needs the least memory" if memory else None,
        )


def _environment() -> dict[str, str | None]:
    # Flags are given as options, which the build's key holds.
    names = (
        "CFLAGS",
        "CXXFLAGS",
        "LDFLAGS",
        "CMAKE_GENERATOR",
        "CMAKE_TOOLCHAIN_FILE",
        "CMAKE_BUILD_TYPE",
        "DESTDIR",
        "NINJAFLAGS",
        "CUDAARCHS",
        "CUDACXX",
        "CUDAFLAGS",
        "CUDAHOSTCXX",
        "NVCC_APPEND_FLAGS",
        "NVCC_CCBIN",
        "NVCC_PREPEND_FLAGS",
    )
    # And no git: libggml would be recompiled after every commit in the tree, just to record its name; `--version` has
    # ours (build.py).
    return {**dict.fromkeys(names), "GIT_DIR": os.devnull, "LC_ALL": "C"}


def _log(work: Path, name: str) -> Path:
    return work.with_name(f"{work.name}.{name}.log")


def _quoted(lines: Sequence[str]) -> str:
    return "".join(f"\n  | {printable(line)[:300]}" for line in lines)


# Ninja only checks file times. A source file that was restored with its old time (mv file.orig file) would not be
# compiled again, though the build's key has changed: then everything is compiled again (out of the compiler cache,
# mostly).
_TIMES = "apex-source-times.json"


def _times(source: Path) -> dict[str, int]:
    times = {}
    for folder, folders, files in os.walk(source):
        folders[:] = [name for name in folders if name != ".git"]
        for name in files:
            path = os.path.join(folder, name)  # noqa: PTH118  thousands of files
            times[path] = os.stat(path, follow_symlinks=False).st_mtime_ns  # noqa: PTH116
    return times


def _turned_back(source: Path, work: Path) -> bool:
    try:
        seen = read_json(work / _TIMES)
        before, began = dict(seen["files"]), int(seen["began"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return False
    return any(time_ns != before.get(path) and time_ns < began for path, time_ns in _times(source).items())
