"""`apex plan` and `apex policies` as a user runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from policy_kit import TIERS, WITH_SMALL_HEAD

from apex_build.native.toolset import Toolset

SMALL = ("--set", "edge=1", "--set", "near=1", "--set", "attention_edge=1")


@pytest.fixture
def apex(tools: Toolset, tmp_path: Path):  # type: ignore[no-untyped-def]
    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "apex_build", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "APEX_TOOLS": str(tools.root)},
        )

    return run


def test_the_table_the_total_and_the_note(apex, testbed: Path) -> None:  # type: ignore[no-untyped-def]
    ran = apex("plan", testbed, "--policy", "i-nano", *SMALL, "--set", "draft_head=IQ2_XXS", "--tensors")
    assert ran.returncode == 0
    rows = [re.split(r" {2,}", line.strip()) for line in ran.stdout.splitlines()]
    assert ["trunk", "routed", "IQ2_XXS", "2-3", "6", "811.01 kB", "2.06"] in rows
    assert ["draft head", "routed", "IQ2_XXS", "6", "3", "405.50 kB", "2.06"] in rows
    assert ["blk.6.nextn.eh_proj.weight", "nextn", "head", "F16", "IQ2_XXS", "33.79 kB", "rule"] in rows
    assert "tensors: 5849840 bytes (5.85 MB), 3.030 bits per weight, 572.42 kB of them the draft head's" in ran.stdout
    assert "note: 23 tensors get types that need calibration data, 11 of them in the draft head" in ran.stderr


def test_json_holds_every_tensor(apex, testbed: Path) -> None:  # type: ignore[no-untyped-def]
    value = json.loads(apex("plan", testbed, "--policy", "compact", *SMALL, "--json").stdout)
    assert (
        value["bytes"] == sum(tensor["n_bytes"] for tensor in value["tensors"]) == sum(value["bytes_by_role"].values())
    )
    assert (value["policy"], value["base_type"], value["parameters"]["edge"], value["without_data"]) == (
        "compact",
        "Q4_K_M",
        1,
        None,
    )
    assert len(value["tensors"]) == 134 and len(value["identity"]) == 64


def test_an_imatrix_without_the_head(apex, testbed: Path, trunk_imatrix: Path) -> None:  # type: ignore[no-untyped-def]
    low = ("plan", testbed, "--policy", "i-nano", *SMALL, "--set", "draft_head=IQ2_XXS", "--imatrix", trunk_imatrix)
    ran = apex(*low)
    assert ran.returncode == 0 and "has no data for blk.6." in ran.stderr and f"apex calibrate {testbed}" in ran.stderr
    assert len(json.loads(apex(*low, "--json").stdout)["without_data"]) == 11
    assert apex("plan", testbed, "--policy", "i-nano", *SMALL, "--imatrix", trunk_imatrix).stderr == ""


def test_the_rules_as_a_file(apex, testbed: Path, tools: Toolset, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "types for it.txt"
    ran = apex("plan", testbed, "--policy", "i-nano", *SMALL, "--write-rules", out)
    total = ran.stdout.split("tensors: ")[1].split(" ")[0]
    command: list[str | Path] = [
        tools.tool("llama-quantize"),
        "--dry-run",
        "--tensor-type-file",
        out,
        testbed,
        "IQ2_XXS",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"quant size  = {int(total) / (1 << 20):8.2f} MiB" in said.stdout + said.stderr
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--policy", "i-nono"), 60, "there is no policy 'i-nono'; near it: i-nano"),
        (
            ("--policy", "i-nano", "--set", "draft_heed=Q4_K"),
            61,
            "policy 'i-nano' has no parameter 'draft_heed'; near it: draft_head",
        ),
        (("--policy", "i-nano", "--set", "edge"), 61, "'edge' is not of the form name=value"),
        (("--policy", "i-nano", "--set", "draft_head=IQ2XXS"), 62, "'IQ2XXS' is not a tensor type"),
        (("--policy", "i-nano", "--set", "base_type=Q4KM"), 62, "'Q4KM' is not a base type"),
        (("--policy", "i-nano", "--write-rules", "gone/types.txt"), 71, "gone: no such folder"),
        (("--policy", "i-nano", "--plugin", "gone"), 80, "no plugin in"),
    ],
)
def test_bad_input(apex, testbed: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, says: str) -> None:  # type: ignore[no-untyped-def]
    ran = apex("plan", testbed, *arguments, "--json")
    assert (ran.returncode, ran.stdout) == (code, "")
    assert ran.stderr.startswith("error: ") and says in ran.stderr and "Traceback" not in ran.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("\n{% for %}", 63, "mine.jinja:2: "),
        ("\n\nx=Q4_KM", 62, "mine.jinja:3: 'Q4_KM' is not a tensor type"),
        ("{{ ''.__class__ }}", 64, "mine.jinja:1: access to attribute '__class__'"),
        ("attn_q=Q4_K", 63, "mine.jinja:1: the pattern 'attn_q' also matches"),
    ],
)
def test_bad_templates(apex, testbed: Path, tmp_path: Path, text: str, code: int, says: str) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.jinja").write_text(text)
    (folder / "plugin.py").write_text(
        "from pathlib import Path\nfrom apex_build.hookspecs import PolicySpec, hookimpl\n"
        "@hookimpl\ndef apex_policies():\n    return [PolicySpec('mine', Path(__file__).with_name('mine.jinja'), "
        "'Q8_0')]\n"
    )
    ran = apex("plan", testbed, "--policy", "mine", "--plugin", folder, "--write-rules", tmp_path / "types.txt")
    assert ran.returncode == code and says in ran.stderr and "Traceback" not in ran.stderr
    assert not (tmp_path / "types.txt").exists()


def test_policies_are_listed_with_their_parameters(apex) -> None:  # type: ignore[no-untyped-def]
    listed = {policy["name"]: policy for policy in json.loads(apex("policies", "--json").stdout)}
    assert set(listed) == {*TIERS, *WITH_SMALL_HEAD, "uniform", "draft-head-only", "fit"}
    assert listed["i-nano"]["parameters"]["draft_head"]["default"] == "tier"
    assert "draft_head.routed" in apex("policies", "i-nano").stdout
    assert apex("policies", "nano").returncode == 60
