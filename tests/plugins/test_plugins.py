"""Plugins: from a folder, from an installed package, and who is blamed for their errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from apex_build.errors import CalibrationSetInvalid, PluginFailed, PolicyUnknown
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins

# 'i-nano, but the head at IQ2_XXS', with a parameter of its own, and roles of an architecture of its own
PLUGIN = """
from pathlib import Path
from apex_build.hookspecs import Document, Parameter, PolicySpec, Source, hookimpl
from .tables import ROLES

@hookimpl
def apex_policies():
    parameters = {"draft_head": Parameter("IQ2_XXS"), "edge": Parameter(1, "int")}
    return [PolicySpec("low-head", Path(__file__).with_name("low-head.jinja"), "IQ2_XXS", True, parameters)]

@hookimpl
def apex_tensor_roles(architecture):
    return ROLES.get if architecture == "strange" else None

@hookimpl
def apex_calibration_sources():
    return [Source("mine", lambda options, folder: iter([Document("chat", text=options["text"] + folder.name)]))]
"""
TEMPLATE = """{% set near = 1 %}
{% set attention_edge = 1 %}
{% extends "apex/i-nano.jinja" %}
"""


def folder(where: Path, name: str, plugin: str = PLUGIN, **templates: str) -> Path:
    made = where / name
    made.mkdir(parents=True)
    (made / "plugin.py").write_text(plugin)
    (made / "tables.py").write_text('ROLES = {"core.weight": "routed"}\n')
    for template, text in (templates or {"low-head": TEMPLATE}).items():
        (made / f"{template}.jinja").write_text(text)
    return made


def wheel(where: Path, plugin: Path, name: str = "apex-low-head") -> Path:
    """A hand-made wheel of a package with the plugin's files: this needs no build tool and no network."""
    package = name.replace("-", "_")
    path = where / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in plugin.iterdir():
            if file.is_file():
                archive.write(file, f"{package}/{'__init__.py' if file.name == 'plugin.py' else file.name}")
        info = f"{package}-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/entry_points.txt", f"[apex_build]\nlow-head-plugin = {package}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def apex(tools: Toolset, *arguments: str | Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "APEX_TOOLS": str(tools.root)}
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", "apex_build", *map(str, arguments)], capture_output=True, text=True, env=environment
    )


def test_a_policy_from_a_folder_and_one_from_an_installed_package(
    tools: Toolset, testbed: Path, tmp_path: Path
) -> None:
    """Both are listed, take parameters, and extend a built-in template exactly like built-in ones."""
    mine = folder(tmp_path, "low-head-plugin")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", tmp_path / "installed", wheel(tmp_path, mine)], check=True, capture_output=True)
    as_folder: tuple[tuple[str | Path, ...], Path | None] = (("--plugin", mine), None)
    as_package: tuple[tuple[str | Path, ...], Path | None] = ((), tmp_path / "installed")
    plans = []
    for arguments, path in (as_folder, as_package):
        listed = json.loads(apex(tools, "policies", "low-head", "--json", *arguments, path=path).stdout)
        assert listed[0]["plugin"] == "low-head-plugin" and listed[0]["parameters"]["edge"]["default"] == 1
        ran = apex(
            tools, "plan", testbed, "--policy", "low-head", "--set", "draft_head=IQ1_M", "--json", *arguments, path=path
        )
        plans.append(json.loads(ran.stdout))
    small = ("--set", "edge=1", "--set", "near=1", "--set", "attention_edge=1", "--set", "draft_head=IQ1_M")
    built_in = json.loads(apex(tools, "plan", testbed, "--policy", "i-nano", *small, "--json").stdout)
    for plan in plans:
        assert (plan["identity"], plan["tensors"]) == (built_in["identity"], built_in["tensors"])
    assert apex(tools, "policies", "low-head").returncode == 60


def test_roles_and_sources_of_a_plugin(tmp_path: Path) -> None:
    plugins = load_plugins([folder(tmp_path, "mine")])
    assert plugins.role_of("strange", "core.weight") == "routed"
    assert (
        plugins.role_of("strange", "blk.0.attn_q.weight") == "attention"
    )  # not in its table: the built-in one is asked
    assert plugins.role_of("qwen35moe", "core.weight") is None
    (document,) = plugins.calibration_sources()["mine"].read({"text": "from "}, tmp_path / "here")
    assert document.text == "from here"


def test_the_same_folders_are_loaded_once(tmp_path: Path) -> None:
    mine = folder(tmp_path, "mine")
    assert load_plugins([mine]) is load_plugins([mine, mine]) is not load_plugins()
    assert load_plugins() is load_plugins()


def test_unknown_policy() -> None:
    with pytest.raises(PolicyUnknown, match=r"near it: i-nano"):
        load_plugins().policy("i-nanno")


@pytest.mark.parametrize(
    ("plugin", "says"),
    [
        ("x = (", "SyntaxError: .*plugin.py:1"),
        ("import nothing_like_it", "ModuleNotFoundError: .*plugin.py:1"),
        ("import sys\nsys.exit(3)", "SystemExit: 3, at .*plugin.py:2"),
        ("from apex_build.hookspecs import hookimpl\n@hookimpl\ndef apex_polices(): pass", "apex_polices"),
        ("from apex_build.hookspecs import hookimpl\n@hookimpl\ndef apex_policies(model): pass", "model"),
    ],
)
def test_a_plugin_that_cannot_be_loaded(tmp_path: Path, plugin: str, says: str) -> None:
    with pytest.raises(PluginFailed, match=f"(?s)plugin 'mine'.*{says}") as caught:
        load_plugins([folder(tmp_path, "mine", plugin)])
    assert caught.value.exit_code == 80


HOOK = """
from pathlib import Path
from apex_build.hookspecs import Parameter, PolicySpec, hookimpl
P, TEMPLATE = Parameter("Q4_K"), Path(__file__).with_name("low-head.jinja")
@hookimpl
def apex_policies():
"""


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("    return 1 / 0", r"ZeroDivisionError: division by zero, at .*plugin\.py:7"),
        ("    return ['i-nano']", r"must give a list of PolicySpec, not \['i-nano'\]"),
        ("    return None", "must give a list of PolicySpec, not None"),
        (
            "    return [PolicySpec('mine', Path('gone.jinja'), 'Q8_0')]",
            "the template of its policy 'mine' does not exist",
        ),
        ("    return [PolicySpec('mine', TEMPLATE, 'Q8_0', parameters={'tensors': P})]", "variable 'tensors' is taken"),
        (
            "    return [PolicySpec('mine', TEMPLATE, 'Q8_0', parameters={'a.b': P, 'a_b': P})]",
            "variable 'a_b' is taken",
        ),
        (
            "    return [PolicySpec('mine', TEMPLATE, 'Q8_0', parameters={'a-b': P})]",
            "variable 'a-b' is not a valid name",
        ),
        ("    return [PolicySpec('mine', Path(__file__), 'Q8_0')]", r"is not named \*\.jinja"),
    ],
)
def test_a_plugin_whose_policies_fail(tmp_path: Path, body: str, says: str) -> None:
    with pytest.raises(PluginFailed, match=f"plugin 'mine'.*{says}"):
        load_plugins([folder(tmp_path, "mine", HOOK + body)]).policies()


def test_two_policies_of_one_name_and_two_plugins_of_one_name(tmp_path: Path) -> None:
    again = folder(
        tmp_path,
        "again",
        HOOK + "    return [PolicySpec('i-nano', Path(__file__).with_name('low-head.jinja'), 'Q8_0')]",
    )
    with pytest.raises(
        PluginFailed, match=r"'i-nano' comes from two plugins, '(apex|again)' \(.*\) and '(apex|again)' \(.*\)"
    ):
        load_plugins([again]).policies()
    with pytest.raises(PluginFailed, match="two plugins are named 'apex'"):
        load_plugins([folder(tmp_path, "apex")])
    with pytest.raises(PluginFailed, match=r"no plugin in .*empty: a plugin folder has a file plugin\.py"):
        load_plugins([tmp_path / "empty"])


def test_errors_while_a_role_is_asked_for_or_a_source_is_read(tmp_path: Path) -> None:
    text = """
from apex_build.errors import CalibrationSetInvalid
from apex_build.hookspecs import Document, Source, hookimpl

@hookimpl
def apex_tensor_roles(architecture):
    return lambda name: {}[name]

def broken(options, folder):
    yield Document("chat", text="one")
    raise OSError("disk on fire")

def refusing(options, folder):
    raise CalibrationSetInvalid("its options are wrong")
    yield

@hookimpl
def apex_calibration_sources():
    return [Source("broken", broken), Source("refusing", refusing)]
"""
    plugins = load_plugins([folder(tmp_path, "mine", text)])
    with pytest.raises(PluginFailed, match=r"plugin 'mine': KeyError: 'x', at .*plugin\.py:7"):
        plugins.role_of("qwen35moe", "x")
    sources = plugins.calibration_sources()
    with pytest.raises(PluginFailed, match=r"plugin 'mine': OSError: disk on fire, at .*plugin\.py:11"):
        list(sources["broken"].read({}, tmp_path))
    with pytest.raises(CalibrationSetInvalid, match="its options are wrong"):  # meant for the user: passes as it is
        list(sources["refusing"].read({}, tmp_path))


def test_commands_of_a_plugin(tmp_path: Path) -> None:
    text = (
        "import click\nfrom apex_build.hookspecs import hookimpl\n@click.command('wave')\ndef wave(): "
        "click.echo('o/')\n"
    )
    text += "@hookimpl\ndef apex_commands(): return [wave]\n"
    assert "wave" in load_plugins([folder(tmp_path, "mine", text)]).commands()
    assert "wave" not in load_plugins().commands()
