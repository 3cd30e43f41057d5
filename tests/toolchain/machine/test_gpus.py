"""GPU names and architectures, and possible outputs of nvidia-smi."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from apex_runs import run_apex
from click.testing import CliRunner
from fake_programs import nvidia_smi, script, without_nvidia_smi

from apex_build.cli import apex
from apex_build.errors import GpuUnknown, PluginFailed
from apex_build.hookspecs import GpuTarget
from apex_build.plugins import Plugins, load_plugins
from apex_build.toolchain.machine import gpus
from apex_build.toolchain.machine.gpus import (
    FoundGpu,
    architectures,
    capability_number,
    dropped_by,
    resolve,
    runs_on,
    survey_gpus,
    targets_of,
)


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return load_plugins()


def asked(plugins: Plugins, *names: str) -> list[str]:
    return [target.architecture for target in resolve(names, plugins)]


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("dgx-spark", "121a-real"),
        ("rtx5090", "120a-real"),
        ("b200", "100a-real"),
        ("h100", "90a-real"),
        ("h200", "90a-real"),
        ("rtx4090", "89-real"),
        ("l40s", "89-real"),
        ("rtx3090", "86-real"),
        ("a6000", "86-real"),
        ("a100", "80-real"),
        ("RTX 4090", "89-real"),  # however it is spelt
        ("DGX_Spark", "121a-real"),
        ("gb10", "121a-real"),  # as nvidia-smi calls it
        ("NVIDIA GB10", "121a-real"),
        ("NVIDIA Thor", "110a-real"),
        ("NVIDIA GeForce RTX 5060 Ti", "120a-real"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "89-real"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "120a-real"),
        ("NVIDIA H100 80GB HBM3", "90a-real"),
        ("NVIDIA H100 NVL", "90a-real"),
        ("NVIDIA GH200 480GB", "90a-real"),
        ("NVIDIA A100-SXM4-80GB", "80-real"),
        ("NVIDIA L40", "89-real"),
        ("NVIDIA RTX 6000 Ada Generation", "89-real"),
        ("NVIDIA B300 SXM6 AC", "103a-real"),
        ("NVIDIA GB300", "103a-real"),
        ("Orin (nvgpu)", "87-real"),
        ("jetson-orin", "87-real"),
        ("Tesla V100-SXM2-32GB", "70-real"),
        ("Tesla T4", "75-real"),
        ("5060ti", "120a-real"),
        ("2080ti", "75-real"),
        ("GTX 1080 Ti", "61-real"),
        ("rtx3070", "86-real"),
        ("sm_120", "120a-real"),  # as llama.cpp's CMakeLists.txt makes of it
        ("120a", "120a-real"),
        ("90", "90-real"),
        ("sm_90a", "90a-real"),
        ("compute_90", "90-virtual"),
        ("86-virtual", "86-virtual"),
        ("100f", "100f-real"),
        ("8.9", "89-real"),
        ("12.1", "121a-real"),
        ("9.0", "90a-real"),
        ("sm_130", "130-real"),  # not known here yet: the compiler will say
    ],
)
def test_names_and_architectures(plugins: Plugins, name: str, architecture: str) -> None:
    assert asked(plugins, name) == [architecture]


def test_several_names_in_one_string(plugins: Plugins) -> None:
    assert asked(plugins, "dgx-spark h100") == ["121a-real", "90a-real"]
    assert asked(plugins, "gb10 2080ti") == ["121a-real", "75-real"]
    assert asked(plugins, "RTX 4090, h100 h100", "8.9") == ["89-real", "90a-real", "89-real"]
    assert architectures(resolve(["h100 h200 rtx3090"], plugins)) == ("86-real", "90a-real")


def test_a_group_has_each_architecture_once(plugins: Plugins) -> None:
    common = resolve(["all-common"], plugins)
    assert len(architectures(common)) == len(common) >= 8
    assert {"dgx-spark", "h100", "rtx4090"} <= {target.name for target in common}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dgx-sprak", "there is no GPU 'dgx-sprak'; near it: dgx-spark"),
        ("rtx409", "near it: rtx4090"),
        ("all", "near it: all-common"),
        ("h100;rm", "near it: h100"),
        ("zzz", "there is no GPU 'zzz'$"),
        ("sm_92", "no CUDA architecture 'sm_92'; near it: sm_90, sm_89, sm_88"),
        ("9.9", "no CUDA architecture '9.9'"),
        ("89a", "only sm_90 and newer have a variant 'a'"),
        ("90f", "only sm_100 and newer have a variant 'f'"),
        ("", "no GPU was named"),
        (" , ", "no GPU was named"),
        ("h\x1b[31m100", "there is no GPU"),
    ],
)
def test_unknown_names(plugins: Plugins, name: str, says: str) -> None:
    with pytest.raises(GpuUnknown, match=says) as caught:
        resolve([name], plugins)
    assert caught.value.hint
    assert "\x1b" not in caught.value.message


def test_an_unknown_name_on_the_command_line(tmp_path: Path) -> None:
    """Before anything is fetched or written."""
    ran = run_apex("build", "--gpu", "dgx-sprak", code=25)
    assert "error: there is no GPU 'dgx-sprak'; near it: dgx-spark" in ran.stderr
    assert "try:   apex build --list-gpus" in ran.stderr
    assert not (tmp_path / "the cache, größer").exists()


def test_what_the_built_in_targets_promise(plugins: Plugins) -> None:
    """The table of the plugin and the one for bare architectures agree."""
    for target in plugins.gpu_targets().values():
        (bare,) = resolve([target.architecture], plugins)
        assert (bare.architecture, bare.minimum_cuda) == (target.architecture, target.minimum_cuda)
        assert 8 <= target.memory_gib <= 300
        assert (dropped_by(target.architecture) is None) == ("CUDA 12 is the last" not in target.description)
        for alias in target.aliases:  # none is another target's name
            assert resolve([alias], plugins) == (target,), alias
    assert dropped_by("70-real") == "13.0"
    assert capability_number("121a-real") == 121
    with pytest.raises(GpuUnknown):
        capability_number("native")


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("121a-real", "12.1", True),
        ("121a-real", "12.0", False),
        ("120a-real", "12.1", False),
        ("90a-real", "9.0", True),
        ("90-real", "9.0", True),
        ("80-real", "8.6", True),
        ("86-real", "8.0", False),
        ("89-real", "9.0", False),
        ("89-virtual", "12.1", True),
        ("89", "9.0", True),
        ("90a-virtual", "10.0", False),
        ("100f-real", "10.3", True),
        ("100f-real", "12.0", False),
        ("sunshine", "9.0", False),
    ],
)
def test_what_runs_on_what(architecture: str, capability: str, runs: bool) -> None:
    assert runs_on(architecture, capability) is runs


def test_a_plugins_own_gpu(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    text = "from apex_build.hookspecs import GpuTarget, hookimpl\n@hookimpl\ndef apex_gpu_targets(): return "
    (tmp_path / "mine" / "plugin.py").write_text(
        text + "[GpuTarget('abacus', '89-real', 1, 'beads', '11.8', ('wooden',))]\n"
    )
    plugins = load_plugins([tmp_path / "mine"])
    assert (
        resolve(["abacus"], plugins)
        == resolve(["wooden"], plugins)
        == (GpuTarget("abacus", "89-real", 1, "beads", "11.8", ("wooden",)),)
    )
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "plugin.py").write_text(text + "['h100']\n")
    with pytest.raises(PluginFailed, match=r"plugin 'bad': apex_gpu_targets\(\) must give a list of GpuTarget"):
        resolve(["h100"], load_plugins([tmp_path / "bad"]))


def test_list_gpus() -> None:
    said = CliRunner().invoke(apex, ["build", "--list-gpus"]).stdout
    assert "dgx-spark" in said and "121a-real" in said and "all-common: dgx-spark, " in said
    listed = json.loads(CliRunner().invoke(apex, ["build", "--list-gpus", "--json"]).stdout)
    assert {"name": "h100", "architecture": "90a-real", "memory_gib": 80, "minimum_cuda": "12.0"}.items() <= {
        key: value for item in listed if item["name"] == "h100" for key, value in item.items()
    }.items()


def test_a_dgx_spark(plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its GPU has no separate memory."""
    nvidia_smi(tmp_path / "bin", monkeypatch, ["NVIDIA GB10, 12.1, [N/A], 580.95.05"])
    assert survey_gpus().gpus == (FoundGpu("NVIDIA GB10", "12.1", None, "580.95.05"),)
    (target,) = targets_of(survey_gpus().gpus, plugins)
    assert (target.name, target.architecture, target.memory_gib) == ("dgx-spark", "121a-real", 120)


def test_several_gpus_and_which_targets_serve_them(
    plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (
        "NVIDIA GeForce RTX 4090",
        "NVIDIA L40",
        "NVIDIA H100 80GB HBM3",
        "NVIDIA RTX A4000",
        "NVIDIA A100-SXM4-80GB",
        "Odd, Name",
    )
    capabilities = ("8.9", "8.9", "9.0", "8.6", "8.0", "13.0")
    lines = [f"{name}, {capability}, 24564, 570.1" for name, capability in zip(names, capabilities, strict=True)]
    nvidia_smi(tmp_path / "bin", monkeypatch, lines)
    found = survey_gpus().gpus
    assert [gpu.name for gpu in found] == list(names)
    targets = targets_of(found, plugins)
    assert [target.name for target in targets] == ["rtx4090", "h100", "sm_86", "a100", "sm_130a"]
    assert [target.memory_gib for target in targets] == [24.0] * 5


@pytest.mark.parametrize(
    ("lines", "code", "reason"),
    [
        (
            ["NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver."],
            9,
            "code 9: NVIDIA-SMI has failed because",
        ),
        (["No devices were found"], 6, "code 6: No devices were found"),
        (['Field "compute_cap" is not a valid field to query.'], 2, "code 2: Field"),
        ([], 0, "lists no GPU"),
        ([], 1, "code 1: without output"),
        (["NVIDIA GB10, 12.1, 580.95.05"], 0, "not understood: 'NVIDIA GB10, 12.1, 580.95.05'"),
        (["NVIDIA H100, 9.0, 81559, 580.1", "what?"], 0, r"not understood: 'what\?'"),
        (["NVIDIA H100, 9.0, eighty, 580.1"], 0, "not understood"),
    ],
)
def test_a_driver_that_does_not_answer(
    lines: list[str], code: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path / "bin", monkeypatch, lines, code)
    survey = survey_gpus()
    assert survey.gpus == ()
    assert re.search(reason, survey.reason), survey.reason


def test_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_WSL", str(tmp_path / "wsl"))
    without_nvidia_smi(tmp_path / "bin", monkeypatch)
    assert survey_gpus().reason == "there is no nvidia-smi in PATH, so no NVIDIA driver"
    script(tmp_path / "wsl" / "nvidia-smi", "echo 'NVIDIA GeForce RTX 3090, 8.6, 24576, 581.2'")
    assert [gpu.architecture for gpu in survey_gpus().gpus] == ["86-real"]
