"""What plugin authors use: docs/plugins.md, `apex plugins`, the version of the API, roles."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from apex_runs import run_apex

from apex_build.cli.plugins import KINDS, project
from apex_build.errors import ApexError, PluginFailed, PluginIncompatible
from apex_build.gguf_model.model import read_model
from apex_build.hookspecs import API_VERSION, OLDEST_API, ROLES, Part
from apex_build.native.toolset import Toolset
from apex_build.plugin_check import check_plugin
from apex_build.plugins import load_plugins

PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")
# kind -> the name that the page gives its example
PRINTED: dict[str, str] = dict(re.findall(r"^`apex plugins new ([a-z]+) ([a-z0-9-]+)`$", PAGE, re.MULTILINE))


def blocks(kind: str) -> list[str]:
    section = PAGE.partition(f"`apex plugins new {kind} {PRINTED[kind]}`")[2].partition("\n## ")[0]
    return re.findall(r"^```(?:python|jinja)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def written(where: Path, kind: str) -> Path:
    """A project of this kind made by `apex plugins new`, with the names used on the page."""
    run_apex("plugins", "new", kind, PRINTED[kind], "-o", where)
    return where / PRINTED[kind]


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("projects")
    return {kind: written(where, kind) for kind in KINDS}


def folder(projects: dict[str, Path], kind: str) -> Path:
    return projects[kind] / PRINTED[kind].replace("-", "_")


def test_the_page_shows_an_example_of_each_kind() -> None:
    assert list(PRINTED) == list(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_is_short_and_printed_as_it_is_written(kind: str) -> None:
    files = project(kind, PRINTED[kind])
    package = PRINTED[kind].replace("-", "_")
    code = [text for path, text in files.items() if path.startswith(f"{package}/") and text]
    assert sorted(blocks(kind)) == sorted(code)
    assert all(len(text.splitlines()) <= 20 for text in code)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_test_of_a_new_plugin_passes(projects: dict[str, Path], kind: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", projects[kind]], capture_output=True, text=True, cwd=projects[kind]
    )
    assert ran.returncode == 0 and "1 passed" in ran.stdout, ran.stdout
    checked = run_apex("plugins", "check", projects[kind]).stdout
    assert f"good, made for plugin API version {API_VERSION}" in checked


def test_the_policy_is_planned(projects: dict[str, Path], testbed: Path, tools: Toolset) -> None:
    plugin = ("--plugin", folder(projects, "policy"), "--policy", PRINTED["policy"])
    plan = json.loads(run_apex("plan", testbed, *plugin, "--set", "routed_head=Q3_K", "--json").stdout)
    types = {tensor["name"]: tensor["type"] for tensor in plan["tensors"]}
    assert (types["blk.6.ffn_up_exps.weight"], types["blk.6.nextn.eh_proj.weight"]) == ("Q3_K", "Q4_K")


def test_the_source_is_read(projects: dict[str, Path], testbed: Path, tools: Toolset, tmp_path: Path) -> None:
    (tmp_path / "my-notes").mkdir()
    (tmp_path / "my-notes" / "one.md").write_text("# One\n\n" + "All that there is to say. " * 200)
    part = f'[[part]]\ndomain = "notes"\nsource = "{PRINTED["source"]}"\nfolder = "my-notes"\n'
    (tmp_path / "mine.toml").write_text(f'name = "mine"\n{part}')
    options = ("--calibration-set", tmp_path / "mine.toml", "--plugin", folder(projects, "source"))
    text = json.loads(run_apex("calibrate", testbed, *options, "--dry-run", "--json").stdout)["text"]
    assert [one["domain"] for one in text["parts"]] == ["notes"]


def test_the_evaluator_measures(
    projects: dict[str, Path], testbed: Path, tools: Toolset, heldout: Path, tmp_path: Path
) -> None:
    name = PRINTED["evaluator"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(list((heldout / "prompts.jsonl").open(encoding="utf-8"))[:2]))
    options = (
        "--plugin",
        folder(projects, "evaluator"),
        "--only",
        name,
        "--prompts",
        prompts,
        "--results",
        tmp_path / "r.jsonl",
    )
    (result,) = json.loads(run_apex("evaluate", testbed, *options, "--set", f"{name}.n_predict=8", "--json").stdout)
    (figure,) = result["figures"]
    assert 0 < figure["value"] <= 100 and (figure["n"], figure["better"], figure["plot"]) == (2, "higher", True)


@pytest.mark.slow
def test_the_gpu_is_listed(projects: dict[str, Path]) -> None:
    listed = json.loads(run_apex("build", "--list-gpus", "--plugin", folder(projects, "gpu"), "--json").stdout)
    assert PRINTED["gpu"] in [target["name"] for target in listed]


def test_the_page_lists_the_roles() -> None:
    section = PAGE.partition("## Roles")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE) == [
        (role.name, role.description) for role in ROLES
    ]


def test_the_page_lists_the_versions() -> None:
    assert [int(found) for found in re.findall(r"^\| (\d+) \| ", PAGE, re.MULTILINE)] == list(
        range(OLDEST_API, API_VERSION + 1)
    )


def plugin(where: Path, text: str, name: str = "mine") -> Path:
    made = where / name
    made.mkdir()
    (made / "plugin.py").write_text(text)
    (made / "t.jinja").write_text("")
    return made


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "APEX_API = 4\nfrom apex_build.plugin_api import of_the_future\n",
            "made for plugin API version 4: this apex-build has version 1 to 3",
        ),
        ("APEX_API = 0  # long ago\n", "made for plugin API version 0"),
        ("APEX_API = int('7')\n", "made for plugin API version 7"),
    ],
)
def test_a_plugin_for_another_version_of_the_api(tmp_path: Path, text: str, says: str) -> None:
    """The version is reported before imports fail because of it."""
    made = plugin(tmp_path, text)
    with pytest.raises(PluginIncompatible, match=f"plugin 'mine' .*{says}"):
        load_plugins([made])
    assert "try:" in run_apex("plugins", "check", made, code=82).stderr


def test_an_installed_plugin_for_another_version_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "later.py").write_text("APEX_API = 4\nfrom apex_build.plugin_api import of_the_future\n")
    info = tmp_path / "later-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: later\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[apex_build]\nlater = later\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    ran = run_apex("plugins", "list", "--json", env={**os.environ, "PYTHONPATH": path})
    assert "was made for plugin API version 4" in ran.stderr
    listed = json.loads(ran.stdout)
    assert [one["name"] for one in listed["left_out"]] == ["later"] and listed["api"] == API_VERSION
    assert {one["api"] for one in listed["plugins"]} == {API_VERSION}


def test_the_list_says_what_each_plugin_gives() -> None:
    listed = {one["name"]: one for one in json.loads(run_apex("plugins", "list", "--json").stdout)["plugins"]}
    assert listed["uniform"]["policies"] == ["uniform"] and listed["draft_head"]["evaluators"] == ["draft-head"]
    assert listed["moe_roles"]["tensor_roles"] and not listed["moe_roles"]["roles"]


HEAD = (
    "from pathlib import Path\nfrom apex_build.plugin_api import *\nAPEX_API = 3\nT = "
    "Path(__file__).with_name('t.jinja')\n"
)


def giving(hook: str, items: str) -> str:
    return f"{HEAD}@hookimpl\ndef {hook}():\n    return [{items}]\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\n", "provides nothing"),
        ("APEX_API = 'two'\n", "APEX_API is 'two', expected a whole number"),
        (
            giving("apex_evaluators", "Evaluator('e', lambda task: [], needs=('texts',))"),
            "needs 'texts'; near it: text",
        ),
        (
            giving("apex_evaluators", "Evaluator('e', lambda task: [], serves=(Service('sweeps'),))"),
            "serves 'sweeps'; near it: sweep",
        ),
        (
            giving("apex_evaluators", "Evaluator('e', lambda task: [], serves=(Service('check', {'speed': 's'}),))"),
            "with figures for speed: expected perplexity or acceptance",
        ),
        (giving("apex_evaluators", "Evaluator('e', lambda task: [], parameters={'p': Parameter('Q4KM')})"), "Q4KM"),
        (
            giving("apex_policies", "PolicySpec('p', T, 'Q8_0', otherwise='gone')"),
            "names the policy 'gone', which does not exist",
        ),
        (
            giving("apex_policies", "PolicySpec('p', T, 'Q8_0', parameters={'a': Parameter('Q4_K', bound='b')})"),
            "bound 'b'",
        ),
        (giving("apex_gpu_targets", "GpuTarget('g', 'sm_89', 24, '', '')"), "expected one of CMake's, such as 89-real"),
        (giving("apex_roles", "Role('routed', '')"), "which is a built-in role"),
        (
            f"{HEAD}@hookimpl\ndef apex_tensor_roles(architecture):\n    return {{'blk.0.ffn_gate_inp.weight': "
            f"'router_'}}.get\n",
            r"its role of blk\.0\.ffn_gate_inp\.weight is 'router_', and there is no such role; near it: router",
        ),
    ],
)
def test_faults_that_a_check_finds(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ApexError, match=says) as caught:
        check_plugin(plugin(tmp_path, text))
    assert "'mine'" in caught.value.message or "'e'" in caught.value.message


def test_a_template_that_does_not_hold(tmp_path: Path) -> None:
    made = plugin(tmp_path, giving("apex_policies", "PolicySpec('p', T, 'Q8_0')"))
    (made / "t.jinja").write_text("blk.0.attn_q=Q4_KK\n")
    assert "t.jinja:1" in run_apex("plugins", "check", made, code=62).stderr


def test_a_command_that_apex_has_already(tmp_path: Path) -> None:
    made = plugin(tmp_path, "import click\n" + giving("apex_commands", "click.Command('plan')"))
    assert "'plan' is already a verb of apex" in run_apex("plugins", "check", made, code=80).stderr


@pytest.mark.parametrize(
    ("name", "says"),
    [("I-Nano", "small letters"), ("i-nano", "but there is already such a plugin"), ("json", "a Python module 'json'")],
)
def test_names_that_a_new_plugin_cannot_have(tmp_path: Path, name: str, says: str) -> None:
    assert says in run_apex("plugins", "new", "policy", name, "-o", tmp_path, code=2).stderr
    assert not list(tmp_path.iterdir())


def test_a_new_plugin_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "small-head").mkdir()
    assert "exists" in run_apex("plugins", "new", "policy", "small-head", "-o", tmp_path, code=71).stderr


def test_a_plugin_of_version_1_may_still_name_roles_of_its_own(tmp_path: Path) -> None:
    """Version 1 had no list."""
    text = "from apex_build.hookspecs import hookimpl\n"
    text += "@hookimpl\ndef apex_tensor_roles(architecture):\n    return lambda name: 'mine'\n"
    assert load_plugins([plugin(tmp_path, text, "old")]).role_of("any", "x") == "mine"
    with pytest.raises(PluginFailed, match="its role of x is 'mine', and there is no such role"):
        load_plugins([plugin(tmp_path, f"APEX_API = 3\n{text}", "new")]).role_of("any", "x")


def test_a_head_that_lies_outside_the_blocks(testbed: Path) -> None:
    def role_of(_architecture: str, tensor: str) -> str | Part | None:
        return {
            "output.weight": Part("output", draft_head=True),
            "blk.6.attn_q.weight": Part("attention", draft_head=False),
        }.get(tensor)

    tensors = {tensor.name: tensor for tensor in read_model(testbed, role_of).tensors}
    assert tensors["output.weight"].draft_head and tensors["output.weight"].role == "output"
    assert not tensors["blk.6.attn_q.weight"].draft_head and tensors["blk.6.attn_k.weight"].draft_head
