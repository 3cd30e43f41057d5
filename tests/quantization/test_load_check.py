"""Models that no tool can load are reported before any work, and by inspect."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import gguf_edit
import pytest
from apex_runs import SMALL, run_apex

from apex_build.errors import LoadFailed
from apex_build.native.toolset import Toolset
from apex_build.quantization.load_check import check_loads


def broken(kind: str, testbed: Path, folder: Path) -> Path:
    out = folder / f"{kind}.gguf"
    if kind == "tensors-without-key":
        return gguf_edit.copy(testbed, out, keys={"qwen35moe.nextn_predict_layers": None})
    if kind == "key-without-tensors":
        return gguf_edit.copy(testbed, out, keys={}, drop=gguf_edit.HEAD)
    if kind == "pre-tokenizer":
        gguf_edit.copy(testbed, out, keys={})
        data = bytearray(out.read_bytes())
        at = data.index(b"tokenizer.ggml.pre") + len("tokenizer.ggml.pre") + 4 + 8
        data[at : at + 5] = b"xxxxx"
        out.write_bytes(data)
        return out
    return gguf_edit.copy(testbed, out, keys={}, drop="blk.2.attn_qkv")


KINDS = {
    "tensors-without-key": "but no key qwen35moe.nextn_predict_layers",
    "key-without-tensors": "declares a draft head",
    "pre-tokenizer": "pre-tokenizer",
    "tensor-missing": "llama-perplexity was ended",
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_loaded_is_told_before_the_hours(
    kind: str, testbed: Path, tmp_path: Path, tools: Toolset
) -> None:
    model = broken(kind, testbed, tmp_path)
    for more in ([], ["--dry-run"]):
        ran = run_apex("quantize", model, "--policy", "compact", *SMALL, "-o", tmp_path / "x.gguf", *more, code=46)
        assert f"{model}: llama.cpp cannot load it" in ran.stderr and "try:" in ran.stderr
        assert KINDS[kind] in ran.stderr
    assert not (tmp_path / "x.gguf").exists() and not (tmp_path / ".x.gguf.part").exists()
    if kind != "tensor-missing":
        said = run_apex("inspect", model)
        assert "cannot load it" in said.stdout and KINDS[kind] in said.stdout
        assert json.loads(run_apex("inspect", model, "--json").stdout)["unsound"]


def test_the_check_can_be_left_out(testbed: Path, tmp_path: Path, tools: Toolset) -> None:
    model = broken("tensors-without-key", testbed, tmp_path)
    ran = run_apex("quantize", model, "--policy", "compact", *SMALL, "-o", tmp_path / "x.gguf", "--no-load-check")
    assert (
        f"warning: llama.cpp cannot load {model}" in ran.stderr
        and "no key qwen35moe.nextn_predict_layers" in ran.stderr
    )
    assert (tmp_path / "x.gguf").exists()
    assert json.loads(run_apex("inspect", testbed, "--json").stdout)["unsound"] == []


def test_weights_are_not_read(tools: Toolset, testbed: Path, tmp_path: Path) -> None:
    check_loads(testbed, tools)
    header = gguf.GGUFReader(testbed)
    start = min(int(tensor.data_offset) for tensor in header.tensors)
    sparse = tmp_path / "holes.gguf"
    sparse.write_bytes(testbed.read_bytes()[:start])
    with pytest.raises(LoadFailed):
        check_loads(sparse, tools)
    with sparse.open("r+b") as file:
        file.truncate(testbed.stat().st_size)
    check_loads(sparse, tools)
