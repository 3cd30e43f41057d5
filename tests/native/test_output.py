"""The parsers, on real output of the pinned tree's tools (tests/native/captured)."""

from __future__ import annotations

from pathlib import Path

import pytest

from apex_build import places
from apex_build.native import output

CAPTURED = Path(__file__).parent / "captured"


def captured(name: str) -> list[str]:
    return (CAPTURED / f"{name}.txt").read_text(encoding="utf-8").split("\n")


def only(values: list[object]) -> object:
    found = [value for value in values if value is not None]
    assert len(found) == 1
    return found[0]


def test_imatrix() -> None:
    lines = captured("imatrix")
    assert only([output.planned(line) for line in lines]) == output.Planned(
        chunks=12, context=256, batch=512, sequences=2
    )
    assert [done for line in lines if (done := output.chunks_done(line)) is not None] == [8, 12]
    assert only([output.perplexity(line) for line in lines]) == output.Perplexity(2122.1942, 17.12078)


def test_imatrix_without_perplexity_counts_no_chunks_if_it_is_not_patched() -> None:
    lines = captured("imatrix-no-ppl")
    assert only([output.planned(line) for line in lines]) == output.Planned(12, 256, 512, 2)
    assert not any(output.chunks_done(line) for line in lines)


def test_perplexity() -> None:
    lines = captured("perplexity")
    assert only([output.planned(line) for line in lines]) == output.Planned(12, 256, 2048, 8)
    assert [done for line in lines if (done := output.chunks_done(line)) is not None] == [12]
    assert only([output.perplexity(line) for line in lines]) == output.Perplexity(2135.1334, 17.80566)


def test_kl_divergence_rows_count_chunks() -> None:
    lines = captured("kl-divergence")
    assert only([output.planned(line) for line in lines]) == output.Planned(4, 256, 2048, 8)
    assert [done for line in lines if (done := output.chunks_done(line)) is not None] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("line", "done"),
    [
        ("[1]5.3412,[2]6.0", 1),  # the second is not finished
        ("[1]5.3412,[2]6.0102,", 2),
        ("[7]nan,", 7),
        ("[7],[8],[9", 8),
        ("[  12/ 733] blk.0.attn_q.weight - [ 256, 128, 1, 1]", None),
        ("[", None),
        ("", None),
    ],
)
def test_unfinished_lines(line: str, done: int | None) -> None:
    assert output.chunks_done(line) == done


def test_dry_run_lists_every_tensor_with_its_type() -> None:
    lines = captured("quantize-dry-run")
    tensors = output.tensor_lines(lines)
    assert [tensor.number for tensor in tensors] == list(range(1, 13))
    by_name = {tensor.name: tensor for tensor in tensors}
    assert by_name["output.weight"] == output.TensorLine(
        1, 12, "output.weight", (96, 32, 1, 1), "F16", "Q8_0", 0.01, 0.0
    )
    assert by_name["blk.0.attn_norm.weight"].target == "F32"
    assert by_name["blk.0.ffn_down.weight"].target == "F16"
    assert output.quantized_size(lines) == (0.06, 7.52)


def test_a_real_run_lists_the_same_as_its_dry_run() -> None:
    real = [(tensor.name, tensor.target) for tensor in output.tensor_lines(captured("quantize"))]
    assert real == [(tensor.name, tensor.target) for tensor in output.tensor_lines(captured("quantize-dry-run"))]


def test_fallbacks_are_named() -> None:
    found = output.fallbacks(captured("quantize-dry-run"))
    assert len(found) == 8
    assert found[1] == output.Fallback("blk.0.attn_k.weight", 96, 256, "Q4_K", "Q5_0")
    assert found[5] == output.Fallback("blk.0.ffn_down.weight", 100, 256, "Q6_K", "F16")


def test_tensors_without_data_are_marked_though_their_line_is_in_two_halves() -> None:
    tensors = {tensor.name: tensor for tensor in output.tensor_lines(captured("quantize-head-without-data"))}
    assert tensors["blk.6.nextn.eh_proj.weight"].without_data
    assert tensors["blk.6.nextn.eh_proj.weight"].target == "Q4_K"
    assert not tensors["blk.6.nextn.enorm.weight"].without_data
    assert output.tensors_done(
        "[ 130/ 134] blk.6.nextn.eh_proj.weight           - [   512,    256,      1,      1], type =    f16, "
    ) == (
        130,
        134,
        "blk.6.nextn.eh_proj.weight",
    )


@pytest.mark.parametrize(
    ("name", "diagnosis"),
    [
        ("quantize-no-imatrix", "blk.0.attn_gate.weight has no calibration data"),
        ("quantize-missing-data", "blk.6.attn_q.weight has no calibration data"),
        ("unknown-option", "does not know --mtp"),
        ("text-too-short", "1024 tokens are needed"),
        ("server-damaged-model", "cut short or damaged"),
    ],
)
def test_failures_are_explained(name: str, diagnosis: str) -> None:
    explained = output.explain(captured(name))
    assert explained
    assert diagnosis in explained[0]


def test_the_hint_for_what_is_too_new_names_a_newer_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    """It never suggests the pin in use."""
    for line in ("unknown model architecture: 'new'", "unknown pre-tokenizer type: 'new'"):
        monkeypatch.delenv("APEX_PIN", raising=False)
        assert str((output.explain([line]) or ("", ""))[1]).startswith(
            "apex build --pin latest, then run the same command with APEX_PIN=latest"
        )
        monkeypatch.setenv("APEX_PIN", "latest")
        hint = str((output.explain([line]) or ("", ""))[1])
        assert hint.startswith("apex pin add next --pypi VERSION, of a newer llama.cpp, then apex build --pin next")
        assert "--pin latest" not in hint
    assert places.newer_converter("latest").endswith("then apex convert --pin next")
    assert places.newer_converter("pr-22673") == "apex convert --pin latest"


def test_a_good_run_is_not_explained() -> None:
    assert output.explain(captured("imatrix")) is None


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("  CUDA0: NVIDIA H200 (143167 MiB, 142559 MiB free)", "NVIDIA H200"),
        ("  CUDA1: NVIDIA GeForce RTX 4090 (24081 MiB, 23700 MiB free)", "NVIDIA GeForce RTX 4090"),
        ("  Vulkan0: Intel(R) Arc(TM) Graphics (ARL) (15000 MiB, 9 MiB free)", "Intel(R) Arc(TM) Graphics (ARL)"),
        ("Available devices:", None),
        ("  Device 0: NVIDIA H200, compute capability 9.0, VMM: yes, VRAM: 143167 MiB", None),
    ],
)
def test_listed_devices(line: str, name: str | None) -> None:
    assert output.device_listed(line) == name
