"""Output of a failing Ninja, CMake and compiler, shortened to what a person needs."""

from __future__ import annotations

from apex_build.toolchain.build.ninja import compile_errors, configure_errors, steps_done

FAILED = """\
[1/4] Building CXX object CMakeFiles/part.dir/part.cpp.o
[2/4] Building CXX object CMakeFiles/tool.dir/tool.cpp.o
FAILED: [code=1] CMakeFiles/tool.dir/tool.cpp.o
/usr/bin/c++  -I/a/b -O3 -DNDEBUG -MD -MT CMakeFiles/tool.dir/tool.cpp.o -o CMakeFiles/tool.dir/tool.cpp.o -c tool.cpp
In file included from /src/tool.cpp:1:
/src/tool.h:9:1: warning: something harmless
/src/tool.cpp: In function 'int main()':
/src/tool.cpp:3:12: error: 'nonsense' was not declared in this scope
    3 |     return nonsense;
      |            ^~~~~~~~
[3/4] Building CXX object CMakeFiles/x.dir/x.cpp.o
ninja: build stopped: subcommand failed.
""".splitlines()

KILLED = """\
FAILED: [code=1] big.o
/usr/bin/c++ -c big.cpp
c++: fatal error: Killed signal terminated program cc1plus
compilation terminated.
ninja: build stopped: subcommand failed.
""".splitlines()

CONFIGURE = """\
-- The CXX compiler identification is GNU 12.2.0
CMake Warning at common/CMakeLists.txt:33 (message):
  Git repository not found

CMake Error at CMakeLists.txt:5 (find_package):
  Could not find a package configuration file provided by "Nothing"

  Add the installation prefix of "Nothing" to CMAKE_PREFIX_PATH

-- Configuring incomplete, errors occurred!
""".splitlines()


def test_steps() -> None:
    assert steps_done("[12/300] Building CXX object x.o") == (12, 300)
    assert steps_done("[12/300") is None
    assert steps_done("warning: [1/2] ") is None


def test_the_failed_step_with_its_errors_and_nothing_else() -> None:
    assert compile_errors(FAILED) == [
        "FAILED: [code=1] CMakeFiles/tool.dir/tool.cpp.o",
        "/src/tool.cpp:3:12: error: 'nonsense' was not declared in this scope",
        "    3 |     return nonsense;",
        "      |            ^~~~~~~~",
    ]


def test_a_compiler_that_ran_out_of_memory() -> None:
    assert compile_errors(KILLED)[1] == "c++: fatal error: Killed signal terminated program cc1plus"


def test_a_failure_without_a_block_shows_ninjas_own_words() -> None:
    assert compile_errors(["[1/2] a", "ninja: error: unknown target 'x'"]) == ["ninja: error: unknown target 'x'"]


def test_cmakes_errors_without_its_warnings() -> None:
    assert configure_errors(CONFIGURE) == [CONFIGURE[4], CONFIGURE[5], CONFIGURE[7]]
