"""Build a real project of two files: once for each set of inputs, completely or not at all."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from children import alive
from tiny_project import TINY, Gate, make_source, start_build
from waiting import until

from apex_build.errors import BuildFailed, BuildMissing, OutputUnwritable
from apex_build.native.run import run_tool
from apex_build.progress import Step
from apex_build.toolchain.build import cache as build_cache
from apex_build.toolchain.build.launcher import sccache
from apex_build.toolchain.build.run import build, plan_build

pytestmark = pytest.mark.slow  # compiles


def visible(cache: Path) -> list[str]:
    """Entries of the builds folder that others would take for a build."""
    return sorted(path.name for path in (cache / "builds").glob("*") if not path.name.startswith("."))


def steps_of(cache: Path) -> list[str]:
    (log,) = (cache / "work").glob("*.build.log")
    return [line for line in log.read_text().splitlines() if line.startswith("[")]


def test_a_build_its_manifest_and_its_reuse(source: Path, cache: Path) -> None:
    steps: list[Step] = []
    plan = plan_build(source, TINY)
    built = build(plan, jobs=2, report=steps.append)
    assert not built.reused
    assert run_tool([built.toolset.tool("tool")]).lines == ("42",)
    assert built.toolset.root == cache / "builds" / plan.key
    manifest = built.toolset.manifest
    assert set(manifest["files"]) == {"bin/tool", "bin/libpart.so", "bin/libpart.so.1", "bin/libpart.so.1.2"}
    assert (built.toolset.bin / "libpart.so").is_symlink()
    assert manifest["source"] == plan.ingredients["source"]
    assert manifest["compiler"]["version"] == plan.compiler.version
    assert manifest["options"]["CMAKE_BUILD_TYPE"] == "Release"
    assert {step.task for step in steps} >= {"configuring", "compiling"}
    assert [step.done for step in steps if step.task == "compiling"][-1] == steps[-2].total

    steps.clear()
    again = build(plan_build(source, TINY), report=steps.append)
    assert again.reused
    assert not [step for step in steps if step.task in ("configuring", "compiling")]
    assert build_cache.verify(again.toolset) == 4
    assert [item.key for item in build_cache.all_builds()] == [plan.key]


def test_the_folder_can_be_moved(source: Path, cache: Path, tmp_path: Path) -> None:
    root = build(plan_build(source, TINY)).toolset.root
    moved = tmp_path / "elsewhere"
    shutil.move(root, moved)
    shutil.rmtree(cache)
    assert run_tool([moved / "bin" / "tool"]).lines == ("42",)
    dynamic = run_tool(["readelf", "-d", moved / "bin" / "tool"]).lines
    # an empty element, as CMake appends by itself, would be the current folder of whoever runs the tool
    assert [line.rpartition("[")[2] for line in dynamic if "RUNPATH" in line] == ["$ORIGIN]"]


def test_an_edit_compiles_what_changed_and_keeps_the_old_build(source: Path, cache: Path) -> None:
    first = build(plan_build(source, TINY))
    (source / "part.cpp").write_text("int part() { return 50; }\n")
    second = build(plan_build(source, TINY))
    assert run_tool([second.toolset.tool("tool")]).lines == ("52",)
    assert run_tool([first.toolset.tool("tool")]).lines == ("42",)
    assert not any("tool.cpp" in step for step in steps_of(cache))
    assert len(visible(cache)) == 2


def test_a_file_put_back_with_its_old_time_is_compiled_again(source: Path) -> None:
    old = source / "part.cpp"
    shutil.copy2(old, source.parent / "kept.cpp")
    old.write_text("int part() { return 50; }\n")
    assert run_tool([build(plan_build(source, TINY)).toolset.tool("tool")]).lines == ("52",)
    shutil.copy2(source.parent / "kept.cpp", old)
    assert run_tool([build(plan_build(source, TINY)).toolset.tool("tool")]).lines == ("42",)


def test_flags_options_and_backend_give_other_keys(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {plan_build(source, TINY).key, plan_build(source, TINY, native=False).key}
    monkeypatch.setenv("CXXFLAGS", "-O1")
    plan = plan_build(source, TINY)
    assert plan.options["CMAKE_CXX_FLAGS"] == "-O1"
    keys.add(plan.key)
    monkeypatch.delenv("CXXFLAGS")
    monkeypatch.setenv("CPATH", "/nowhere")
    keys.add(plan_build(source, TINY).key)
    assert len(keys) == 4


def test_broken_source_shows_the_compilers_own_line(source: Path, cache: Path) -> None:
    (source / "tool.cpp").write_text('#include "gate.h"\nint main() {\n    return nonsense;\n}\n')
    with pytest.raises(BuildFailed) as caught:
        build(plan_build(source, TINY))
    message = caught.value.message
    assert "tool.cpp:3:12: error: " in message
    assert "nonsense" in message
    assert "-o CMakeFiles" not in message  # the command line stays in the log
    assert visible(cache) == []
    log = Path(message.rpartition("all of its output: ")[2])
    assert "FAILED" in log.read_text()

    (source / "tool.cpp").write_text('#include "gate.h"\nint main() {}\n')
    build(plan_build(source, TINY))
    assert not any("part.cpp" in step for step in steps_of(cache))


def test_a_project_that_cmake_refuses(source: Path, cache: Path) -> None:
    (source / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.14)\nproject(x)\nadd_library(part nothing.cpp)\n"
    )
    with pytest.raises(BuildFailed, match=r"(?s)cannot configure.*Cannot find source file"):
        build(plan_build(source, TINY))
    assert visible(cache) == []


def test_a_target_that_is_not_made(source: Path, cache: Path) -> None:
    with (source / "CMakeLists.txt").open("a") as file:
        file.write("set_target_properties(tool PROPERTIES OUTPUT_NAME other)\n")
    with pytest.raises(BuildFailed, match="made no tool"):
        build(plan_build(source, TINY))
    assert visible(cache) == []


def test_a_source_edited_while_it_is_built(source: Path, cache: Path) -> None:
    with (source / "gate.sh").open("a") as file:
        file.write(f'echo "// later" >> "{source}/part.cpp"\n')
    with pytest.raises(BuildFailed, match="was edited while it was being built"):
        build(plan_build(source, TINY))
    assert visible(cache) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_build_leaves_nothing_running_and_resumes(
    source: Path, cache: Path, gate: Gate, number: signal.Signals, code: int
) -> None:
    with start_build(source) as child:
        waiting = gate.wait(child)
        child.send_signal(number)
        assert child.wait(60) == code
    until(lambda: not alive(waiting) and processes_with(str(cache)) == [])
    assert visible(cache) == []
    gate.open()
    assert run_tool([build(plan_build(source, TINY)).toolset.tool("tool")]).lines == ("42",)
    assert not any("part.cpp" in step for step in steps_of(cache))


def test_a_build_killed_outright_resumes_too(source: Path, cache: Path, gate: Gate) -> None:
    with start_build(source) as child:
        waiting = gate.wait(child)
        child.kill()
        child.wait(60)
    assert visible(cache) == []
    gate.open()
    until(lambda: not alive(waiting))
    assert run_tool([build(plan_build(source, TINY)).toolset.tool("tool")]).lines == ("42",)
    for process in processes_with(
        str(cache)
    ):  # nobody was left to stop its compiler cache, which would go by itself in ten minutes
        os.kill(process, signal.SIGTERM)


def test_two_builds_at_once(source: Path, cache: Path, gate: Gate) -> None:
    with start_build(source) as first:
        gate.wait(first)
        with start_build(source) as second:
            until(lambda: has_open(second.pid, ".lock"), second)  # it waits for the first, or will at once
            gate.open()
            said = sorted(child.communicate(timeout=300)[0].strip() for child in (first, second))
    assert said == ["built", "reused"]
    assert len(visible(cache)) == 1


def test_a_damaged_build_is_made_again(source: Path) -> None:
    plan = plan_build(source, TINY)
    tool = build(plan).toolset.tool("tool")
    tool.write_bytes(tool.read_bytes()[:100])
    assert build_cache.look_up(plan.key) is None
    assert build_cache.all_builds() == []
    said: list[Step] = []
    mended = build(plan, report=said.append)
    assert not mended.reused
    (warning,) = (step.task for step in said if step.said)
    assert warning.startswith("the finished build is damaged, so it is built again: ") and "bin/tool" in warning
    assert run_tool([mended.toolset.tool("tool")]).lines == ("42",)


def test_verify_notices_a_changed_byte(source: Path) -> None:
    toolset = build(plan_build(source, TINY)).toolset
    tool = toolset.tool("tool")
    content = bytearray(tool.read_bytes())
    content[-1] ^= 1
    tool.write_bytes(content)
    with pytest.raises(BuildMissing, match="bin/tool"):
        build_cache.verify(toolset)


def test_a_work_folder_that_cmake_cannot_use_is_emptied(source: Path, cache: Path) -> None:
    build(plan_build(source, TINY))
    (source / "part.cpp").write_text("int part() { return 50; }\n")
    (folder,) = (path for path in (cache / "work").iterdir() if path.is_dir() and not path.name.startswith("."))
    (folder / "CMakeCache.txt").write_text("CMAKE_HOME_DIRECTORY:INTERNAL=/somewhere/else\n")
    assert run_tool([build(plan_build(source, TINY)).toolset.tool("tool")]).lines == ("52",)


def test_force_compiles_everything_anew(source: Path, cache: Path) -> None:
    build(plan_build(source, TINY))
    assert not build(plan_build(source, TINY), force=True).reused
    assert sum(".cpp" in step for step in steps_of(cache)) == 2
    assert len(visible(cache)) == 1


def test_a_cache_that_cannot_be_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("APEX_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(OutputUnwritable, match="cannot be written"):
        build(plan_build(source, TINY))


@pytest.mark.skipif(sccache() is None, reason="no sccache for this machine")
def test_another_checkout_takes_from_the_compiler_cache(source: Path, cache: Path, tmp_path: Path) -> None:
    first = build(plan_build(source, TINY))
    assert first.counts == {"hits": 0, "misses": 2}
    other = make_source(tmp_path / "another checkout")
    (other / "part.cpp").write_text("int part() { return 50; }\n")
    second = build(plan_build(other, TINY))
    assert second.counts == {"hits": 1, "misses": 1}
    assert processes_with(str(cache)) == []


@pytest.mark.skipif(sccache() is None, reason="no sccache for this machine")
def test_the_users_own_compiler_cache_is_left_alone(
    source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SCCACHE_DIR", str(tmp_path / "users"))
    monkeypatch.setenv("SCCACHE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("SCCACHE_BUCKET", "users")
    monkeypatch.setenv("SCCACHE_RECACHE", "1")
    assert build(plan_build(source, TINY)).counts == {"hits": 0, "misses": 2}
    assert not (tmp_path / "users").exists()


def test_ccache_where_there_is_no_sccache(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in of three lines that records its arguments: only the launcher's place matters here."""
    ccache = tmp_path / "bin" / "ccache"
    ccache.parent.mkdir()
    ccache.write_text('#!/bin/sh\necho "$CCACHE_BASEDIR $*" >> "$CCACHE_DIR.calls"\nexec "$@"\n')
    ccache.chmod(0o755)
    monkeypatch.setattr("apex_build.toolchain.build.launcher.sccache", lambda: None)
    monkeypatch.setenv("PATH", f"{ccache.parent}{os.pathsep}{os.environ['PATH']}")
    built = build(plan_build(source, TINY))
    assert built.toolset.manifest["compiler_cache"] == "ccache"
    calls = (built.toolset.root.parents[1] / "ccache.calls").read_text().splitlines()
    assert sum(str(source) in call and ".cpp" in call for call in calls) >= 2


def test_without_any_compiler_cache(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apex_build.toolchain.build.launcher.sccache", lambda: Path("/bin/false"))  # does not start
    monkeypatch.setattr("apex_build.toolchain.build.launcher._READY_WITHIN", 0.2)
    built = build(plan_build(source, TINY))
    assert built.counts is None
    assert built.toolset.manifest["compiler_cache"] == "none"


def has_open(process: int, suffix: str) -> bool:
    """Whether a process has a file open whose name ends so."""
    for link in Path(f"/proc/{process}/fd").glob("*"):
        with suppress(OSError):  # closed since
            if link.readlink().name.endswith(suffix):
                return True
    return False


def processes_with(text: str) -> list[int]:
    """Processes other than ours with this text in their command line or environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            held = (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if text.encode() in held and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found
