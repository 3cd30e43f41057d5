"""Which build the other verbs use: the last one requested, whatever its backend."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_project import TINY

from apex_build.native.toolset import find_toolset
from apex_build.source.pins import Pin, load_pin
from apex_build.toolchain.backends import BACKENDS, Backend
from apex_build.toolchain.build.cache import all_builds
from apex_build.toolchain.build.run import build, build_cpu, ensure_tools, plan_build

pytestmark = pytest.mark.slow  # compiles

GPU = Backend("cuda", {"MARK": "1"}, TINY.targets)  # any other backend will do


@pytest.fixture
def pin(monkeypatch: pytest.MonkeyPatch) -> Pin:
    monkeypatch.setitem(BACKENDS, "cpu", Backend("cpu", {}, TINY.targets))
    return load_pin()


def in_use() -> list[str]:
    return [str(item.manifest["backend"]) for item in all_builds() if item.current]


def test_the_build_that_was_last_asked_for(source: Path, pin: Pin) -> None:
    gpu = build(plan_build(source, GPU, pin)).toolset
    assert find_toolset() == gpu
    cpu = build(plan_build(source, BACKENDS["cpu"], pin)).toolset
    assert find_toolset() == cpu
    assert in_use() == ["cpu"]
    assert build(plan_build(source, GPU, pin)).reused
    assert find_toolset() == gpu
    assert in_use() == ["cuda"]


def test_what_only_needs_some_tools_leaves_the_gpus_build_in_use(source: Path, pin: Pin) -> None:
    cpu = build_cpu(source, pin)
    assert find_toolset() == cpu  # there is no other
    gpu = build(plan_build(source, GPU, pin)).toolset
    assert build_cpu(source, pin) == cpu
    assert find_toolset() == gpu
    assert ensure_tools(source, pin) == gpu
    (source / "part.cpp").write_text("int part() { return 50; }\n")
    assert ensure_tools(source, pin).manifest["backend"] == "cpu"  # that of the GPU is of another source
    assert find_toolset() == gpu


def test_tools_that_are_named(source: Path, pin: Pin, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = build(plan_build(source, GPU, pin)).toolset
    build_cpu(source, pin)
    (source / "part.cpp").write_text("int part() { return 50; }\n")
    monkeypatch.setenv("APEX_TOOLS", str(gpu.root))
    assert ensure_tools(source, pin) == gpu
