"""`apex inspect` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from click.testing import CliRunner, Result
from counted import counted
from gguf_model.files import full_entries, write_imatrix, write_legacy
from shapes import TINY, write_header_only

from apex_build.cli import apex
from apex_build.gguf_model.catalogue import Model


def inspect(*arguments: str | Path) -> Result:
    return CliRunner().invoke(apex, ["inspect", *map(str, arguments)], catch_exceptions=False)


def inspect_json(*arguments: str | Path) -> Any:
    result = inspect(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command: Sequence[str | Path] = [sys.executable, "-m", "apex_build", "inspect", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_model(large: Path) -> None:
    out = inspect(large).output
    assert "header only (qwen35moe), F16" in out
    assert "40 in the trunk, 1 in the draft head" in out
    assert "256, 8 active" in out
    assert "20 tensors, 1.69 GB" in out
    assert "35.505 billion parameters in 753 tensors, 71.06 GB, 16.01 bits per weight" in out


def test_a_model_as_json(large: Path) -> None:
    found = inspect_json(large)
    assert (found["kind"], found["architecture"], found["trunk_layers"], found["head_layers"]) == (
        "model",
        "qwen35moe",
        40,
        1,
    )
    shares = {(share["draft_head"], share["role"], share["type"]): share for share in found["shares"]}
    assert shares[False, "routed", "F16"]["tensors"] == 120
    assert shares[True, "nextn", "F16"]["parameters"] == 4096 * 2048
    assert sum(share["bytes"] for share in shares.values()) == found["tensor_bytes"]
    assert len(inspect_json(large, "--tensors")["tensor_list"]) == found["tensors"] == 753


def test_a_72_gb_model_costs_no_more_than_its_header(large: Path, tiny: Path) -> None:
    """Counted, not timed: bytes read and modules imported."""
    assert inspect(tiny).exit_code == 0  # what is imported is imported now
    header = large.stat().st_size - inspect_json(large)["tensor_bytes"]
    with counted() as work:
        assert inspect(large).exit_code == 0
    assert work.read < 3 * header + 100_000 < 100_000_000
    code = (
        f"import sys\nfrom apex_build.cli import main\ntry: main(['inspect', {str(large)!r}])\nfinally: "
        "print(chr(0), *sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    modules = {name.partition(".")[0] for name in ran.stdout.rpartition("\0")[2].split()}
    assert not modules & {"httpx2", "unearth", "requests", "rich", "matplotlib", "torch"}


def test_sizes_are_those_of_the_file(tiny: Path) -> None:
    found = inspect_json(tiny)
    reader = gguf.GGUFReader(tiny)
    assert found["file_bytes"] == tiny.stat().st_size
    assert found["tensor_bytes"] == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert found["parameters"] == sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert "blk.4.nextn.eh_proj.weight" in inspect(tiny, "--tensors").output


def test_the_testbed(testbed: Path) -> None:
    found = inspect_json(testbed)
    assert (found["architecture"], found["head_layers"], found["experts"], found["experts_used"]) == (
        "qwen35moe",
        1,
        8,
        2,
    )
    assert found["head_tensors"] == 20


def test_quantized_types_and_bits_per_weight(tmp_path: Path) -> None:
    path = write_header_only(tmp_path / "q.gguf", TINY, weights="Q4_K", metadata={"general.file_type": 15})
    found = inspect_json(path)
    assert found["file_type"] == "Q4_K_M"
    assert {share["bits_per_weight"] for share in found["shares"] if share["type"] == "Q4_K"} == {4.5}


def test_an_unknown_file_type_is_shown_as_its_number(tmp_path: Path) -> None:
    path = write_header_only(tmp_path / "q.gguf", TINY, metadata={"general.file_type": 999})
    assert inspect_json(path)["file_type"] == "unknown (999)"


def test_a_head_that_is_only_promised(tmp_path: Path) -> None:
    promise = {"qwen35moe.block_count": 5, "qwen35moe.nextn_predict_layers": 1}
    path = write_header_only(tmp_path / "a.gguf", replace(TINY, head_layers=0), metadata=promise)
    assert "promised by the metadata, but none of its tensors is in the file" in inspect(path).output


def test_names_from_the_file_cannot_steer_the_terminal(tmp_path: Path) -> None:
    extra = {"blk.0.[bold]x[/nothing]": (256, 4)}
    path = write_header_only(tmp_path / "a.gguf", TINY, metadata={"general.name": "a\x1b[31mred\rname"}, extra=extra)
    out = inspect(path, "--tensors").output
    assert "\x1b" not in out
    assert r"a\x1b[31mred\rname" in out
    assert "blk.0.[bold]x[/nothing]" in out


# --- imatrix ----------------------------------------------------------------------------------------------------------


def test_an_imatrix_by_itself(tmp_path: Path, tiny_model: Model) -> None:
    path = write_imatrix(tmp_path / "imatrix.gguf", full_entries(tiny_model), head_tokens=1000)
    out = inspect(path).output
    assert "chat.txt, code.txt" in out
    assert "1024 tokens (4 chunks of 256)" in out
    assert "run over 1000 tokens, as the file says" in out
    found = inspect_json(path)
    assert (found["kind"], found["format"], found["tokens"], found["head_tokens"]) == ("imatrix", "gguf", 1024, 1000)
    assert found["coverage"] is None


def test_an_imatrix_against_its_model(tmp_path: Path, tiny: Path, tiny_model: Model) -> None:
    entries = full_entries(tiny_model, head=False)
    entries["blk.1.ffn_up_exps.weight"] = (256, [1000, 0, 1000, 1, 12, 12, 11, 12])
    path = write_imatrix(tmp_path / "imatrix.gguf", entries)
    result = inspect(path, "--model", tiny)
    assert result.exit_code == 0
    assert f"NOT calibrated: 11 of its 11 weights have no data; apex calibrate {tiny}" in result.output
    assert "without data: blk.4.nextn.eh_proj.weight" in result.output
    assert (
        "blk.1.ffn_up_exps.weight: no tokens: experts 1; under 1.00% of an even share (at least 1 tokens): experts 3"
        in result.output
    )
    found = inspect_json(path, "--model", tiny)["coverage"]
    assert found["head_calibrated"] is False
    assert len(found["missing"]) == found["head_weights"] == 11
    (partial,) = found["experts_incomplete"]
    assert partial == {
        "tensor": "blk.1.ffn_up_exps.weight",
        "without_tokens": [1],
        "few_tokens": [3],
        "fewest": 1.0,
        "empty": [],
    }
    few = inspect_json(path, "--model", tiny, "--few", "0.1")["coverage"]["experts_incomplete"][0]["few_tokens"]
    assert few == [3, 4, 5, 6, 7]


def test_long_lists_are_cut_unless_asked_for(tmp_path: Path, tiny: Path, tiny_model: Model) -> None:
    entries = {name: value for name, value in full_entries(tiny_model, head=False).items() if "_shexp" not in name}
    path = write_imatrix(tmp_path / "imatrix.gguf", entries)
    out = inspect(path, "--model", tiny).output
    assert "... and 11 more without data; --tensors lists all" in out
    assert "blk.4.attn_v.weight" not in out
    assert inspect(path, "--model", tiny, "--tensors").output.count("without data: ") == 23


def test_a_calibrated_head(tmp_path: Path, tiny: Path, tiny_model: Model) -> None:
    path = write_imatrix(tmp_path / "imatrix.gguf", full_entries(tiny_model), head_tokens=1000)
    assert "calibrated over 1000 tokens: all of its 11 weights have data" in inspect(path, "--model", tiny).output


def test_a_legacy_imatrix(tmp_path: Path) -> None:
    out = inspect(write_legacy(tmp_path / "i.dat", {"blk.0.attn_q.weight": (3, [1.0] * 256)})).output
    assert "legacy .dat" in out
    assert "wiki.txt" in out
    assert "7 chunks; the format does not record their size" in out


# --- bad input: message, exit code, nothing left behind ---------------------------------------------------------------


def cut(path: Path) -> Path:
    os.truncate(path, path.stat().st_size // 2)
    return path


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        (None, 40, "no such file"),
        (b"", 41, "the file is empty"),
        (b"\0" * 4096, 41, "header is all zeros"),
        (b"PK\x03\x04 and so on, for a while", 41, "not a GGUF file"),
        (b"GGUF\x03\0\0\0", 41, "truncated or damaged"),
    ],
)
def test_a_bad_file(tmp_path: Path, data: bytes | None, code: int, message: str) -> None:
    path = tmp_path / "ein Modell, größer.gguf"
    if data is not None:
        path.write_bytes(data)
    before = sorted(tmp_path.iterdir())
    result = run(path)
    assert result.returncode == code
    assert message in result.stderr
    assert str(path) in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert sorted(tmp_path.iterdir()) == before


def test_a_truncated_model(tiny: Path) -> None:
    result = run(cut(tiny))
    assert (result.returncode, "truncated: expected" in result.stderr) == (41, True)


def test_a_damaged_imatrix(tmp_path: Path, tiny_model: Model) -> None:
    path = write_imatrix(tmp_path / "i.gguf", full_entries(tiny_model))
    data = bytearray(path.read_bytes())
    data[-1000:-996] = b"\0\0\xc0\x7f"  # a NaN among the values of the last entry
    path.write_bytes(data)
    result = run(path)
    assert result.returncode == 42
    assert "is nan" in result.stderr


def test_an_imatrix_of_another_model(tmp_path: Path, tiny: Path) -> None:
    path = write_imatrix(tmp_path / "i.gguf", {"blk.0.time_mix_key.weight": (64, [9])})
    result = run(path, "--model", tiny)
    assert result.returncode == 43
    assert "belongs to another model" in result.stderr
    assert f"try:   apex calibrate {tiny}" in result.stderr


def test_a_model_where_an_imatrix_belongs(tiny: Path) -> None:
    result = run(tiny, "--model", tiny)
    assert result.returncode == 2
    assert "--model is for an imatrix" in result.stderr


def test_help_shows_examples() -> None:
    assert "apex inspect imatrix.gguf --model model-F16.gguf" in inspect("--help").output
