"""Plugins of each kind, made and used from the installed wheel in a fresh environment, away from the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from apex_build.cli.plugins import KINDS

ROOT = Path(__file__).parents[2]


class Installed:
    """A fresh environment with the wheel; its dependencies come from the environment of the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        (site / "of_the_tests.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
        self.run("pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
        (wheel,) = folder.glob("apex_build-*.whl")
        self.run("pip", "install", "--quiet", "--no-deps", "--ignore-installed", wheel)

    def run(self, module: str, *arguments: object) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"APEX_CACHE_DIR": str(self.folder / "cache"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        command = [str(self.python), "-m", module, *map(str, arguments)]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, env=environment)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def apex(self, *arguments: object) -> str:
        return self.run("apex_build", *arguments)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"))


@pytest.mark.slow
@pytest.mark.network
def test_each_kind_is_made_tested_installed_and_used(installed: Installed) -> None:
    name = {kind: f"my-{kind}" for kind in KINDS}
    for kind in KINDS:
        installed.apex("plugins", "new", kind, name[kind])
        assert "good, made for plugin API version" in installed.apex("plugins", "check", name[kind])
        assert "1 passed" in installed.run("pytest", "-q", name[kind])
        package = name[kind].replace("-", "_")
        listed = json.loads(
            installed.apex("plugins", "list", "--plugin", installed.folder / name[kind] / package, "--json")
        )
        assert [one[KINDS[kind]] != [] for one in listed["plugins"] if one["name"] == package] == [True]
    installed.run("pip", "install", "--quiet", "--no-deps", *(f"./{one}" for one in name.values()))
    found = {one["name"]: one for one in json.loads(installed.apex("plugins", "list", "--json"))["plugins"]}
    for kind in KINDS:
        assert found[name[kind]]["origin"] == f"package {name[kind]}" and found[name[kind]][KINDS[kind]]
    assert name["policy"] in installed.apex("policies", name["policy"], "--json")
    assert name["evaluator"] in installed.apex("evaluate", "--list", "--json")
    assert name["gpu"] in installed.apex("build", "--list-gpus", "--json")
    assert installed.apex(name["command"], "hello") == "HELLO\n"
