"""Default file names, as parsed by their readers: the hub's parser (recorded; run if node has it) and llama.cpp's
downloader.

names/hub_labels.json has the output of names/hub_labels.mjs for the names that
`python tests/quantization/test_naming.py` prints.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from apex_runs import SMALL, run_apex

from apex_build.errors import OutputUnwritable, ParameterUnknown
from apex_build.gguf_model.header import read_header
from apex_build.hookspecs import PolicySpec
from apex_build.native.toolset import Toolset
from apex_build.parameters import BASE_TYPE
from apex_build.places import source_root
from apex_build.plugins import load_plugins
from apex_build.policy.plan import Entry, Plan
from apex_build.quantization.naming import FILE_TYPES, file_name, source_stem, type_of_most_bytes, type_of_most_weights

NAMES = Path(__file__).parent / "names"
MODEL = Path("Qwen3.6-35B-A3B-F16.gguf")
TYPES = (
    *(
        "F16",
        "BF16",
        "Q8_0",
        "Q6_K",
        "Q5_K",
        "Q4_K",
        "Q3_K",
        "Q2_K",
        "IQ4_XS",
        "IQ4_NL",
        "IQ3_S",
        "IQ3_XXS",
        "IQ2_S",
        "IQ2_XS",
    ),
    *("IQ2_XXS", "IQ1_M", "IQ1_S", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
)
# What was tried and is not understood, or not as one: names as they were, and other orders of the same parts.
TRIED = (
    "model-F16-i-nano.gguf",
    "model-i-nano-mtp.gguf",
    "model-APEX-I-NANO.gguf",
    "model-I-NANO.gguf",
    "model-IQ2_XXS-i-nano.gguf",
    "model-IQ2_XXS-INANO.gguf",
    "model-i-nano-IQ2_XXS.gguf",
    "model-Q4_K_COMPACT.gguf",
    "model-IQ2_XXS_I_NANO.gguf",
)


def plan_of(policy: PolicySpec, type_name: str, **changed: object) -> Plan:
    """A plan of one tensor, which is enough to make a name."""
    entry = Entry("x", "other", None, False, (256, 1), "F16", type_name, 100, "rule", None, False)
    values = {name: parameter.default for name, parameter in policy.parameters.items()}
    base = re.sub(r"\{(\w+)\}", lambda found: str({**values, **changed}[found[1]]), policy.base_type).upper()
    parameters = {**values, BASE_TYPE: base, **changed}
    return Plan(policy.name, parameters, str(parameters[BASE_TYPE]), False, "", (entry,), "")  # type: ignore[arg-type]


def builtin() -> list[PolicySpec]:
    plugins = load_plugins()
    return [plugins.policy(name) for name in sorted(plugins.policies())]


def default_names() -> Iterator[str]:
    for policy in builtin():
        for type_name in TYPES:
            yield file_name(MODEL, plan_of(policy, type_name), policy)
            yield file_name(MODEL, plan_of(policy, type_name, **{BASE_TYPE: "Q5_0"}), policy)


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((NAMES / "hub_labels.json").read_text())
    return found


def hub_label(name: str) -> str | None:
    """parseGGUFQuantLabel of @huggingface/gguf: the last match of its pattern in the upper-case name."""
    pattern = recorded()["pattern"].replace("(?<", "(?P<")
    found = [match[0] for match in re.finditer(pattern, name.upper())]
    return found[-1] if found else None


def download_tag(name: str) -> str | None:
    """common/download.cpp: reads the patterns from the source."""
    text = (source_root() / "pr-22673" / "common" / "download.cpp").read_text()
    split, tag = (re.search(rf're_{what}\("(.*)", std::regex::icase\)', text) for what in ("split", "tag"))
    assert split and tag, "common/download.cpp reads names in another way now"
    stem = name.removesuffix(".gguf")
    if whole := re.fullmatch(split[1], stem, re.IGNORECASE):
        stem = whole[1]
    found = re.search(tag[1], stem, re.IGNORECASE)
    return found[1].upper() if found else None


def test_both_parsers_read_every_default_name_as_the_same_one(tools: Toolset) -> None:
    for name in default_names():
        tag = name.removesuffix(".gguf").rpartition("-")[2]
        assert tag == tag.upper() and tag.startswith(FILE_TYPES)
        assert hub_label(name) == tag == download_tag(name), name
        assert download_tag(name.replace(".gguf", "-00002-of-00003.gguf")) == tag
        assert "mtp-" not in name and "mmproj" not in name, "llama.cpp takes such a file for a part of another"


def test_names_are_unique_for_each_policy_and_its_parameters() -> None:
    names = [name for name in default_names() if "-Q6_K" in name]
    assert len(set(names)) == len(names) == 2 * len(builtin())
    assert {"i-compact", "compact", "i-nano", "i-nano-mtp"} <= {policy.name for policy in builtin()}


@pytest.mark.usefixtures("source_tree")
def test_the_tag_that_is_asked_for_finds_its_own_file_and_no_other() -> None:
    """llama.cpp's -hf repo:TAG searches names for TAG followed by . or - (so F16 also finds everybody's BF16)."""
    names = sorted({name for name in default_names() if "-BF16" not in name})
    for name in names:
        tag = download_tag(name)
        assert [one for one in names if re.search(f"{tag}[.-]", one, re.IGNORECASE)] == [name]


@pytest.mark.usefixtures("source_tree")
def test_what_was_tried_before() -> None:
    assert (hub_label("model-F16-i-nano.gguf"), download_tag("model-F16-i-nano.gguf")) == ("F16", "NANO")
    assert (hub_label("model-i-nano-mtp.gguf"), download_tag("model-i-nano-mtp.gguf")) == (None, "MTP")
    assert hub_label("model-APEX-I-NANO.gguf") is None and hub_label("model-Q4_K_COMPACT.gguf") is None
    assert download_tag("model-i-compact.gguf") == download_tag("model-compact.gguf")
    assert (hub_label("model-IQ2_XXS-INANO.gguf"), download_tag("model-IQ2_XXS-INANO.gguf")) == ("IQ2_XXS", "INANO")
    assert (hub_label("model-IQ2_XXS_I_NANO.gguf"), download_tag("model-IQ2_XXS_I_NANO.gguf")) == (
        "IQ2_XXS_I",
        "IQ2_XXS_I_NANO",
    )


def test_the_recorded_pattern_is_used_as_the_hub_uses_it() -> None:
    labels = recorded()["labels"]
    assert set(TRIED) < set(labels)
    assert {name: hub_label(name) for name in labels} == labels


def test_the_hubs_parser_still_reads_them_so() -> None:
    folder = Path(os.environ.get("APEX_NODE_FOLDER", NAMES))  # where npm installed @huggingface/gguf
    if not shutil.which("node") or not (folder / "node_modules" / "@huggingface" / "gguf").is_dir():
        pytest.skip("no node with @huggingface/gguf: npm install it and set APEX_NODE_FOLDER to that folder")
    names = sorted({*default_names(), *TRIED})
    command = ["node", "--input-type=module", "--eval", (NAMES / "hub_labels.mjs").read_text()]
    done = subprocess.run(command, input=json.dumps(names), cwd=folder, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["labels"] == {name: hub_label(name) for name in names}


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("Qwen3.6-35B-A3B-F16.gguf", "Qwen3.6-35B-A3B"),
        ("testbed-f16.gguf", "testbed"),
        ("model.bf16.gguf", "model"),
        ("model-fp16-00001-of-00004.gguf", "model"),
        ("model_Q8_0.gguf", "model"),
        ("F16.gguf", "F16"),
        ("model-f16-abliterated.gguf", "model-f16-abliterated"),
    ],
)
def test_the_sources_type_is_dropped(name: str, stem: str) -> None:
    assert source_stem(Path(name)) == stem


def test_the_name_tells_most_weights_and_the_file_type_most_bytes() -> None:
    """A 35B with i-nano: most bytes are Q3_K, but most weights are IQ2_XXS, and nobody would call a file with 2.7 bits
    per weight Q3_K_M.
    """
    policy = load_plugins().policy("i-nano")
    few, many = (
        Entry(type_name, "other", None, False, (256, rows), "F16", type_name, n_bytes, "rule", None, False)
        for type_name, rows, n_bytes in (("Q3_K", 10, 1100), ("IQ2_XXS", 15, 990))
    )
    plan = replace(plan_of(policy, "Q3_K"), entries=(few, many))
    assert (type_of_most_bytes(plan), type_of_most_weights(plan)) == ("Q3_K_M", "IQ2_XXS")
    assert file_name(MODEL, plan, policy) == "Qwen3.6-35B-A3B-IQ2_XXS_INANO.gguf"


def test_a_template_of_ones_own() -> None:
    policy = load_plugins().policy("i-nano")
    plan = plan_of(policy, "Q4_K")
    assert type_of_most_bytes(plan) == type_of_most_weights(plan) == "Q4_K_M"
    assert file_name(MODEL, plan, policy, "{model}-APEX-{policy}-{type}") == "Qwen3.6-35B-A3B-APEX-i-nano-Q4_K_M.gguf"
    with pytest.raises(ParameterUnknown, match=r"no \{modle\}; near it: model"):
        file_name(MODEL, plan, policy, "{modle}-{tag}")
    for bad in ("../{tag}", ".{tag}", "a\n{tag}"):
        with pytest.raises(OutputUnwritable):
            file_name(MODEL, plan, policy, bad)


def test_a_file_says_what_it_is_and_whose(tools: Toolset, testbed: Path, tmp_path: Path) -> None:
    meta = [
        "--meta",
        "name=Test Bed",
        "--meta",
        "license=mit",
        "--meta",
        "base_model=Some/Base-Model",
        "--meta",
        "sampling.temp=0.7",
    ]
    ran = run_apex(
        "quantize",
        testbed,
        "--policy",
        "compact",
        *SMALL,
        "-o",
        tmp_path,
        *meta,
        env={**os.environ, "APEX_QUANTIZED_BY": "somebody"},
    )
    (path,) = tmp_path.glob("*.gguf")
    assert re.fullmatch(r"testbed-[A-Z0-9_]+_COMPACTX[A-Z]{4}\.gguf", path.name)
    found = read_header(path).metadata
    assert (found["general.name"], found["general.license"], found["general.quantized_by"]) == (
        "Test Bed",
        "mit",
        "somebody",
    )
    assert found["general.base_model.count"] == 1 and found["general.base_model.0.name"] == "Base Model"
    assert abs(found["general.sampling.temp"] - 0.7) < 1e-6
    assert found["general.file_type"] == 15, "Q4_K_M: what most bytes are"
    assert found["general.size_label"].startswith("8x")
    assert ran.stdout.splitlines()[-1].endswith(f"-m {path} --spec-type draft-mtp --spec-draft-n-max 2 -np 1")


def test_the_file_type_is_that_of_most_bytes(tools: Toolset, testbed: Path, tmp_path: Path) -> None:
    """Its base type is Q8_0, but it has more IQ4_XS."""
    settings = ["--set", "trunk=IQ4_XS", "--set", "draft_head=Q8_0"]
    run_apex("quantize", testbed, "--policy", "draft-head-only", *settings, "-o", tmp_path)
    (path,) = tmp_path.glob("*.gguf")
    assert read_header(path).metadata["general.file_type"] == 30 and "-IQ4_XS_DRAFTHEADONLYX" in path.name
    assert "general.quantized_by" not in read_header(path).metadata, "nobody's name is guessed"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("licence=mit", "near it: license"),
        ("license", "expected KEY=VALUE"),
        ("general.architecture=llama", "states a fact about the file"),
        ("file_type=7", "states a fact about the file"),
        ("qwen35moe.block_count=3", "no reader of GGUF files knows this key"),
        ("tokenizer.chat_template=x", "no reader of GGUF files knows this key"),
        ("tags=a,b", "cannot set lists"),
        ("description=" + "x" * 200, "or texts of more than 127 bytes"),
        ("sampling.temp=hot", "expected a number"),
    ],
)
def test_metadata_that_is_refused(tools: Toolset, testbed: Path, tmp_path: Path, given: str, said: str) -> None:
    ran = run_apex("quantize", testbed, "--policy", "compact", *SMALL, "-o", tmp_path, "--meta", given, code=61)
    assert said in ran.stderr and not list(tmp_path.iterdir())


if __name__ == "__main__":
    print(json.dumps(sorted({*(name for name in default_names() if "IQ2_XXS" in name or "NANO" in name), *TRIED})))
