"""`apex build` and its output, with the tiny project and with the shared tools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_project import TINY

from apex_build.cli import apex
from apex_build.native.toolset import Toolset
from apex_build.source.pins import load_pin
from apex_build.toolchain.backends import BACKENDS, TOOLS
from apex_build.toolchain.build import cache as build_cache
from apex_build.toolchain.build.run import build, plan_build
from apex_build.toolchain.machine.gpus import survey_gpus

pytestmark = pytest.mark.slow  # compiles


@pytest.fixture
def as_default(source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The verb, with the tiny project instead of the default pin's tree."""
    for name in ("ensure_source", "require_tree"):
        monkeypatch.setattr(f"apex_build.cli.build.{name}", lambda *_: source)
    monkeypatch.setitem(BACKENDS, "cpu", TINY.__class__("cpu", {}, TINY.targets))
    return source


def test_build_list_verify(as_default: Path, cache: Path) -> None:
    run = CliRunner().invoke
    assert run(apex, ["build", "--list"]).output == "nothing has been built yet; apex build builds the tools\n"
    planned = json.loads(run(apex, ["build", "--backend", "cpu", "--dry-run", "--json"]).stdout)
    assert not planned["cached"]
    assert not (cache / "builds").exists()

    first = run(apex, ["build", "--backend", "cpu", "--jobs", "1"])
    assert first.exit_code == 0
    assert ": built in " in first.stdout
    again = json.loads(run(apex, ["build", "--backend", "cpu", "--json"]).stdout)
    assert again["reused"]
    assert again["key"] == planned["key"]
    assert "in the cache" in run(apex, ["build", "--backend", "cpu", "--dry-run"]).stdout
    assert run(apex, ["build", "--verify"]).stdout.startswith("4 files of ")
    (listed,) = json.loads(run(apex, ["build", "--list", "--json"]).stdout)
    assert listed["current"]
    assert listed["pin"]["name"] == load_pin().name
    assert planned["key"] in run(apex, ["build", "--list"]).stdout


def test_another_pin_is_built_but_does_not_become_the_current_one(as_default: Path) -> None:
    run = CliRunner().invoke
    run(apex, ["build", "--backend", "cpu"])
    done = run(apex, ["build", "--backend", "cpu", "--pin", "latest"])
    assert done.exit_code == 0
    assert "to use these tools: APEX_PIN=latest" in done.stdout
    listed = json.loads(run(apex, ["build", "--list", "--json"]).stdout)
    assert {item["pin"]["name"]: item["current"] for item in listed} == {"pr-22673": True, "latest": False}


def test_no_source_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("APEX_SOURCE_DIR", str(tmp_path / "sources"))
    done = CliRunner().invoke(apex, ["build", "--backend", "cpu", "--dry-run"])
    assert done.exit_code == 0
    assert "would be fetched first" in done.stdout
    assert (
        json.loads(CliRunner().invoke(apex, ["build", "--backend", "cpu", "--dry-run", "--json"]).stdout)["source"]
        is None
    )


def test_cuda_without_a_gpu_and_without_a_name() -> None:
    if survey_gpus().gpus:
        pytest.skip("this machine has a GPU")
    done = CliRunner().invoke(apex, ["build", "--backend", "cuda", "--dry-run"])
    assert done.exit_code == 2
    assert "name one with --gpu" in done.stderr


def test_nothing_of_a_build_may_reach_the_network() -> None:
    options = BACKENDS["cpu"].cmake_options(native=True)
    for name in ("LLAMA_BUILD_UI", "LLAMA_USE_PREBUILT_UI", "LLAMA_OPENSSL", "LLAMA_LLGUIDANCE", "LLAMA_BUILD_TESTS"):
        assert options[name] == "OFF"


def test_the_real_tools(tools: Toolset) -> None:
    for name in TOOLS:
        assert tools.tool(name).is_file()
    assert tools.library("ggml-base").is_file()
    assert tools.library("llama").is_file()
    if tools.manifest:
        assert build_cache.verify(tools) >= len(TOOLS) + 2
        assert tools.manifest["pin"]["name"] == load_pin().name
        assert tools.manifest["ggml_type_count"] > 40
        assert tools.manifest["patches"] or not list((load_pin().patches_folder).glob("*.patch"))


def test_a_build_without_a_pin_is_nobodys_current_one(source: Path, cache: Path) -> None:
    build(plan_build(source, TINY))
    assert not list((cache / "builds").glob("current-*"))
