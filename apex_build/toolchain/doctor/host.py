"""What this machine has for building: processor, memory, disk, compilers and build tools; and the cache's size."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from apex_build import places
from apex_build.errors import ApexError, ToolFailed, ToolKilled, ToolTimeout
from apex_build.native.run import run_tool
from apex_build.printable import printable
from apex_build.storage.disk import disk_size, free_bytes
from apex_build.storage.sizes import folder_size
from apex_build.system import cpus
from apex_build.toolchain.build import cache, cmake
from apex_build.toolchain.build.launcher import sccache
from apex_build.toolchain.machine.compilers import Compiler, find_compiler

_CXX = re.compile(r"(c|g|clang)\+\+(-\d+)?")


@dataclass(frozen=True)
class HostCompiler:
    """A C++ compiler in PATH, identified by its own output. `kind`: GNU, Clang, or empty."""

    path: Path
    kind: str
    version: str


@dataclass(frozen=True)
class Disk:
    what: str
    path: Path
    free: int  # bytes
    total: int


@dataclass(frozen=True)
class CachedBuild:
    """A build in the cache; `of` is a line about it; `damaged`: files are missing, so it is not used."""

    key: str
    of: str
    size: int  # bytes, without what it shares with another folder
    current: bool
    damaged: bool = False


@dataclass(frozen=True)
class Machine:
    """`compiler`: the one that a build would use, or `compiler_error` says why there is none. `tools`: name -> version,
    or None.
    """

    architecture: str
    system: str
    cpu: str
    cpus: int
    memory: int  # bytes
    memory_available: int
    compilers: tuple[HostCompiler, ...]
    compiler: Compiler | None
    compiler_error: str
    tools: Mapping[str, str | None] = field(hash=False)
    disks: tuple[Disk, ...] = ()


def examine() -> Machine:
    """Examine everything; nothing is written."""
    compiler, error = None, ""
    try:
        compiler = find_compiler()
    except ApexError as caught:
        error = caught.message
    memory = _memory()
    return Machine(
        platform.machine(),
        _system(),
        _cpu_name(),
        cpus(),
        memory.get("MemTotal", 0),
        memory.get("MemAvailable", 0),
        compilers_in_path(),
        compiler,
        error,
        _tools(),
        tuple(_disk(what, path) for what, path in (("cache", places.cache_root()), ("current folder", Path.cwd()))),
    )


def compilers_in_path() -> tuple[HostCompiler, ...]:
    """Every C++ compiler in PATH, each once."""
    found: dict[Path, HostCompiler] = {}
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        try:
            programs = sorted(path for path in Path(folder or ".").iterdir() if _CXX.fullmatch(path.name))
        except OSError:
            continue
        for path in programs:
            if os.access(path, os.X_OK) and path.resolve() not in found:
                found[path.resolve()] = _says(path)
    return tuple(found.values())


def _says(path: Path) -> HostCompiler:
    """g++ (Debian 12.2.0-14) 12.2.0; Debian clang version 14.0.6"""
    said = _version(path, "--version") or ""
    numbers = re.findall(r"\d+\.\d+(?:\.\d+)?", said)
    if "clang" in said:
        return HostCompiler(path, "Clang", numbers[0] if numbers else "")
    known = numbers and re.search(r"g\+\+|gcc|c\+\+", said, re.IGNORECASE)
    return HostCompiler(path, "GNU" if known else "", "".join(numbers[-1:]))


def cached_builds() -> tuple[CachedBuild, ...]:
    """The builds in the cache, newest first, damaged ones last."""
    seen: set[tuple[int, int]] = set()
    builds = []
    for build in cache.all_builds():
        about = build.manifest
        pin = (about.get("pin") or {}).get("name") or "no pin"
        of = f"{pin}, {about.get('backend')}, {len(about.get('patches') or ())} patches"
        if gpus := (about.get("cuda") or {}).get("gpus"):
            of += f", {' '.join(map(str, gpus))}"
        builds.append(CachedBuild(build.key, of, folder_size(build.root, seen), build.current))
    whole = {build.key for build in builds}
    for path in sorted(cache.builds_root().glob("*")):
        if re.fullmatch(r"[0-9a-f]{32}", path.name) and path.name not in whole:
            builds.append(CachedBuild(path.name, "", folder_size(path, seen), False, damaged=True))
    return tuple(builds)


def cache_sizes() -> dict[str, int]:
    """Bytes of each folder of the cache. Shared files count once."""
    seen: set[tuple[int, int]] = set()
    root = places.cache_root()
    return {path.name: size for path in sorted(root.glob("*")) if path.is_dir() and (size := folder_size(path, seen))}


def _disk(what: str, path: Path) -> Disk:
    return Disk(what, path, free_bytes(path), disk_size(path))


def _tools() -> dict[str, str | None]:
    try:
        cmake_program, ninja_program = cmake.programs()
        tools = {"cmake": _version(cmake_program, "--version"), "ninja": _version(ninja_program, "--version")}
    except ApexError:
        tools = {"cmake": None, "ninja": None}
    launcher = sccache() or shutil.which("ccache")
    git = shutil.which("git")
    return {
        **tools,
        "git": _version(Path(git), "--version") if git else None,
        "compiler cache": _version(Path(launcher), "--version") if launcher else None,
    }


def _version(program: Path, *arguments: str) -> str | None:
    """The first line that it prints."""
    try:
        done = run_tool([program, *arguments], env={"LC_ALL": "C"}, timeout=60, check=False)
    except (ToolFailed, ToolKilled, ToolTimeout):
        return None
    lines: Sequence[str] = [printable(line).strip() for line in done.lines if line.strip()]
    return lines[0][:100] if lines and done.returncode == 0 else None


def _memory() -> dict[str, int]:
    return {
        name: int(kib) * 1024
        for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", _read(Path("/proc/meminfo")), re.MULTILINE)
    }


def _cpu_name() -> str:
    found = re.search(r"^(?:model name|Model)\s*: (.*)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or "unknown"


def _system() -> str:
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', _read(Path("/etc/os-release")), re.MULTILINE)
    libc = " ".join(part for part in platform.libc_ver() if part)
    return ", ".join(
        part for part in (found[1] if found else platform.system(), f"kernel {platform.release()}", libc) if part
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
