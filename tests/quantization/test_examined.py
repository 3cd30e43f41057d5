"""Calibration data that would ruin tensors: shown by inspect, reported by quantize, harmless in the written file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from apex_runs import SMALL, run_apex
from gguf_model.files import read, run_imatrix, write_imatrix

from apex_build.gguf_model.coverage import coverage
from apex_build.gguf_model.examine import FLOOR, examine, weights
from apex_build.gguf_model.fused import crossed
from apex_build.gguf_model.header import read_header
from apex_build.gguf_model.imatrix import read_imatrix
from apex_build.native.tensor_data import codec
from apex_build.native.toolset import Toolset


def spoiled(
    imatrix: Path, out: Path, name: str, *, columns: slice = slice(None), matrix: int | slice = slice(None)
) -> Path:
    """A copy with zeros in one entry's sums; the counts stay."""
    shutil.copy(imatrix, out)
    (sums,) = (tensor for tensor in read_header(out).tensors if tensor.name == f"{name}.in_sum2")
    at = read_header(out).data_offset + sums.offset
    np.memmap(out, "<f4", "r+", at, (sums.n_bytes // 4 // sums.shape[0], sums.shape[0]))[matrix, columns] = 0
    return out


def values(path: Path, name: str, tools: Toolset) -> np.ndarray:
    (tensor,) = (tensor for tensor in read_header(path).tensors if tensor.name == name)
    rows = int(np.prod(tensor.shape[1:]))
    data = np.memmap(path, np.uint8, "r", read_header(path).data_offset + tensor.offset, (rows, tensor.n_bytes // rows))
    decoded = codec(tools).decode(tensor.type, np.array(data), tensor.shape[0])
    assert decoded is not None
    return decoded


def test_a_calibrated_imatrix_is_sound(calibrated: Path) -> None:
    assert examine(read_imatrix(calibrated)).sound


def test_an_entry_without_sums_holds_no_data(testbed: Path, calibrated: Path, tmp_path: Path, tools: Toolset) -> None:
    name = "blk.2.ffn_down_shexp.weight"
    bad = spoiled(calibrated, tmp_path / "bad.gguf", name)
    found = json.loads(run_apex("inspect", bad, "--model", testbed, "--json").stdout)
    assert found["coverage"]["missing"] == [name] and found["examined"]["findings"][0]["empty"] == [0]
    assert "all sums are zero" in run_apex("inspect", bad).stdout
    common = [testbed, "--policy", "i-nano", *SMALL, "--imatrix", bad, "-o", tmp_path / "x.gguf"]
    assert name in run_apex("quantize", *common, code=72).stderr
    assert "all sums are zero" in run_apex("quantize", *common, "--allow-uncalibrated").stderr
    assert np.abs(values(tmp_path / "x.gguf", name, tools)).max() > 0, (
        "all columns weigh the same, as llama-quantize has it"
    )


@pytest.mark.parametrize("policy", ["compact", "i-nano"])
def test_runs_of_zeros_lose_no_weights(
    policy: str, testbed: Path, calibrated: Path, tmp_path: Path, tools: Toolset
) -> None:
    """The imatrix is not changed; the file is made with a copy in which the zeros are raised."""
    name = "blk.2.ffn_up_exps.weight"
    bad = spoiled(calibrated, tmp_path / "bad.gguf", name, columns=slice(0, 128), matrix=3)
    before = bad.read_bytes()
    out = tmp_path / "out" / "x.gguf"
    out.parent.mkdir()
    ran = run_apex("quantize", testbed, "--policy", policy, *SMALL, "--imatrix", bad, "-o", out)
    assert "128 values of 1 entry are zero or almost zero, 128 side by side in blk.2.ffn_up_exps.weight" in ran.stderr
    source = values(testbed, name, tools).reshape(8, -1, 256)[3, :, :128]
    written = values(out, name, tools).reshape(8, -1, 256)[3, :, :128]
    assert np.sqrt(np.square(written - source).sum() / np.square(source).sum()) < 0.6
    assert bad.read_bytes() == before
    copy = read_imatrix(tmp_path / "out" / "bad.examined.gguf")
    assert examine(copy).sound and read_header(out).metadata["quantize.imatrix.file"] == "bad.examined.gguf"
    manifest = json.loads((tmp_path / "out" / "x.gguf.json").read_text())
    assert manifest["imatrix"] == "bad.gguf" and manifest["examined_imatrix"] == "bad.examined.gguf"
    # made of the same parts: used again; and no file of the user's is replaced by the copy
    assert (
        "reused: already made"
        in run_apex("quantize", testbed, "--policy", policy, *SMALL, "--imatrix", bad, "-o", out).stdout
    )
    (tmp_path / "out" / "bad.examined.gguf").write_text("mine")
    for more in (["--force"], ["--force", "--dry-run"]):
        common = ["--imatrix", bad, "-o", out, *more]
        assert (
            "apex did not write it"
            in run_apex("quantize", testbed, "--policy", policy, *SMALL, *common, code=71).stderr
        )
    assert (tmp_path / "out" / "bad.examined.gguf").read_text() == "mine"


def test_an_expert_without_sums(testbed: Path, calibrated: Path, tmp_path: Path, tools: Toolset) -> None:
    name = "blk.1.ffn_gate_exps.weight"
    bad = spoiled(calibrated, tmp_path / "bad.gguf", name, matrix=5)
    covered = coverage(read_imatrix(bad), read(testbed))
    (partial,) = (tensor for tensor in covered.partial if tensor.name == name)
    assert partial.empty == (5,) and partial.has_data
    run_apex("quantize", testbed, "--policy", "i-nano", *SMALL, "--imatrix", bad, "-o", tmp_path / "x.gguf")
    copy = read_imatrix(tmp_path / "bad.examined.gguf")
    assert copy.entries[name].counts[5] == 0 and (weights(copy, copy.entries[name], 8)[5] == 1).all()


def test_the_same_in_the_old_format(testbed: Path, tmp_path: Path, tools: Toolset) -> None:
    old = run_imatrix(tools, testbed, tmp_path / "old.dat")
    entry = old.entries["blk.2.ffn_up_exps.weight"]
    np.memmap(old.path, "<f4", "r+", entry.offset, (8, 256))[3] = 0
    covered = coverage(read_imatrix(old.path), read(testbed))
    assert covered.examined.findings[entry.name].empty == (3,)
    bare = ["--set", "draft_head=Q8_0", "--allow-uncalibrated"]
    run_apex("quantize", testbed, "--policy", "i-nano", *SMALL, *bare, "--imatrix", old.path, "-o", tmp_path / "x.gguf")
    assert read_imatrix(tmp_path / "old.examined.gguf").entries[entry.name].counts[3] == 0


def test_counts_that_disagree_within_a_layer(testbed: Path, calibrated: Path, tmp_path: Path) -> None:
    shutil.copy(calibrated, tmp_path / "bad.gguf")
    header = read_header(tmp_path / "bad.gguf")
    (counts,) = (tensor for tensor in header.tensors if tensor.name == "blk.4.attn_qkv.weight.counts")
    np.memmap(tmp_path / "bad.gguf", "<f4", "r+", header.data_offset + counts.offset, (1,))[:] /= 3
    found = json.loads(run_apex("inspect", tmp_path / "bad.gguf", "--model", testbed, "--json").stdout)["coverage"]
    assert found["disagreeing"] == [{"tensor": "blk.4.attn_qkv.weight", "tokens": 4096.0, "layer": 12288.0}]
    ran = run_apex(
        "quantize",
        testbed,
        "--policy",
        "compact",
        *SMALL,
        "--imatrix",
        tmp_path / "bad.gguf",
        "-o",
        tmp_path / "x",
        "--dry-run",
    )
    assert "blk.4.attn_qkv.weight saw 4096 tokens, other weights of its layer 12288" in ran.stderr


def test_experts_with_few_tokens_are_told_with_their_number(testbed: Path, calibrated: Path, tmp_path: Path) -> None:
    shutil.copy(calibrated, tmp_path / "few.gguf")
    header = read_header(tmp_path / "few.gguf")
    (counts,) = (tensor for tensor in header.tensors if tensor.name == "blk.4.ffn_up_exps.weight.counts")
    np.memmap(tmp_path / "few.gguf", "<f4", "r+", header.data_offset + counts.offset, (8,))[6] = 3
    ran = run_apex(
        "quantize",
        testbed,
        "--policy",
        "compact",
        *SMALL,
        "--imatrix",
        tmp_path / "few.gguf",
        "-o",
        tmp_path / "x",
        "--dry-run",
    )
    assert "1 experts in all: 3 tokens is the least, in blk.4.ffn_up_exps.weight" in ran.stderr
    assert "(at least 3 tokens): experts 6" in run_apex("inspect", tmp_path / "few.gguf", "--model", testbed).stdout


def test_the_floor_is_under_what_calibration_gives(calibrated: Path) -> None:
    found = read_imatrix(calibrated)
    least = min(
        float((entry.values().min(axis=1) / entry.values().mean(axis=1)).min()) for entry in found.entries.values()
    )
    assert least > 10 * FLOOR


def test_data_of_separate_experts_for_a_fused_model_and_the_reverse(tmp_path: Path) -> None:
    from shapes import TINY, write_header_only

    extra = {"blk.1.ffn_gate_up_exps.weight": (256, 512, 8), "blk.2.ffn_gate.3.weight": (256, 256)}
    model = read(write_header_only(tmp_path / "m.gguf", TINY, extra=extra))
    given = {
        "blk.1.ffn_up_exps.weight": (256, [5.0] * 8),
        "blk.2.ffn_gate_up_exps.weight": (256, [float(i) for i in range(1, 9)]),
    }
    found, borrowed = crossed(read_imatrix(write_imatrix(tmp_path / "i.gguf", given)), model)
    expected = {"blk.1.ffn_gate_up_exps.weight", "blk.1.ffn_gate_exps.weight", "blk.2.ffn_gate.3.weight"}
    expected |= {"blk.2.ffn_up_exps.weight", "blk.2.ffn_gate_exps.weight"}
    assert set(borrowed) == expected
    assert (
        found.entries["blk.1.ffn_gate_up_exps.weight"].values() == found.entries["blk.1.ffn_up_exps.weight"].values()
    ).all()
    own = found.entries["blk.2.ffn_gate.3.weight"]
    assert own.counts == (4.0,) and (own.values() == found.entries["blk.2.ffn_gate_up_exps.weight"].values()[3:4]).all()
