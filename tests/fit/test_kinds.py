"""apex fit on models of other kinds, end to end: dense with tied embeddings, experts without shared ones. And stopped
in the parts that test_verb.py does not stop it in.
"""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from apex_runs import run_apex
from gates import ended_at_gate, gated
from gguf_edit import copy
from gguf_model.files import full_entries, write_imatrix
from shapes import write_header_only

from apex_build.gguf_model.model import read_model
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins

pytestmark = [pytest.mark.usefixtures("tools"), pytest.mark.slow]

QUICK = ("--chunks", "2", "--check-chunks", "2", "--sample", "8192", "--threads", "1", "--no-head-score", "--no-tiers")
K_QUANTS = "Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,Q8_0"


def random_experts(vocabulary: Path, out: Path) -> Path:
    """A qwen3moe of two layers with random weights: no shared experts, no draft head."""
    reader = gguf.GGUFReader(vocabulary)
    writer = gguf.GGUFWriter(out, "qwen3moe")
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            kind = field.types[0]
            sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=sub_type)
    writer.add_block_count(2)
    writer.add_context_length(4096)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(64)
    writer.add_value_length(64)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(256)
    random = np.random.default_rng(5)

    def add(name: str, *shape: int, plain: bool = False) -> None:  # in NumPy's order
        values = np.ones(shape) if len(shape) == 1 else random.normal(0, shape[-1] ** -0.5, shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32 if plain or len(shape) == 1 else np.float16))

    tokens = len(reader.fields["tokenizer.ggml.tokens"].data)
    add("token_embd", tokens, 256)
    add("output", tokens, 256)
    add("output_norm", 256)
    for layer in range(2):
        for name, *shape in (
            ("attn_norm", 256), ("attn_q", 256, 256), ("attn_k", 128, 256), ("attn_v", 128, 256),
            ("attn_output", 256, 256), ("attn_q_norm", 64), ("attn_k_norm", 64), ("ffn_norm", 256),
            ("ffn_gate_exps", 4, 256, 256), ("ffn_up_exps", 4, 256, 256), ("ffn_down_exps", 4, 256, 256),
        ):  # fmt: skip
            add(f"blk.{layer}.{name}", *shape)
        add(f"blk.{layer}.ffn_gate_inp", 4, 256, plain=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture
def own_cache(tools: Toolset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In which nothing is measured."""
    monkeypatch.setenv("APEX_TOOLS", str(tools.bin))
    monkeypatch.setenv("APEX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fitted(model: Path, heldout: Path, *more: object) -> dict[str, Any]:
    imatrix = model.with_suffix(".imatrix.gguf")
    if not imatrix.exists():
        run_apex("calibrate", model, "-o", imatrix, "--chunks", 4, "--threads", 1)
    given = ["fit", model, "--imatrix", imatrix, "--text", heldout / "chat.txt", *QUICK, *more, "--json"]
    found: dict[str, Any] = json.loads(run_apex(*given).stdout)
    return found


def test_a_dense_model_with_tied_embeddings(testbed: Path, heldout: Path, own_cache: Path, tmp_path: Path) -> None:
    """Its table is embedding and output in one, probed as both. And probes that noise hides get more text."""
    dense = testbed.with_name("testbed-dense-f16.gguf")
    model = copy(dense, tmp_path / "tied.gguf", keys={}, drop="output.weight")
    out = tmp_path / "tied-fit.gguf"
    found = fitted(model, heldout, "--types", K_QUANTS, "--target-bpw", 4, "--probe-budget", 8, "-o", out)
    (row,) = found["rows"]
    assert row["n_bytes"] == out.stat().st_size and row["predicted"] > 0 < row["measured"]
    made = read_model(out, load_plugins().role_of)
    assert made.metadata["apex.policy"] == "fit" and "output.weight" not in {one.name for one in made.tensors}
    measured = json.loads(Path(found["measurement"]).read_text("utf-8"))
    table = measured["tensors"]["token_embd.weight"]["sensitivity"]
    assert set(table["measured"]) == set(K_QUANTS.split(","))
    positions = sorted({one["positions"] for one in measured["probes"]})
    assert positions == [2 * 255, 4 * 255], "some probes have had more chunks"
    assert sum(one["positions"] == positions[1] for one in measured["probes"]) == 4, "8 evaluations of a chunk"


def test_experts_without_shared_ones(testbed: Path, heldout: Path, own_cache: Path, tmp_path: Path) -> None:
    model = random_experts(testbed, tmp_path / "experts.gguf")
    found = fitted(model, heldout, "--types", K_QUANTS, "--target-bpw", 4.5, "-o", tmp_path / "experts-fit.gguf")
    (row,) = found["rows"]
    assert row["predicted"] > 0 < row["measured"] and row["agreement"] is None
    measured = json.loads(Path(found["measurement"]).read_text("utf-8"))
    groups = {one["sensitivity"]["group"] for one in measured["tensors"].values()}
    assert {"blk.0.routed.up", "blk.1.routed.down", "blk.0.attention", "token_embd", "output"} == {*groups} - {
        "blk.1.routed.up",
        "blk.0.routed.down",
        "blk.1.attention",
    }
    assert measured["draft_head"] == []


@pytest.fixture
def quick(testbed: Path, calibrated: Path, heldout: Path) -> list[str]:
    given = ["fit", str(testbed), "--imatrix", str(calibrated), "--text", str(heldout / "chat.txt"), *QUICK]
    return [*given, "--target-size", "8MiB"]


def test_a_measurement_of_another_model(quick: list[str], other: Any, tmp_path: Path) -> None:
    """Of one of the same shapes: used as it is, with a warning that names it. Of other shapes or another build: not."""
    out = tmp_path / "fit.gguf"
    at = other(model="0" * 64)
    before = at.read_bytes()
    ran = run_apex(*quick, "--measurement", at, "-o", out)
    assert "measured on another model with the same tensor shapes, another-F16.gguf" in ran.stderr
    assert "measured before" in ran.stderr and "measuring errors" not in ran.stderr
    assert out.stat().st_size <= 8 << 20 and at.read_bytes() == before
    for wrong, says in (
        ({"model": "0" * 64, "shapes": "0" * 64}, "belongs to another model, another-F16.gguf"),
        ({"tools": "0" * 64}, "made with another build of the tools"),
    ):
        at = other(**wrong)
        before = at.read_bytes()
        ran = run_apex(*quick, "--measurement", at, "-o", tmp_path / "no.gguf", code=67)
        assert says in ran.stderr and "--measurement NEW" in ran.stderr and at.read_bytes() == before
    assert not (tmp_path / "no.gguf").exists()


def test_it_is_stopped_where_it_writes_and_where_it_checks(
    quick: list[str], other: Any, tools: Toolset, tmp_path: Path
) -> None:
    """The same command again: a file that is not whole is not there, a whole one is not written twice."""
    out = tmp_path / "fit.gguf"
    wanted = [*quick, "--measurement", str(other(model="0" * 64)), "-o", str(out)]
    with gated(tools, tmp_path / "writing", "llama-quantize", having="--override-kv") as gate:
        for how in (signal.SIGKILL, signal.SIGINT):
            ended_at_gate(gate, wanted, how)
            assert not out.exists()
    with gated(tools, tmp_path / "checking", "llama-perplexity", having="--kl-divergence") as gate:
        for how in (signal.SIGINT, signal.SIGKILL):
            ended_at_gate(gate, wanted, how)
            assert out.exists()
    found = json.loads(run_apex(*wanted, "--json").stdout)
    assert found["file"]["reused"] and found["rows"][0]["measured"] > 0
    assert sorted(path.name for path in tmp_path.glob("fit.gguf*")) == ["fit.gguf", "fit.gguf.json", "fit.gguf.log"]


def test_the_times_of_the_35b_a3b_are_said_before(tmp_path: Path, heldout: Path, own_cache: Path) -> None:
    """From the header alone. Probes of whole files quantize all of it, which is dear at i-quants."""
    path = write_header_only(tmp_path / "35b-a3b.gguf")
    model = read_model(path, load_plugins().role_of)
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", full_entries(model), head_tokens=1024)
    given = ["fit", path, "--imatrix", imatrix, "--text", heldout / "chat.txt", "--target-bpw", 3, "--dry-run"]
    shown = run_apex(*given).stderr
    assert "errors of 443 tensors: about" in shown and "together: about" in shown
    minutes = []
    for types in ("Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,Q8_0", ""):
        found = json.loads(run_apex(*given, "--types", types, "--json").stdout)
        assert found["probes"] > 240 and "about" in found["errors"]
        said = re.fullmatch(r"about (?:(\d+) h ?)?(?:(\d+) min)?.*", found["probing"])
        assert said
        minutes.append(60 * int(said[1] or 0) + int(said[2] or 0))
    assert 1.1 * minutes[0] < minutes[1] < 4 * minutes[0]
