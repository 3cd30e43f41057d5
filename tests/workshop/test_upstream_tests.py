"""`apex patch test`: the source's tests without and with a series, on a tiny CMake project instead of llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from source.tiny import World, commit
from workshop.conftest import MakeLater, Run

from apex_build.errors import BuildFailed, SeriesUnfit, UpstreamTestsFailed
from apex_build.source.fetch import fetch
from apex_build.source.series import save_series
from apex_build.workshop import upstream_tests
from apex_build.workshop.each_builds import workplace

CMAKE = b"""cmake_minimum_required(VERSION 3.14...3.28)
project(tiny C CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_executable(llama-imatrix src/tool.c)
if (LLAMA_BUILD_TESTS)
    include(CTest)
    add_subdirectory(tests)
endif()
"""
TESTS = b"""include_directories(${PROJECT_SOURCE_DIR}/src)
function(of program name label)
    add_test(NAME ${name} WORKING_DIRECTORY . COMMAND $<TARGET_FILE:${program}> ${ARGN})
    set_property(TEST ${name} PROPERTY LABELS ${label})
endfunction()
add_executable(test-value value.c)
add_executable(test-slow slow.c)
add_executable(test-never never.c)
of(test-value test-value-40 main 40 ${PROJECT_SOURCE_DIR}/models/ggml-vocab-tiny.gguf)
of(test-value test-of-a-value-fails main 1 ${PROJECT_SOURCE_DIR}/models/ggml-vocab-tiny.gguf)
of(test-slow test-slow main)
of(test-never test-with-a-model model)
add_executable(test-make make.c)
add_executable(test-backend-ops test-backend-ops.cpp)
of(test-value test-a-made main 40 made)
of(test-make test-make main)
of(test-never test-with-the-download main)
set_tests_properties(test-a-made PROPERTIES FIXTURES_REQUIRED made)
set_tests_properties(test-make PROPERTIES FIXTURES_SETUP made)
set_tests_properties(test-with-the-download PROPERTIES FIXTURES_REQUIRED model)
add_test(NAME test-url COMMAND ${CMAKE_COMMAND} -E echo https://models.example)
add_test(NAME test-download COMMAND ${CMAKE_COMMAND} -E false)
set_tests_properties(test-download PROPERTIES FIXTURES_SETUP model)
"""
VALUE = """#include <stdio.h>
#include <stdlib.h>
#include "value.h"
int main(int argc, char ** argv) {
    FILE * vocab = fopen(argv[2], "r");
    printf("the value is %d\\n", VALUE);
    return argc != 3 || !vocab || atoi(argv[1]) != VALUE;
}
"""
SLOW = """#include <unistd.h>
#include "value.h"
int main(void) { sleep(VALUE == 42 ? 60 : 0); return 0; }
"""
MAKE = """#include <stdio.h>
int main(void) { return fclose(fopen("made", "w")); }
"""
OPERATIONS = """#include <cstring>
int main(int argc, char ** argv) { return argc != 8 || std::strcmp(argv[3], "CPU"); }
"""


@pytest.fixture
def later(make_later: MakeLater) -> World:
    later = make_later(
        {
            "CMakeLists.txt": CMAKE,
            "src/value.h": b"#define VALUE 40\n",
            "src/tool.c": b'#include "value.h"\nint main(void) { return VALUE; }\n',
            "models/ggml-vocab-tiny.gguf": b"GGUF",
            "tests/CMakeLists.txt": TESTS,
            "tests/value.c": VALUE.encode(),
            "tests/slow.c": SLOW.encode(),
            "tests/make.c": MAKE.encode(),
            "tests/test-backend-ops.cpp": OPERATIONS.encode(),
            "tests/never.c": b"#error this is never built\n",
        }
    )
    fetch(later.pin)
    return later


def change(world: World, text: str, message: str) -> None:
    commit(world.tree, {"src/value.h": text.encode()}, message)
    save_series(world.pin)


def test_both_sides(later: World, run: Run) -> None:
    change(later, "#define VALUE 40 // forty\n", "value: say it")
    said = run("patch", "test", "--pin", later.toml)
    assert said.code == 0, said.err
    assert said.out.splitlines() == [
        "without the series: 6 run, 5 passed",
        "with the series: 6 run, 5 passed",
        "  test-of-a-value-fails: failed; without the series: failed",
        "left out: 4, needs a model to be downloaded",
        "later: no test passes without the series and fails with it (6 of 6 run)",
    ]
    status = json.loads(run("patch", "status", "--pin", later.toml, "--json").out)
    assert status["tests"]["ran"] == 6 and status["tests"]["failed_without_too"] == ["test-of-a-value-fails"]
    assert status["lacking"] == ["it was not built yet"]
    assert not (later.tree / "tests").exists(), "the tree is what it was"

    # what breaks a test is found, and only its side runs again
    change(later, "#define VALUE 41\n", "value: one more")
    said = run("patch", "test", "--pin", later.toml)
    assert said.code == UpstreamTestsFailed.exit_code
    assert "without the series: 6 run, 6 of them earlier, 5 passed\nwith the series: 6 run, 3 passed\n" in said.out
    assert "2 of llama.cpp's tests pass without the series and fail with it: test-a-made, test-value-40" in said.err
    log = Path(said.err.split("their output is in ")[1].split(";")[0]) / "test-value-40.log"
    assert "the value is 41" in log.read_text()
    assert "2 broken" in run("patch", "status", "--pin", later.toml).out

    change(later, "#define VALUE 42\n", "value: too slow")
    said = run("patch", "test", "--pin", later.toml, "--only", "slow", "--timeout", "2", "--json")
    assert said.code == UpstreamTestsFailed.exit_code
    assert json.loads(said.out)["with"] == {"test-slow": "timeout"}
    said = run("patch", "status", "--pin", later.toml)
    assert "it breaks tests: test-slow" in said.out


@pytest.mark.parametrize("name", ["test-a", '"test-a"', "[=[test-a]=]", "[==[test-a]==]"])
def test_the_program_of_a_test(name: str) -> None:
    """CMake writes the name of a test in one of these ways, depending on its version and policies."""
    found = upstream_tests.ADDED.fullmatch(f'add_test({name} "/built/bin/test-program"')
    assert found and (found["name"], found["program"]) == ("test-a", "/built/bin/test-program")


def test_a_part_of_the_tests_is_no_whole(later: World, run: Run) -> None:
    change(later, "#define VALUE (40)\n", "value: in brackets")
    said = run("patch", "test", "--pin", later.toml, "--only", "value-40")
    assert "with the series: 1 run, 1 passed" in said.out and "(1 of 6 run)" in said.out
    assert "only 1 of 6 of llama.cpp's tests were run" in run("patch", "status", "--pin", later.toml).out
    assert run("patch", "test", "--pin", later.toml, "--only", "(").code == 2
    assert run("patch", "test", "--pin", later.toml, "--only", "slow").code == 0
    assert "only 2 of 6" in run("patch", "status", "--pin", later.toml).out, "parts add up"


def test_what_a_test_makes_for_another_is_made_first(later: World, run: Run) -> None:
    """Also if only this test is requested, or if its fixture was made earlier, for the other side."""
    change(later, "#define VALUE (40)\n", "value: in brackets")
    said = run("patch", "test", "--pin", later.toml, "--only", "a-made", "--json")
    found = json.loads(said.out)
    assert found["with"] == found["without"] == {"test-a-made": "passed"}
    work = workplace(later.pin) / "build"
    (work / "made").unlink()
    change(later, "#define VALUE 40 // forty\n", "value: say it")
    said = run("patch", "test", "--pin", later.toml, "--only", "made")
    assert "with the series: 1 run, 1 passed" in said.out


def test_what_does_not_compile(later: World, run: Run) -> None:
    change(later, "#define VALUE forty\n", "value: in words")
    said = run("patch", "test", "--pin", later.toml)
    assert said.code == BuildFailed.exit_code
    assert "llama.cpp's tests cannot be built with the series" in said.err and "forty" in said.err


def test_a_source_without_tests(series: World, run: Run) -> None:
    said = run("patch", "test", "--pin", series.toml)
    assert said.code == SeriesUnfit.exit_code
    assert "has no tests/CMakeLists.txt" in said.err


def test_status_builds_patch_by_patch(later: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second patch does not compile, the third fixes it."""
    from apex_build.toolchain.backends import Backend
    from apex_build.workshop.each_builds import build_each
    from apex_build.workshop.overview import overview

    for number, text in enumerate(("#define VALUE 1\n", "#define VALUE one\n", "#define VALUE 2\n"), 1):
        change(later, text, f"value: change {number}")
    tool = Backend("cpu", targets=("llama-imatrix",))
    said = list(build_each(overview(later.pin), backend=tool))
    assert [error is None for _, error in said] == [True, False, True]
    assert "error" in str(said[1][1]) and "one" in str(said[1][1])
    found = overview(later.pin)
    assert [known.builds for known in found.known] == [True, False, True]
    assert found.whole.builds is True
    assert list(build_each(found, backend=tool)) == [], "remembered"
