"""What our child processes run in: an environment that injects no code or options, and a tie to our own lifetime."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

# Options and arithmetic that manifests and results would not record; and code from outside the build.
_OPTIONS = ("AIP_", "GGML_", "LLAMA_", "MTMD_")
_CODE = ("CUDA_INJECTION", "GCONV_PATH", "GLIBC_TUNABLES", "HF_", "LD_", "MODEL_ENDPOINT")
# The user may choose where memory is allocated: results do not change.
_KEPT = frozenset(
    {"GGML_CUDA_ENABLE_UNIFIED_MEMORY", "GGML_CUDA_NO_PINNED", "GGML_CUDA_P2P", "GGML_CUDA_REGISTER_HOST"}
)
_LOOKS = 5
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# The same in Python, for systems whose setpriv cannot tie a process to its parent.
_BIND = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.Signals['SIG' + sys.argv[1]]); "
    "os.execvp(sys.argv[2], sys.argv[2:])"
)


def is_tool(program: Path) -> bool:
    """Whether a program is one of llama.cpp's: they have ggml's library beside them."""
    return (program.parent / "libggml-base.so").is_file()


def environment(program: Path, added: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """The environment for a program: ours, without what would silently change a llama.cpp tool: its options,
    arithmetic or code.

    `added` is added; None removes a name.
    """
    given = {name: value for name, value in os.environ.items() if name in _KEPT or not name.startswith(_OPTIONS)}
    if is_tool(program):
        given = {name: value for name, value in given.items() if not name.startswith(_CODE)}
        given["GGML_NO_BACKTRACE"] = "1"  # a debugger's backtrace would hide the error itself
        if folders := library_folders(program.parent):
            given["LD_LIBRARY_PATH"] = os.pathsep.join(map(str, folders))
        if not any(name in given for name in _WAITING) and cores_are_shared():
            # OpenMP's threads spin at each barrier: with other work on the same cores that slows a tool down a
            # hundredfold. On idle cores sleeping is what costs: a small model writes a quarter of the tokens.
            given["OMP_WAIT_POLICY"] = "passive"
    return {name: value for name, value in {**given, **(added or {})}.items() if value is not None}


def cores_are_shared() -> bool:
    """Whether other programs use so much CPU now that a tool's threads would have to wait for a core.

    Counted over 50 ms, from the kernel; if it does not tell, the cores count as shared.
    """
    cores = os.cpu_count() or 1
    running = []
    try:
        for _ in range(_LOOKS):
            # "0.20 0.18 0.12 3/80 11206": runnable threads now, this one among them
            running.append(int(Path("/proc/loadavg").read_text(encoding="ascii").split()[3].partition("/")[0]) - 1)
            time.sleep(0.01)
    except (OSError, ValueError, IndexError):
        return True
    return sum(running) / _LOOKS > (0.5 if cores <= 4 else cores / 4)


def library_folders(bin: Path) -> tuple[Path, ...]:
    """Folders of LD_LIBRARY_PATH that tools in `bin` need, such as the GPU driver's in a container.

    The build's own libraries come first, so that no other library takes the place of one of them.
    """
    given = os.environ.get("LD_LIBRARY_PATH", "")
    folders = tuple(Path(folder) for folder in given.split(os.pathsep) if folder.startswith("/"))
    if not folders or not (lacking := _lacking(bin)):
        return ()
    needed = tuple(folder for folder in folders if any((folder / name).is_file() for name in lacking))
    return (bin, *needed) if needed else ()


@functools.lru_cache(maxsize=8)
def _lacking(bin: Path) -> frozenset[str]:
    """Names of libraries that the loader does not find by itself for the tools in `bin` and their backends."""
    program = bin / "llama-quantize"
    if not program.is_file():
        return frozenset()
    backends = " ".join(str(path) for path in sorted(bin.glob("libggml-*.so")))
    try:
        said = subprocess.run(
            [program],  # the loader lists the libraries and exits; the program itself is not run
            env={"LD_TRACE_LOADED_OBJECTS": "1", "LD_PRELOAD": backends, "LC_ALL": "C"},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return frozenset()
    text = said.stdout + said.stderr
    absent = re.findall(r"^\s*(\S+) => not found", text, re.MULTILINE)
    outdated = re.findall(r"(\S+): version `[^']*' not found", text)
    return frozenset(Path(name).name for name in (*absent, *outdated))


@functools.lru_cache(maxsize=4)
def bound(signal_name: str = "KILL") -> tuple[str, ...]:
    """A command prefix: the kernel sends the process this signal if we are killed.

    Otherwise a tool would run on for hours, unnoticed, with a model in memory and all cores busy.
    """
    found = shutil.which("setpriv")
    prefix = (found, "--pdeathsig", signal_name, "--") if found else ()
    if (
        prefix
        and subprocess.run([*prefix, "true"], stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode
        == 0
    ):
        return prefix
    return (sys.executable, "-I", "-S", "-c", _BIND, signal_name)
