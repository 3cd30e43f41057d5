"""Find a C++17 compiler and identify it exactly."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apex_build.errors import CompilerMissing, ToolFailed, ToolTimeout
from apex_build.native.run import ToolRun, run_tool
from apex_build.printable import printable
from apex_build.storage.scratch import scratch_folder

_OLDEST = {"GNU": 9, "Clang": 10}  # the first that need no extra library for <filesystem>
_PAIRS = (("cc", "c++"), ("gcc", "g++"), ("clang", "clang++"))
_C_OF = {"g": "gcc", "clang": "clang", "c": "cc"}  # by what goes before ++
_CXX_OF = {"gcc": "g++", "clang": "clang++", "cc": "c++"}
_INSTALL = {
    "apt-get": "apt-get install g++",
    "dnf": "dnf install gcc-c++",
    "zypper": "zypper install gcc-c++",
    "pacman": "pacman -S gcc",
    "apk": "apk add g++ linux-headers",
}
_TRIAL = """
#include <cstdio>
#include <filesystem>
#include <string_view>
#include <thread>
int main(int, char ** argv) {
    std::string_view name = argv[0];
    std::thread thread([&] { std::printf("%d\\n", int(std::filesystem::exists(name))); });
    thread.join();
}
"""


@dataclass(frozen=True)
class Compiler:
    """A matching C and C++ compiler, both working."""

    cc: Path
    cxx: Path
    kind: str  # GNU or Clang, as CMake names them
    version: str
    target: str  # such as x86_64-linux-gnu


def find_compiler() -> Compiler:
    """The compilers that CC and CXX name, else the system's. Raises CompilerMissing if none can build a C++17
    program.
    """
    if os.environ.get("CXX") or os.environ.get("CC"):
        return _probe(*_from_environment())
    first_error: CompilerMissing | None = None
    for names in _PAIRS:
        cc, cxx = (shutil.which(name) for name in names)
        if cc and cxx:
            try:
                return _probe(Path(cc), Path(cxx))
            except CompilerMissing as error:
                first_error = first_error or error
    raise first_error or CompilerMissing(
        "no C++ compiler was found: no c++, g++ or clang++ in PATH", hint=install_hint()
    )


def cpu_features(compiler: Compiler) -> str:
    """sha256 of the CPU features that matter to code compiled for this machine."""
    flag = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"
    macros = _macros(compiler.cxx, flag) or [platform.machine(), platform.processor()]
    return hashlib.sha256("\n".join(sorted(macros)).encode()).hexdigest()


def accepts(compiler: Compiler, flag: str) -> bool:
    """Whether this compiler accepts a flag such as -march=..."""
    return bool(_macros(compiler.cxx, flag))


def install_hint() -> str:
    """The command that installs a compiler on this system."""
    for program, command in _INSTALL.items():
        if shutil.which(program):
            return command if os.geteuid() == 0 else f"sudo {command}"
    return "install g++ 9 or newer, or set CXX to a C++17 compiler"


def _from_environment() -> tuple[Path, Path]:
    """CC and CXX; if one is missing, the other's companion (CXX=g++-12 -> gcc-12)."""
    cc, cxx = os.environ.get("CC", ""), os.environ.get("CXX", "")
    given = {name: _program(name, value) for name, value in (("CXX", cxx), ("CC", cc)) if value}
    cc = cc or re.sub(r"(g|clang|c)\+\+(-[\d.]+)?$", lambda found: _C_OF[found[1]] + (found[2] or ""), cxx)
    cxx = cxx or re.sub(r"(gcc|clang|cc)(-[\d.]+)?$", lambda found: _CXX_OF[found[1]] + (found[2] or ""), cc)
    return given.get("CC") or _program("CC", cc), given.get("CXX") or _program("CXX", cxx)


def _program(variable: str, value: str) -> Path:
    words = shlex.split(value)
    if len(words) > 1:
        raise CompilerMissing(
            f"{variable}={value!r} is more than the name of a compiler",
            hint=f"{variable}={shlex.quote(words[-1])}; flags belong in CFLAGS and CXXFLAGS, a compiler cache is used "
            "by itself",
        )
    found = shutil.which(words[0]) if words else None
    if not found:
        raise CompilerMissing(
            f"{variable} names {value!r}, and there is no such program", hint=f"unset {variable}, or {install_hint()}"
        )
    return Path(found)


def _probe(cc: Path, cxx: Path) -> Compiler:
    return _probe_once(cc, cxx, cc.stat().st_mtime_ns, cxx.stat().st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _probe_once(cc: Path, cxx: Path, *_times: int) -> Compiler:
    values = dict(re.findall(r"#define (__\w+) (.*)", "\n".join(_macros(cxx))))
    if "__GNUC__" not in values:  # clang defines it too
        raise CompilerMissing(f"{cxx} is not a supported C++ compiler: expected g++ or clang++", hint=install_hint())
    clang = "__clang__" in values
    kind = "Clang" if clang else "GNU"
    names = (
        ("__clang_major__", "__clang_minor__", "__clang_patchlevel__")
        if clang
        else ("__GNUC__", "__GNUC_MINOR__", "__GNUC_PATCHLEVEL__")
    )
    version = ".".join(values.get(name, "0") for name in names)
    if int(version.split(".")[0]) < _OLDEST[kind]:
        raise CompilerMissing(
            f"{cxx} is {kind} {version}; {_OLDEST[kind]} is the oldest that works", hint=install_hint()
        )
    with scratch_folder("compiler") as scratch:
        _try(cxx, scratch / "trial.cpp", _TRIAL, ("-std=c++17", "-pthread"))
        _try(cc, scratch / "trial.c", "int main(void) { return 0; }\n", ())
    target = _run(cxx, "-dumpmachine").lines
    return Compiler(cc, cxx, kind, version, target[0].strip() if target else "unknown")


def _try(compiler: Path, source: Path, text: str, flags: Sequence[str]) -> None:
    source.write_text(text, encoding="utf-8")
    done = _run(compiler, *flags, str(source), "-o", str(source.with_suffix("")))
    if done.returncode:
        said = [printable(line) for line in done.lines if "error" in line or "cannot" in line] or list(done.lines)
        shown = "".join(f"\n  | {line}" for line in said[:6])
        raise CompilerMissing(f"{compiler} cannot build even a small program{shown}", hint=install_hint())


def _macros(cxx: Path, *flags: str) -> list[str]:
    """All predefined macros; empty if this is not a supported compiler, or it rejects a flag."""
    done = _run(cxx, *flags, "-dM", "-E", "-x", "c++", os.devnull)
    return [line for line in done.lines if line.startswith("#define ")] if done.returncode == 0 else []


def _run(program: Path, *arguments: str) -> ToolRun:
    try:
        return run_tool([program, *arguments], env={"LC_ALL": "C"}, timeout=120, check=False)
    except (ToolFailed, ToolTimeout) as error:
        raise CompilerMissing(f"{program} cannot be run: {error.message}", hint=install_hint()) from None
