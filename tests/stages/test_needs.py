"""What `apex plan --hardware` predicts for each step, compared with what the tools use."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from apex_build.errors import GpuUnknown
from apex_build.gguf_model.model import read_model
from apex_build.native.server import serve
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins
from apex_build.stages.given import Workplace
from apex_build.stages.machines import Machine, machine
from apex_build.stages.needs import Need, needs
from apex_build.stages.plan import PlanOptions, plan

_CLOSE = 0.15
AMPLE = Machine("ample", 1 << 50, 1 << 50)


@pytest.fixture(scope="module")
def place(tools: Toolset) -> Workplace:
    return Workplace(load_plugins(), toolset=tools)


@pytest.fixture(scope="module")
def needed(testbed: Path, place: Workplace) -> dict[str, Need]:
    return _needs(testbed, place, AMPLE)


def _needs(path: Path, place: Workplace, asked: Machine, context: int = 4096) -> dict[str, Need]:
    planned = plan(path, PlanOptions("uniform", {"type": "Q4_K"}), place=place)
    return {need.step: need for need in needs(planned.plan, planned.model, place, asked, context=context)}


# ru_maxrss includes the peak of the process that started the program: a Python that has imported nothing is small.
_MEASURED = """
import os, sys
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
with open("peak", "w") as file:
    print(usage.ru_maxrss, file=file)
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


def _peak(command: Sequence[str | Path], folder: Path) -> int:
    """Peak memory of a program that ends, in bytes, including mapped files."""
    measured = [sys.executable, "-I", "-S", "-c", _MEASURED, *map(str, command)]
    ran = subprocess.run(measured, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert ran.returncode == 0, ran.stdout.decode(errors="replace")
    return int((folder / "peak").read_text()) << 10


def _high_water(pid: int) -> int:
    """Peak memory of a process so far, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) << 10


def test_calibration(testbed: Path, tools: Toolset, needed: dict[str, Need], heldout: Path, tmp_path: Path) -> None:
    command: list[str | Path] = [
        tools.tool("llama-imatrix"),
        "-m",
        testbed,
        "-c",
        "512",
        "-b",
        "512",
        "--mtp",
        "--parse-special",
    ]
    peak = _peak([*command, "-f", heldout / "code.txt", "--chunks", "3", "-t", "1", "-o", "imatrix.gguf"], tmp_path)
    assert needed["calibrate"].memory == pytest.approx(peak, rel=_CLOSE)
    assert 4 * (tmp_path / "imatrix.gguf").stat().st_size == pytest.approx(needed["calibrate"].disk, rel=1.0)


def test_quantization(testbed: Path, tools: Toolset, needed: dict[str, Need], tmp_path: Path) -> None:
    peak = _peak([tools.tool("llama-quantize"), "--pure", testbed, "out.gguf", "Q4_K", "1"], tmp_path)
    assert needed["quantize"].memory == pytest.approx(peak, rel=_CLOSE)
    assert (tmp_path / "out.gguf").stat().st_size == pytest.approx(needed["quantize"].disk, rel=0.05)


def test_evaluation(testbed: Path, tools: Toolset, needed: dict[str, Need], heldout: Path, tmp_path: Path) -> None:
    command: list[str | Path] = [
        tools.tool("llama-perplexity"),
        "-m",
        testbed,
        "-c",
        "512",
        "-f",
        heldout / "code.txt",
        "--chunks",
        "8",
        "-t",
        "1",
    ]
    peak = _peak([*command, "--kl-divergence-base", "base.logits"], tmp_path)
    assert needed["evaluate"].memory == pytest.approx(peak, rel=_CLOSE)


def test_a_server(testbed: Path, tools: Toolset, place: Workplace, heldout: Path, tmp_path: Path) -> None:
    """With a full context: allocated buffers that are never used take no memory."""
    context = 8192
    arguments = ["--ctx-size", str(context), "--parallel", "1", "--threads", "1", "--cache-ram", "0"]
    arguments += ["--spec-type", "draft-mtp", "--spec-draft-n-max", "2"]
    with serve(tools, testbed, arguments=arguments) as server:
        text = (heldout / "code.txt").read_text()[:context]  # a token is a character at the least
        server.completion(text, n_predict=24)
        peak = _high_water(server.process.pid)
    planned = plan(testbed, PlanOptions("uniform", {"type": "F16"}), place=place)
    found = needs(planned.plan, planned.model, place, AMPLE, context=context)[-1]
    assert found.step == "run"
    assert found.memory == pytest.approx(peak, rel=_CLOSE)


def test_what_does_not_fit_is_said(testbed: Path, place: Workplace) -> None:
    small = Machine("small", 1 << 50, 32 << 20)
    found = _needs(testbed, place, small)
    assert not found["evaluate"].fits and "EVALUATOR.chunks=N" in str(found["evaluate"].advice)
    tight = _needs(testbed, place, replace(AMPLE, memory=60 << 20))
    assert (
        tight["calibrate"].fits
        and "slow" in str(tight["calibrate"].advice)
        and "Q8_0" in str(tight["calibrate"].advice)
    )
    assert tight["quantize"].fits and not tight["quantize"].advice
    assert not _needs(testbed, place, replace(AMPLE, memory=8 << 20))["calibrate"].fits


def test_layers_that_a_gpu_holds(testbed: Path, place: Workplace, needed: dict[str, Need]) -> None:
    run = needed["run"]
    half = replace(AMPLE, gpu=run.own + run.mapped // 4)
    assert "--gpu-layers 4" in str(_needs(testbed, place, half)["run"].advice)
    assert "--gpu-layers 0" in str(_needs(testbed, place, replace(AMPLE, gpu=run.own // 2))["run"].advice)
    shared = replace(half, shared=True)
    assert not _needs(testbed, place, shared)["run"].advice


def test_machines(tmp_path: Path) -> None:
    plugins = load_plugins()
    spark = machine(plugins, tmp_path, gpu="dgx-spark", disk=10)
    assert (spark.shared, spark.disk, spark.here) == (True, 10, False) and spark.memory == spark.gpu
    card = machine(plugins, tmp_path, gpu="RTX 5090", memory=64 << 30)
    assert (card.memory, card.gpu, card.shared, card.here) == (64 << 30, 32 << 30, False, True)
    assert machine(plugins, tmp_path).disk == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.01)
    with pytest.raises(GpuUnknown):
        machine(plugins, tmp_path, gpu="voodoo2")


def test_the_model_takes_disk_of_another_machine(testbed: Path, place: Workplace) -> None:
    model = read_model(testbed, place.plugins.role_of)
    size = sum(tensor.n_bytes for tensor in model.tensors)
    here = replace(AMPLE, disk=size + (2 << 20), here=True)
    assert _needs(testbed, place, here)["quantize"].fits
    assert not _needs(testbed, place, replace(here, here=False))["quantize"].fits
