"""Fail early if a run cannot succeed; a resumed run does not print what it cannot know."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import gguf
import numpy as np
import pytest
from apex_runs import run_apex
from architectures import write_model
from gguf_edit import copy
from snapshots import stopped_at

from apex_build.errors import ModelInvalid, VerificationFailed
from apex_build.native import output
from apex_build.native.early import warnings_of
from apex_build.native.toolset import Toolset
from apex_build.progress import Step
from apex_build.source.pins import load_pin


@pytest.fixture(scope="module")
def head_alone(testbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like files named mtp-*.gguf: the head's block, embeddings and output, with the metadata of the whole model."""
    out = tmp_path_factory.mktemp("head") / "mtp-testbed.gguf"
    reader, writer = gguf.GGUFReader(testbed), gguf.GGUFWriter(out, "qwen35moe")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=sub_type)
    for tensor in reader.tensors:
        if not tensor.name.startswith("blk.") or tensor.name.startswith("blk.6."):
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_a_head_that_cannot_be_run_ends_calibration_before_the_first_chunk(
    tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path
) -> None:
    serves = load_pin().serves
    name = "glm4moe" if serves and "glm4moe" in serves.heads_idle else "exaone-moe"  # of the first the rows are known
    model = write_model(name, testbed, tmp_path / "model.gguf")
    wanted = (
        "calibrate",
        model,
        "--text",
        heldout / "code.txt",
        "--chunks",
        8,
        "--threads",
        1,
        "-o",
        tmp_path / "a.gguf",
    )
    for more in ((), ("--no-rows-check",)):  # by the check of the rows, and by the tool itself
        said = run_apex(*wanted, *more, code=VerificationFailed.exit_code).stderr
        assert f"this llama.cpp cannot evaluate it for {name}" in said and f"apex calibrate {model} --no-mtp" in said
    assert "[1]" not in (tmp_path / "a.gguf.log").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf.log", "model.gguf"]
    run_apex(*wanted, "--no-mtp")


def test_a_head_alone_is_told_and_not_run(
    head_alone: Path, tools: Toolset, heldout: Path, calibrated: Path, tmp_path: Path
) -> None:
    said = run_apex("calibrate", head_alone, "--text", heldout / "chat.txt", code=ModelInvalid.exit_code).stderr
    assert "none of the trunk's 6 blocks is in the file" in said and "it holds only a draft head" in said
    given = ("--only", "draft-head", "--text", heldout / "chat.txt", "--results", tmp_path / "r.jsonl")
    run_apex("evaluate", head_alone, *given, code=ModelInvalid.exit_code)
    assert "6 in the trunk (none of them in this file), 1 in the draft head" in run_apex("inspect", head_alone).stdout
    assert json.loads(run_apex("inspect", head_alone, "--json").stdout)["trunk_layers_here"] == 0
    ran = run_apex("quantize", head_alone, "--policy", "i-nano", "--imatrix", calibrated, "-o", tmp_path / "q.gguf")
    assert "holds a draft head alone" in ran.stderr and "run it" not in ran.stdout and (tmp_path / "q.gguf").exists()
    # the whole model's data is this file's too
    shown = run_apex("inspect", calibrated, "--model", head_alone).stdout
    assert "all of its 11 weights have data" in shown


@pytest.mark.parametrize("key", ["ssm.inner_size", "attention.key_length", "ssm.state_size"])
def test_hyper_parameters_beyond_all_shapes_start_no_tool(
    key: str, tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path
) -> None:
    model = copy(testbed, tmp_path / "huge.gguf", keys={f"qwen35moe.{key}": 1 << 24})
    for verb in ("calibrate", "evaluate"):
        said = run_apex(verb, model, "--text", heldout / "chat.txt", code=ModelInvalid.exit_code, cwd=tmp_path).stderr
        assert f"qwen35moe.{key} is 16777216, and no tensor of its blocks is wider than" in said
    assert [path.name for path in tmp_path.iterdir()] == ["huge.gguf"]


def test_a_resumed_run_tells_no_perplexity_of_its_last_part(
    tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.gguf"
    wanted = ["calibrate", testbed, "--text", heldout / "code.txt", "--chunks", 40, "--threads", 1, "-o", out, "--json"]
    with stopped_at(20, tools, out, *wanted) as (first, _):
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=60)
        assert first.returncode == 130
    done = json.loads(run_apex(*wanted).stdout)
    assert done["resumed_at"] == 10
    assert done["perplexity"] is None


def test_warnings_come_at_once_and_once() -> None:
    told: list[Step] = []
    watch = warnings_of(told.append, "llama-imatrix")
    for _ in range(3):
        watch("warning: no usable GPU found, --gpu-layers option will be ignored")
        watch("0.00.1 W load: missing pre-tokenizer type, using: 'default'")
        watch("[1]5.3,[2]5.1,")
    assert [step.said for step in told] == [True, True]
    assert told[0].task == "llama-imatrix: no usable GPU was found: --gpu-layers is ignored, everything runs on the CPU"


def test_an_unknown_pre_tokenizer_is_explained(tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path) -> None:
    model = copy(testbed, tmp_path / "odd.gguf", keys={"tokenizer.ggml.pre": "no-such"})
    said = run_apex("calibrate", model, "--text", heldout / "chat.txt", code=30).stderr
    assert "does not know the pre-tokenizer 'no-such'" in said and "--pre-tokenizer" in said
    assert output.explain(["error: unknown pre-tokenizer type: 'x'"]) is not None


def test_a_gpu_that_is_not_there_is_told_of(tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path) -> None:
    wanted = (
        "calibrate",
        testbed,
        "--text",
        heldout / "chat.txt",
        "--chunks",
        2,
        "-o",
        tmp_path / "a.gguf",
        "--gpu-layers",
        5,
    )
    said = run_apex(*wanted).stderr
    if "ggml_cuda" not in (tmp_path / "a.gguf.log").read_text():
        assert said.count("warning: llama-imatrix: no usable GPU was found") == 1


def test_a_tool_that_takes_more_than_it_may_have_is_ended(
    tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path
) -> None:
    long = tmp_path / "long.txt"
    long.write_text(20 * (heldout / "code.txt").read_text())
    wanted = ("calibrate", testbed, "--text", long, "--threads", 1, "-o", tmp_path / "a.gguf", "--memory", 0.01)
    said = run_apex(*wanted, code=31).stderr
    assert (
        "llama-imatrix took 0." in said and "and was ended: its limit is 0.0 GB" in said and "try:   --memory 1" in said
    )
