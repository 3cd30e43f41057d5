"""`apex doctor` on machines that have everything, half of it, or nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from apex_runs import run_apex
from click.testing import CliRunner
from fake_programs import nvidia_smi, script, toolkit, without_nvidia_smi
from tiny_project import TINY

from apex_build.cli import apex
from apex_build.storage.sizes import folder_size
from apex_build.toolchain.build.run import build, plan_build
from apex_build.toolchain.doctor import feasibility
from apex_build.toolchain.doctor.host import compilers_in_path
from apex_build.toolchain.machine import gpus
from apex_build.toolchain.machine.cpu import cpu_flags


@pytest.fixture(autouse=True)
def no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APEX_SOURCE_DIR", str(tmp_path / "sources"))
    monkeypatch.setattr(gpus, "_WSL", str(tmp_path / "no-wsl"))


def doctor() -> dict[str, Any]:
    ran = CliRunner().invoke(apex, ["doctor", "--json"], catch_exceptions=False)
    assert ran.exit_code == 0
    value: dict[str, Any] = json.loads(ran.stdout)
    return value


def said() -> str:
    """All of its text in one line, regardless of table layout."""
    ran = CliRunner().invoke(apex, ["doctor"], catch_exceptions=False)
    assert ran.exit_code == 0
    return " ".join(ran.stdout.split())


def judged(told: dict[str, Any], root: Path) -> dict[str, Any]:
    (found,) = (item for item in told["cuda_toolkits"] if item["root"] == str(root))
    return dict(found)


def test_this_machine(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_nvidia_smi(tmp_path / "bin", monkeypatch)
    told = doctor()
    assert told["machine"]["compiler"]["kind"] in ("GNU", "Clang")
    assert told["machine"]["cpus"] >= 1 and told["machine"]["memory"] > told["machine"]["memory_available"] > 0
    assert all(told["machine"]["tools"][name] for name in ("cmake", "ninja", "git"))
    assert {disk["what"] for disk in told["machine"]["disks"]} == {"cache", "current folder"}
    assert told["gpus"] == [] and told["no_gpus"] == "there is no nvidia-smi in PATH, so no NVIDIA driver"
    cpu, cuda = told["could_be_built"]
    assert cpu["name"] == "cpu" and cpu["possible"] and cpu["minutes"] > 0 and not cpu["cached"]
    assert any("the source is fetched first" in note for note in cpu["notes"])
    assert cuda["command"] == "apex build --gpu dgx-spark" and cuda["minutes"] > cpu["minutes"]
    text = said()
    assert "GPUs: none (there is no nvidia-smi in PATH" in text
    assert "builds in the cache: none" in text
    assert not cache.exists()


def test_an_nvcc_without_cublas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = toolkit(tmp_path / "cuda", without=["include/cublas_v2.h", "lib64/libcublas.so", "lib64/libcublasLt.so"])
    monkeypatch.setenv("CUDA_HOME", str(root))
    told = doctor()
    found = judged(told, root)
    assert found["version"] == "13.0.88"
    assert found["missing"] == ["cuBLAS headers", "cuBLAS", "cuBLASLt"]
    assert found["host_compilers"] == {"GNU": 15}
    (note,) = (note for note in told["could_be_built"][1]["notes"] if str(root) in note)
    assert note.startswith(
        f"not used: {root} is an incomplete CUDA toolkit (missing: cuBLAS headers, cuBLAS, cuBLASLt; there: nvcc,"
    )
    assert "cuBLAS headers, cuBLAS, cuBLASLt" in said()


@pytest.mark.parametrize(
    ("without", "missing"),
    [
        (["bin/nvcc"], "nvcc"),
        (["nvvm/bin/cicc"], "cicc"),
        (["include/cuda_runtime.h"], "CUDA runtime headers"),
        (["lib64/libcudart.so"], "CUDA runtime"),
        (["include/crt/host_config.h"], "compiler headers"),
    ],
)
def test_half_a_toolkit(without: list[str], missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = toolkit(tmp_path / "cuda", without=without)
    monkeypatch.setenv("CUDA_HOME", str(root))
    assert judged(doctor(), root)["missing"] == [missing]


def test_a_whole_toolkit_is_the_one_to_build_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(root))
    told = doctor()
    assert judged(told, root)["missing"] == []
    assert f"CUDA 13.0.88 in {root}" in told["could_be_built"][1]["notes"]
    assert "nothing: it is complete" in said()


def test_a_toolkit_that_is_too_old_for_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_nvidia_smi(tmp_path / "bin", monkeypatch)
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda", version="12.4.131")))
    notes = doctor()["could_be_built"][1]["notes"]
    assert any("dgx-spark (121a-real) needs CUDA 12.9 or newer" in note for note in notes)


def test_gpus_with_an_old_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda")))
    nvidia_smi(
        tmp_path / "bin",
        monkeypatch,
        ["NVIDIA GeForce RTX 4090, 8.9, 24564, 550.54.14", "NVIDIA GB10, 12.1, [N/A], 550.54.14"],
    )
    told = doctor()
    assert [gpu["architecture"] for gpu in told["gpus"]] == ["89-real", "121a-real"]
    cuda = told["could_be_built"][1]
    assert cuda["command"] == "apex build"
    assert any("need driver 580 or newer; this is 550.54.14" in note for note in cuda["notes"])
    one = feasibility._CPU_MINUTES + 2 * feasibility._CUDA_MINUTES
    assert cuda["minutes"] == pytest.approx(one * told["could_be_built"][0]["minutes"] / feasibility._CPU_MINUTES)
    assert "NVIDIA GB10" in said()


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "bin" / "apt-get", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    told = doctor()
    assert told["machine"]["compiler"] is None
    assert "no C++ compiler was found" in told["machine"]["compiler_error"]
    for item in told["could_be_built"]:
        assert (
            not item["possible"]
            and "no C++ compiler was found" in item["why_not"]
            and "apt-get install g++" in item["hint"]
        )
    assert "no C++ compiler was found" in said()


def test_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feasibility, "WORK_SIZE", 1 << 60)
    (cpu, _) = doctor()["could_be_built"]
    assert not cpu["possible"] and "GB are free" in cpu["why_not"] and "APEX_CACHE_DIR" in cpu["hint"]


def test_the_compilers_in_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    for name, line in {
        "g++-16": "g++-16 (Ubuntu 16.1.0-6ubuntu2~26.04) 16.1.0",
        "clang++": "Debian clang version 14.0.6",
        "c++": "something of its own",
        "x86_64-linux-gnu-g++": "not asked",
    }.items():
        script(folder / name, f"echo '{line}'; echo more")
    (folder / "g++").symlink_to("g++-16")
    monkeypatch.setenv("PATH", str(folder))
    assert [(item.path.name, item.kind, item.version) for item in compilers_in_path()] == [
        ("c++", "", ""),
        ("clang++", "Clang", "14.0.6"),
        ("g++", "GNU", "16.1.0"),
    ]
    text = said()
    assert "GNU 16.1.0; nvcc 13.0.88 rejects it: newest accepted is 15" in text
    assert "Clang 14.0.6; nvcc 13.0.88 accepts it" in text


def test_builds_in_the_cache_and_a_damaged_one(source: Path, cache: Path) -> None:
    good = build(plan_build(source, TINY)).toolset
    (source / "part.cpp").write_text("int part() { return 50; }\n")
    bad = build(plan_build(source, TINY)).toolset
    bad.tool("tool").unlink()
    told = doctor()
    assert {item["key"]: item["damaged"] for item in told["builds"]} == {good.root.name: False, bad.root.name: True}
    assert told["builds"][0]["size"] == folder_size(good.root) > 10_000
    assert told["cache"]["builds"] >= told["builds"][0]["size"]
    assert "damaged: not used" in said()


def test_a_file_of_two_names_counts_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(bytes(1 << 20))
    once = folder_size(tmp_path)
    (tmp_path / "b").mkdir()
    os.link(tmp_path / "a" / "file", tmp_path / "b" / "file")
    assert folder_size(tmp_path) == once >= 1 << 20


@pytest.mark.slow
def test_a_plugin_that_fails_does_not_silence_it(tmp_path: Path) -> None:
    info = tmp_path / "packages" / "broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[apex_build]\nbroken = nothing_like_it\n")
    ran = run_apex("doctor", env={**os.environ, "PYTHONPATH": str(tmp_path / "packages")})
    assert "warning: plugin 'broken' (package broken): ModuleNotFoundError" in ran.stderr
    assert "This machine" in ran.stdout and "What can be built here" in ran.stdout


def test_the_cpus_instruction_sets() -> None:
    flags = cpu_flags()
    assert flags and not flags & {"fpu", "hypervisor", "syscall"}
