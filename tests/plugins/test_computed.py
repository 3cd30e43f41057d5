"""A policy that computes its types: the tiny plugin printed in docs/plugins.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from apex_runs import run_apex

from apex_build.errors import PluginFailed
from apex_build.gguf_model.model import read_model
from apex_build.native.toolset import Toolset
from apex_build.plugin_check import check_plugin
from apex_build.plugins import load_plugins
from apex_build.policy.plan import make_plan

PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")
EXAMPLE = re.findall(r"^```python\n(.*?)^```$", PAGE.partition("## A policy that computes")[2], re.M | re.S)[0]
HEAD = "from apex_build.plugin_api import Computed, Parameter, PolicySpec, PolicyTask, hookimpl\n\nAPEX_API = 3\n\n\n"
HOOK = "\n\n@hookimpl\ndef apex_policies():\n    return [SPEC]\n"
PREDICTS = """

def predict(task, types):
    return {"kld.mean": sum(name == "Q4_K" for name in types.values()) / 100}


SPEC = PolicySpec("counted", None, "Q8_0", compute=lambda task: Computed({}, ("all left",), {"kld.mean": 0.5}),
                  predict=predict)
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    folder = tmp_path / "largest"
    folder.mkdir()
    (folder / "plugin.py").write_text(HEAD + EXAMPLE + HOOK, encoding="utf-8")
    return folder


def test_the_printed_policy_is_whole(plugin: Path) -> None:
    found = check_plugin(plugin)
    types = found.rules["largest-last"]
    assert types["blk.0.attn_k.weight"] == "Q4_K" and types["blk.40.nextn.eh_proj.weight"] == "Q4_K"


@pytest.mark.usefixtures("tools")
def test_plan_sweep_and_quantize_take_it_as_any_other(plugin: Path, testbed: Path, tmp_path: Path) -> None:
    given = ("--plugin", plugin, "--set", "limit=50000")
    planned = json.loads(run_apex("plan", testbed, "--policy", "largest-last", *given, "--json").stdout)
    types = {one["name"]: one["type"] for one in planned["tensors"]}
    assert types["token_embd.weight"] == "Q4_K" and types["blk.3.attn_k.weight"] == "Q6_K"
    swept = run_apex("sweep", testbed, "--plugin", plugin, "--policy", "largest-last", "--over", "limit=0,50000",
                     "--only", "kld", "--reference", testbed, "-o", tmp_path / "sweep", "--dry-run", "--text",
                     testbed.parent / "heldout" / "chat.txt").stdout  # fmt: skip
    assert "limit=50000" in swept
    out = tmp_path / "out.gguf"
    run_apex("quantize", testbed, "--policy", "largest-last", *given, "-o", out, "--no-load-check")
    assert read_model(out, load_plugins().role_of).metadata["apex.parameters"] == "limit=50000"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ('PolicySpec("none", None, "Q8_0")', "neither a template nor a function"),
        ('PolicySpec("wrong", None, "Q8_0", compute=lambda task: {})', "must return a Computed"),
        ('PolicySpec("wrong", None, "Q8_0", compute=lambda task: Computed({"no": "Q8_0"}))', "'no' the type 'Q8_0'"),
        (
            'PolicySpec("wrong", None, "Q8_0", compute=lambda task: Computed({}, (), {"kld": float("nan")}))',
            "predicts 'kld' as nan",
        ),
        ('PolicySpec("wrong", None, "Q8_0", compute=lambda task: 1 / 0)', "plugin 'bad': ZeroDivisionError"),
    ],
)
def test_one_that_is_wrong_is_named(tmp_path: Path, spec: str, says: str) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "plugin.py").write_text(f"{HEAD}SPEC = {spec}\n{HOOK}", encoding="utf-8")
    with pytest.raises(PluginFailed, match=says):
        check_plugin(folder)


def test_what_it_predicts_goes_with_the_plan(tmp_path: Path, testbed: Path, tools: Toolset) -> None:
    folder = tmp_path / "counted"
    folder.mkdir()
    (folder / "plugin.py").write_text(HEAD + PREDICTS + HOOK, encoding="utf-8")
    plugins = load_plugins([folder])
    plan = make_plan(read_model(testbed, plugins.role_of), plugins.policy("counted"), {}, tools)
    assert plan.predicted == {"kld.mean": 0.5} and "all left" in plan.warnings
