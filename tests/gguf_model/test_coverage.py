"""How an imatrix covers a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from gguf_model.files import Entries, full_entries, read, run_imatrix, write_imatrix, write_legacy
from shapes import TINY, write_header_only

from apex_build.errors import ImatrixMismatch
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.coverage import FEW, Coverage, coverage
from apex_build.gguf_model.imatrix import read_imatrix
from apex_build.native.toolset import Toolset

EXPERTS = "blk.1.ffn_up_exps.weight"


def covered(
    folder: Path,
    model: Model,
    changed: Entries | None = None,
    *,
    head: bool = True,
    head_tokens: int | None = None,
    left_out: str = "",
    threshold: float = FEW,
) -> Coverage:
    """Coverage by an imatrix with even data for everything except the given tensors."""
    entries = {**full_entries(model, head=head), **(changed or {})}
    entries.pop(left_out, None)
    path = write_imatrix(folder / "imatrix.gguf", entries, head_tokens=head_tokens)
    return coverage(read_imatrix(path), model, threshold)


def test_everything_has_data(tmp_path: Path, tiny_model: Model) -> None:
    found = covered(tmp_path, tiny_model, head_tokens=1000)
    assert (found.missing, found.partial, found.unused) == ((), (), ())
    assert (found.head_calibrated, found.head_tokens) == (True, 1000)
    names = {tensor.name for tensor in found.tensors}
    assert {"blk.4.nextn.eh_proj.weight", "blk.0.ssm_out.weight", EXPERTS} <= names
    assert not names & {
        "token_embd.weight",
        "output.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.0.ssm_conv1d.weight",
        "blk.0.ssm_a",
    }
    assert len(found.head) == 11


def test_the_head_was_not_run(tmp_path: Path, tiny_model: Model) -> None:
    found = covered(tmp_path, tiny_model, head=False)
    assert (found.head_calibrated, found.head_tokens) == (False, None)
    assert set(found.missing) == {tensor.name for tensor in found.head}


def test_one_weight_of_the_head_lacks_data(tmp_path: Path, tiny_model: Model) -> None:
    found = covered(tmp_path, tiny_model, left_out="blk.4.nextn.eh_proj.weight")
    assert found.missing == ("blk.4.nextn.eh_proj.weight",)
    assert found.head_calibrated is False


def test_head_tokens_without_the_patch_are_those_its_dense_weights_saw(tmp_path: Path, tiny_model: Model) -> None:
    assert covered(tmp_path, tiny_model).head_tokens == 1024


def test_a_model_without_a_head(tmp_path: Path) -> None:
    model = read(write_header_only(tmp_path / "a.gguf", replace(TINY, head_layers=0)))
    assert covered(tmp_path, model).head_calibrated is None


def test_experts_with_no_tokens_and_with_few(tmp_path: Path, tiny_model: Model) -> None:
    counts = [1000.0, 0.0, 600.0, 4.0, 5.0, 200.0, 0.0, 239.0]  # the even share is 256
    found = covered(tmp_path, tiny_model, {EXPERTS: (256, counts)}, threshold=4.5 / 256)
    (tensor,) = found.partial
    assert (tensor.name, tensor.experts, tensor.without_tokens, tensor.few_tokens) == (EXPERTS, 8, (1, 6), (3,))
    assert tensor.has_data
    assert covered(tmp_path, tiny_model, {EXPERTS: (256, counts)}).partial[0].few_tokens == ()
    assert found.missing == ()


def test_an_entry_without_any_token_is_no_data(tmp_path: Path, tiny_model: Model) -> None:
    dense = "blk.0.attn_gate.weight"
    found = covered(tmp_path, tiny_model, {EXPERTS: (256, [0.0] * 8), dense: (256, [0.0])})
    assert set(found.missing) == {EXPERTS, dense}
    assert found.partial == ()


def test_one_count_for_all_experts(tmp_path: Path, tiny_model: Model) -> None:
    """As in a GGUF imatrix converted from a legacy one."""
    found = covered(tmp_path, tiny_model, {EXPERTS: (256 * 8, [512.0])})
    assert (found.missing, found.partial) == ((), ())


def test_the_rows_of_an_embedding_in_the_head_need_no_data(tmp_path: Path) -> None:
    extra = {"blk.4.nextn.embed_tokens.weight": (256, 320), "blk.4.nextn.shared_head_head.weight": (256, 320)}
    model = read(write_header_only(tmp_path / "a.gguf", TINY, extra=extra))
    assert {tensor.name for tensor in covered(tmp_path, model).head} & set(extra) == {
        "blk.4.nextn.shared_head_head.weight"
    }


def test_a_legacy_file_shows_experts_without_tokens(tmp_path: Path, tiny_model: Model) -> None:
    entries: dict[str, tuple[int, list[float]]] = {
        name: (5, [float(index + 1) for index in range(row * len(counts))])
        for name, (row, counts) in full_entries(tiny_model, head=False).items()
    }
    entries[EXPERTS][1][256 * 3 : 256 * 4] = [5.0] * 256  # 1 x calls, as llama-imatrix fills in
    found = coverage(read_imatrix(write_legacy(tmp_path / "i.dat", entries)), tiny_model)
    assert [(tensor.name, tensor.without_tokens) for tensor in found.partial] == [(EXPERTS, (3,))]
    assert (found.head_calibrated, found.head_tokens) == (False, None)


@pytest.mark.parametrize("suffix", ["gguf", "dat"])
def test_the_stock_tool_leaves_the_head_out(tools: Toolset, testbed: Path, tmp_path: Path, suffix: str) -> None:
    found = coverage(run_imatrix(tools, testbed, tmp_path / f"i.{suffix}"), read(testbed))
    assert found.missing == tuple(tensor.name for tensor in found.head)
    assert found.unused == ()
    assert found.head_calibrated is False


# --- an imatrix of another model --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 512}, r"blk\.0\.\S+ has rows of 512, expected 512 values, found 256"),
        ({"experts": 16}, r"has 16 matrices of rows of 256, expected 4096 values, found 2048 with 8 counts"),
        ({"expert_width": 512}, r"ffn_down_exps\.weight has 8 matrices of rows of 512"),
    ],
)
def test_other_sizes(tmp_path: Path, tiny_model: Model, changes: dict[str, int], message: str) -> None:
    other = read(write_header_only(tmp_path / "other.gguf", replace(TINY, **changes)))
    imatrix = read_imatrix(write_imatrix(tmp_path / "imatrix.gguf", full_entries(tiny_model)))
    with pytest.raises(ImatrixMismatch, match=message) as caught:
        coverage(imatrix, other)
    assert str(imatrix.path) in caught.value.message


def test_values_that_fit_with_counts_that_do_not(tmp_path: Path, tiny_model: Model) -> None:
    with pytest.raises(ImatrixMismatch, match="expected 2048 values, found 2048 with 4 counts"):
        covered(tmp_path, tiny_model, {EXPERTS: (512, [1.0] * 4)})


def test_hardly_any_name_matches(tmp_path: Path, tiny_model: Model) -> None:
    alien = {f"blk.{layer}.time_mix_key.weight": (256, [100.0]) for layer in range(9)}
    imatrix = read_imatrix(write_imatrix(tmp_path / "imatrix.gguf", alien))
    with pytest.raises(
        ImatrixMismatch, match=r"0 of the \d+ weights .* 9 of its 9 entries are of tensors that the model lacks"
    ) as caught:
        coverage(imatrix, tiny_model)
    assert "blk.0.time_mix_key.weight" in caught.value.message


def test_an_imatrix_with_a_head_serves_a_model_without(tmp_path: Path, tiny_model: Model) -> None:
    trunk = read(write_header_only(tmp_path / "trunk.gguf", replace(TINY, head_layers=0)))
    imatrix = read_imatrix(write_imatrix(tmp_path / "imatrix.gguf", full_entries(tiny_model)))
    found = coverage(imatrix, trunk)
    assert found.missing == ()
    assert len(found.unused) == 11
