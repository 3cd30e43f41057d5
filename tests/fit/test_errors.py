"""Errors of types: a sample against all rows, and what a kill leaves."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shapes import write_header_only

from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.model import read_model
from apex_build.native.ggml import Ggml
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins
from apex_build.progress import Step, silent
from apex_build.quantization.data import Data, read_data

sys.path.insert(0, str(Path(__file__).parents[2] / "plugins"))
errors: Any = importlib.import_module("fit.errors")

QUICK = ("Q3_K", "Q4_K", "Q6_K", "Q8_0")
SOME = ("blk.0.ffn_down_exps.weight", "blk.3.attn_q.weight", "blk.2.ffn_up_shexp.weight", "token_embd.weight")


@pytest.fixture
def model(testbed: Path) -> Model:
    return read_model(testbed, load_plugins().role_of)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, tools: Toolset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APEX_CACHE_DIR", str(tmp_path / "cache"))


def work(model: Model, tools: Toolset, data: Data | None = None, **changed: Any) -> Any:
    types = dict.fromkeys(SOME, QUICK)
    return errors.Work(model, data, tools, types, **changed)


def test_a_sample_agrees_with_all_rows(model: Model, tools: Toolset, calibrated: Path) -> None:
    """Within three deviations, as the sample itself states them, of every type on every tensor."""
    data = read_data(calibrated, model)
    everything = errors.measure(work(model, tools, data, sample=1 << 30), threads=1, report=silent)
    sampled = errors.measure(work(model, tools, data, sample=1 << 14), threads=2, report=silent)
    off = []
    for name in SOME:
        for kind in QUICK:
            whole, part = everything[name][kind], sampled[name][kind]
            assert whole.deviation == 0 and part.deviation > 0
            off.append((part.error - whole.error) / part.deviation)
    assert max(map(abs, off)) < 3.5 and 0.3 < float(np.std(off)) < 1.7


def test_what_is_measured_is_kept_line_by_line(model: Model, tools: Toolset) -> None:
    wanted = work(model, tools, sample=1 << 12)
    first = errors.measure(wanted, threads=1, report=silent)
    lines = wanted.kept.read_text("utf-8").splitlines()
    cut = [line for line in lines if line][:5]
    wanted.kept.write_text("\n".join([*cut, cut[0][:9]]), encoding="utf-8")  # as a kill would leave it
    again = errors.measure(wanted, threads=1, report=silent)
    assert first == again
    kept = [json.loads(line) for line in wanted.kept.read_text("utf-8").splitlines() if line.endswith("]")]
    assert len(kept) == len(SOME) * len(QUICK)


def test_ctrl_c_keeps_what_is_there(model: Model, tools: Toolset) -> None:
    wanted = work(model, tools, sample=1 << 12)

    def interrupt(step: Step) -> None:
        if step.done > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        errors.measure(wanted, threads=1, report=interrupt)
    there = sum(map(len, errors.read_kept(wanted.kept).values()))
    assert there > 0
    errors.measure(wanted, threads=1, report=silent)
    assert errors.expected(wanted, 1).seconds == 0


def test_the_time_is_said_before(model: Model, tools: Toolset) -> None:
    one, two = (errors.expected(work(model, tools), threads).seconds for threads in (1, 2))
    assert one == pytest.approx(2 * two) and two > 0


def test_candidates_fit_the_shape_and_the_data(model: Model, tools: Toolset, headless_imatrix: Path) -> None:
    ggml, data = Ggml(tools), read_data(headless_imatrix, model)
    tensors = {tensor.name: tensor for tensor in model.tensors}
    of = {name: errors.candidates(tensors[name], ggml, data) for name in tensors if len(tensors[name].shape) > 1}
    assert "IQ2_XXS" in of["blk.0.ffn_up_exps.weight"] and "IQ4_NL" not in of["blk.0.ffn_up_exps.weight"]
    assert of["blk.6.ffn_up_exps.weight"] == ("Q8_0",)  # the head has no data: any other type would use some
    assert "IQ2_XXS" not in of["token_embd.weight"] and "Q2_K" in of["token_embd.weight"]
    short = replace(tensors["blk.0.ffn_up_exps.weight"], shape=(96, 256, 8))
    assert set(errors.candidates(short, ggml, data)) == {"IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
    assert errors.candidates(replace(short, shape=(40, 256, 8)), ggml, data) == ()
    assert errors.candidates(tensors["output.weight"], ggml, None, ("Q4_K", "IQ2_XXS")) == ("Q4_K",)


def test_memory_is_bounded_whatever_the_shapes(tmp_path: Path) -> None:
    """Of the 35B-A3B: what one thread holds at a time is a sample of one matrix, as numbers and weighed, some times."""
    path = write_header_only(tmp_path / "35b-a3b.gguf")
    large = read_model(path, load_plugins().role_of)
    pieces = []
    for tensor in (one for one in large.tensors if len(one.shape) > 1):
        of_matrix, rows = errors._rows(tensor, errors.SAMPLE)
        assert rows * tensor.shape[0] <= max(errors.SAMPLE + tensor.shape[0], tensor.n_elements // tensor.shape[1])
        pieces.append(of_matrix * tensor.shape[0] * 32)
    assert 64 * max(pieces) < 2 << 30  # on 64 threads
