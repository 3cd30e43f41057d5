"""Compare a written file with its source: ruined weights are found and named for every type; normal rounding is not
reported.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_model.files import read

from apex_build.errors import VerificationFailed
from apex_build.gguf_model.header import read_header
from apex_build.gguf_model.imatrix import read_imatrix
from apex_build.native.tensor_data import Codec, codec
from apex_build.native.toolset import Toolset
from apex_build.policy.plan import Plan, make_plan
from apex_build.quantization import against
from apex_build.quantization.type_errors import ERRORS, far_over

# one tensor of each kind of type, routed experts among them
RULES = {
    "Q8_0": "attn_q",
    "Q6_K": "attn_output",
    "Q4_K": "ffn_up_exps",
    "IQ4_NL": "ffn_up_shexp",
    "IQ2_XXS": "ffn_gate_exps",
}


@pytest.fixture(scope="module")
def made(
    testbed: Path, calibrated: Path, tools: Toolset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Plan]:
    """The testbed with several types, made by llama-quantize, and its plan."""
    folder = tmp_path_factory.mktemp("made")
    return quantized(testbed, calibrated, tools, folder)


def quantized(testbed: Path, imatrix: Path, tools: Toolset, folder: Path) -> tuple[Path, Plan]:
    from apex_build.hookspecs import PolicySpec

    (folder / "t.jinja").write_text("".join(f"^blk\\.\\d+\\.{part}\\.weight$={kind}\n" for kind, part in RULES.items()))
    policy = PolicySpec("mine", folder / "t.jinja", "Q3_K_S")
    plan = make_plan(read(testbed), policy, {}, tools, imatrix)
    (folder / "rules").write_text(plan.rules)
    command = [
        tools.tool("llama-quantize"),
        "--imatrix",
        imatrix,
        "--tensor-type-file",
        folder / "rules",
        testbed,
        folder / "q.gguf",
    ]
    subprocess.run([str(part) for part in [*command, "Q3_K_S", 1]], check=True, capture_output=True)
    return folder / "q.gguf", plan


def rows_of(path: Path, name: str) -> np.memmap:
    header = read_header(path)
    (tensor,) = (tensor for tensor in header.tensors if tensor.name == name)
    shape = tensor.shape[:0:-1] or (1,)
    return np.memmap(
        path, np.uint8, "r+", header.data_offset + tensor.offset, (*shape, tensor.n_bytes // int(np.prod(shape)))
    )


def check(path: Path, plan: Plan, testbed: Path, imatrix: Path, tools: Toolset) -> None:
    against.check_against(read_header(path), plan, read(testbed), read_imatrix(imatrix), tools)


def test_a_good_file_passes(made: tuple[Path, Plan], testbed: Path, calibrated: Path, tools: Toolset) -> None:
    check(*made, testbed, calibrated, tools)


def test_types_without_a_decoder_are_named(
    made: tuple[Path, Plan], tools: Toolset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All current types have one: ask the library for a name it lacks, like an older library lacks a newer type."""
    reading, plan = codec(tools), made[1]
    assert against.not_compared(plan, reading) == []
    older = Codec._decoder
    monkeypatch.setattr(Codec, "_decoder", lambda self, name: older(self, "IQ9_XXS" if name == "IQ2_XXS" else name))
    (line,) = against.not_compared(plan, reading)
    count = sum(entry.type == "IQ2_XXS" for entry in plan.entries)
    assert (
        "does not decode IQ2_XXS: blk.0.ffn_gate_exps.weight and" in line
        and f"{count - 1} others will not be compared" in line
    )


def zero_expert(data: np.memmap) -> None:
    data[3] = 0


def ruined_rows(data: np.memmap) -> None:
    data[2, 40:43] = np.random.default_rng(0).integers(0, 256, data[2, 40:43].shape)


def zero_row(data: np.memmap) -> None:
    data[5, 77] = 0


def shifted(data: np.memmap) -> None:
    data[:] = np.roll(np.array(data), 1, axis=0)


@pytest.mark.parametrize("kind", ["Q4_K", "IQ2_XXS"])
@pytest.mark.parametrize(
    ("ruin", "where"), [(zero_expert, "matrix 3"), (ruined_rows, "matrix 2"), (zero_row, "row 77"), (shifted, "")]
)
def test_ruined_experts(
    ruin: Callable[[np.memmap], None],
    where: str,
    kind: str,
    made: tuple[Path, Plan],
    testbed: Path,
    calibrated: Path,
    tools: Toolset,
    tmp_path: Path,
) -> None:
    path, plan = made
    bad = Path(shutil.copy(path, tmp_path))
    ruin(rows_of(bad, f"blk.2.{RULES[kind]}.weight"))
    with pytest.raises(VerificationFailed, match=rf"blk\.2\.{RULES[kind]}\.weight \({kind}\).*{where}"):
        check(bad, plan, testbed, calibrated, tools)


def test_swapped_tensors_and_copies_that_are_none(
    made: tuple[Path, Plan], testbed: Path, calibrated: Path, tools: Toolset, tmp_path: Path
) -> None:
    path, plan = made
    for name in ("ffn_up_shexp.weight", "post_attention_norm.weight", "ffn_gate_inp.weight"):
        bad = Path(shutil.copy(path, tmp_path))
        one, other = rows_of(bad, f"blk.1.{name}"), rows_of(bad, f"blk.2.{name}")
        kept = np.array(one)
        one[:] = other
        other[:] = kept
        one.flush()
        other.flush()
        with pytest.raises(VerificationFailed, match=rf"blk\.1\.{name}"):
            check(bad, plan, testbed, calibrated, tools)


def test_a_row_of_zeros_is_found_in_a_model_too_large_to_compare(
    made: tuple[Path, Plan],
    testbed: Path,
    calibrated: Path,
    tools: Toolset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, plan = made
    monkeypatch.setattr(against, "COMPARED", 1000)  # four rows of each expert
    check(path, plan, testbed, calibrated, tools)
    bad = Path(shutil.copy(path, tmp_path))
    for row in range(64):
        data = rows_of(bad, "blk.4.ffn_up_exps.weight")
        kept = np.array(data)
        data[7, row] = 0
        data.flush()
        with pytest.raises(VerificationFailed, match=rf"blk\.4\.ffn_up_exps\.weight.*matrix 7 of 8, row {row}:"):
            check(bad, plan, testbed, calibrated, tools)
        data[:] = kept
        data.flush()


@pytest.mark.parametrize("run", [16, 32, 128, 256])
def test_zeros_in_the_imatrix_that_reach_llama_quantize_are_found_in_the_file(
    run: int, testbed: Path, calibrated: Path, tools: Toolset, tmp_path: Path
) -> None:
    """Like running llama-quantize by hand: some type in the file loses the columns."""
    ruined = Path(shutil.copy(calibrated, tmp_path / "ruined.gguf"))
    header = read_header(ruined)
    for tensor in header.tensors:
        if tensor.name.endswith(".in_sum2") and tensor.name.startswith("blk.3."):
            data = np.memmap(ruined, "<f4", "r+", header.data_offset + tensor.offset, tensor.shape[::-1])
            data[..., :run] = 0
    path, plan = quantized(testbed, ruined, tools, tmp_path)
    with pytest.raises(VerificationFailed, match=r"blk\.3\..*(columns \d+ to \d+ are lost|its error is)"):
        check(path, plan, testbed, ruined, tools)


def test_the_errors_of_types_are_as_written_down(tools: Toolset) -> None:
    """Measured again, on fewer rows. Skips types whose tables take seconds to set up; run them when you change them."""
    random = np.random.default_rng(1)
    rows = random.normal(0, 0.02, (64, 512)).astype(np.float32)
    own = codec(tools)
    for name, error in ERRORS.items():
        if name.startswith(("IQ1", "IQ2", "IQ3")) or name not in gguf.GGMLQuantizationType.__members__:
            continue
        again = own.decode(name, own.encode(name, rows, None), 512)
        assert again is not None
        measured = float(np.sqrt(np.square(again - rows).sum() / np.square(rows).sum()))
        assert measured == pytest.approx(error, rel=0.1, abs=0.0003), name
        assert far_over(name) < 1 and (error == 0 or far_over(name) > error)
