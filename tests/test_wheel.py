"""The package as a wheel, installed away from the checkout: it includes its data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from apex_build.native.toolset import Toolset

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the content of the wheel. Its dependencies come from the environment of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, cwd=folder)
    (wheel,) = folder.glob("apex_build-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def apex(installed: Path, tmp_path: Path, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), "XDG_DATA_HOME": str(tmp_path / "data")}
    command = [sys.executable, "-m", "apex_build", *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_the_wheel_holds_the_data_and_nothing_else_of_the_checkout(installed: Path) -> None:
    names = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    for wanted in (
        "vendor/pr-22673.toml",
        "patches/llama.cpp/pr-22673/series",
        "plugins/apex/plugin.py",
        "calibration_sets/default.toml",
    ):
        assert f"apex_build/data/{wanted}" in names
    assert not [name for name in names if "testbed" in name or name.endswith((".gguf", ".pyc"))]
    assert {name.split("/")[0] for name in names if not name.startswith("apex_build-")} == {"apex_build"}


@pytest.mark.slow
def test_it_works_outside_the_checkout(installed: Path, tmp_path: Path, tools: Toolset, testbed: Path) -> None:
    assert "i-nano" in apex(installed, tmp_path, "policies")
    planned = apex(installed, tmp_path, "plan", testbed, "--policy", "compact", "--tools", tools.root, "--json")
    assert json.loads(planned)["policy"] == "compact"
    text = json.loads(apex(installed, tmp_path, "calibrate", testbed, "--tools", tools.root, "--dry-run", "--json"))[
        "text"
    ]
    assert {part["domain"] for part in text["parts"]} == {"chat", "reasoning", "tool-calling", "code"}
    apex(
        installed,
        tmp_path,
        "quantize",
        testbed,
        "--policy",
        "compact",
        "--tools",
        tools.root,
        "-o",
        tmp_path / "x.gguf",
    )
    assert (tmp_path / "x.gguf").stat().st_size > 8_000_000
    status = json.loads(apex(installed, tmp_path, "source", "status", "--json"))
    assert str(tmp_path / "data") in json.dumps(status), "trees go to the user's data folder, not into the package"
