"""Find the compiler, and reject anything else before work starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apex_build.errors import CompilerMissing
from apex_build.toolchain.machine.compilers import cpu_features, find_compiler


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_the_systems_compiler() -> None:
    compiler = find_compiler()
    assert compiler.kind in ("GNU", "Clang")
    assert int(compiler.version.split(".")[0]) >= 9
    assert "linux" in compiler.target
    assert len(cpu_features(compiler)) == 64


def test_no_compiler_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompilerMissing, match="no C\\+\\+ compiler was found") as caught:
        find_compiler()
    assert "g++ 9" in str(caught.value.hint)
    script(tmp_path / "apt-get", "")
    with pytest.raises(CompilerMissing) as caught:
        find_compiler()
    assert str(caught.value.hint).endswith("apt-get install g++")


def test_cxx_that_points_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    with pytest.raises(CompilerMissing, match="there is no such program"):
        find_compiler()


def test_cxx_with_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "ccache g++ -m32")
    with pytest.raises(CompilerMissing, match="more than the name of a compiler"):
        find_compiler()


def test_cxx_that_is_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", str(script(tmp_path / "not-a-gcc", "exit 0")))
    monkeypatch.setenv("CXX", str(script(tmp_path / "not-a-g++", "exit 0")))
    with pytest.raises(CompilerMissing, match=r"expected g\+\+ or clang\+\+"):
        find_compiler()


def test_a_compiler_that_is_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = script(
        tmp_path / "g++",
        "echo '#define __GNUC__ 7'; echo '#define __GNUC_MINOR__ 5'; echo '#define __GNUC_PATCHLEVEL__ 0'",
    )
    monkeypatch.setenv("CC", str(old))
    monkeypatch.setenv("CXX", str(old))
    with pytest.raises(CompilerMissing, match=r"is GNU 7\.5\.0; 9 is the oldest"):
        find_compiler()


def test_a_compiler_without_its_standard_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = shutil.which("c++")
    body = (
        f'case "$*" in *-dM*) exec {real} "$@";; esac\necho "trial.cpp:3:10: fatal error: filesystem: No such '
        'file"\nexit 1'
    )
    monkeypatch.setenv("CXX", str(script(tmp_path / "g++", body)))
    monkeypatch.setenv("CC", str(shutil.which("cc")))
    with pytest.raises(CompilerMissing, match=r"(?s)cannot build even a small program.*fatal error: filesystem"):
        find_compiler()


@pytest.mark.parametrize(
    ("given", "cc", "cxx"),
    [
        ({"CXX": "g++-12"}, "gcc-12", "g++-12"),
        ({"CXX": "x86_64-linux-gnu-g++"}, "x86_64-linux-gnu-gcc", "x86_64-linux-gnu-g++"),
        ({"CXX": "clang++-17"}, "clang-17", "clang++-17"),
        ({"CXX": "c++"}, "cc", "c++"),
        ({"CC": "gcc-12"}, "gcc-12", "g++-12"),
        ({"CC": "clang"}, "clang", "clang++"),
        ({"CC": "cc"}, "cc", "c++"),
    ],
)
def test_the_companion_of_a_named_compiler(
    given: dict[str, str], cc: str, cxx: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, real in ((cc, shutil.which("cc")), (cxx, shutil.which("c++"))):
        script(tmp_path / "bin" / name, f'exec {real} "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = find_compiler()
    assert (found.cc, found.cxx) == (tmp_path / "bin" / cc, tmp_path / "bin" / cxx)


def test_the_command_line_says_so_with_its_own_code(tmp_path: Path) -> None:
    """Nothing is fetched, started or left behind."""
    env = {**os.environ, "CXX": str(tmp_path / "nothing"), "APEX_CACHE_DIR": str(tmp_path / "cache")}
    code = (
        "import sys; from pathlib import Path; from apex_build import cli; from apex_build.cli import build\n"
        "build.ensure_source = None  # never called\n"
        "cli.main(['build'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 20
    assert "error: CXX names" in done.stderr
    assert "try:   unset CXX" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "cache").exists()
