"""A tiny CMake project instead of llama.cpp: a shared library, a tool that links it, and a step that can be made to
wait.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from waiting import until

from apex_build.toolchain.backends import Backend

CMAKE_LISTS = """
cmake_minimum_required(VERSION 3.14)
project(tiny C CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
option(BUILD_SHARED_LIBS "" ON)
add_library(part part.cpp)
set_target_properties(part PROPERTIES VERSION 1.2 SOVERSION 1)
add_custom_command(OUTPUT gate.h DEPENDS part COMMAND sh ${CMAKE_SOURCE_DIR}/gate.sh gate.h)
add_executable(tool tool.cpp gate.h)
target_include_directories(tool PRIVATE ${CMAKE_CURRENT_BINARY_DIR})
target_link_libraries(tool part)
"""
FILES = {
    "CMakeLists.txt": CMAKE_LISTS,
    "part.cpp": "int part() { return 40; }\n",
    "tool.cpp": '#include "gate.h"\n#include <cstdio>\nint part();\nint main() { std::printf("%d\\n", part() + 2); }\n',
    # writes its process id, then waits while the file that APEX_TEST_GATE names is there
    "gate.sh": """
if [ -n "$APEX_TEST_GATE" ]; then
    echo $$ > "$APEX_TEST_GATE.pid"
    while [ -e "$APEX_TEST_GATE" ]; do sleep 0.05; done
fi
[ -e "$1" ] || echo "" > "$1"  # Ninja then knows that nothing changed
""",
}
TINY = Backend("tiny", {}, ("tool",))

# what a child runs that is to be interrupted, or to compete: source folder -> "built" or "reused"
BUILD = """
import signal, sys
from pathlib import Path
from apex_build.cli import main
from apex_build.toolchain.backends import Backend
from apex_build.toolchain.build.run import build, plan_build
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    done = build(plan_build(Path(sys.argv[1]), Backend("tiny", {}, ("tool",))))
except KeyboardInterrupt:
    sys.exit(130)
print("reused" if done.reused else "built")
"""


@dataclass(frozen=True)
class Gate:
    """While `path` exists, a build waits at the gate; `pid` then contains the waiting process's id."""

    path: Path

    @property
    def pid(self) -> Path:
        return Path(f"{self.path}.pid")

    def wait(self, build: subprocess.Popen[str]) -> int:
        def came() -> int:
            text = self.pid.read_text() if self.pid.is_file() else ""
            return int(text) if text.endswith("\n") else 0

        return until(came, build)

    def open(self) -> None:
        self.path.unlink()


def make_source(folder: Path) -> Path:
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    for arguments in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "tiny"],
    ):
        subprocess.run(["git", "-C", str(folder), *arguments], check=True)
    return folder


def start_build(source: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(source)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
