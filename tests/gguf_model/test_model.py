"""Models: layers, draft head, shards, and metadata that contradicts the tensors."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from gguf_model.files import read, write_imatrix
from shapes import TINY, write_header_only

from apex_build.errors import ModelInvalid, ModelMissing
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.model import read_model
from apex_build.gguf_model.quantizable import n_dims, quantizable
from apex_build.native.toolset import Toolset


def test_the_35b_a3b(large: Path) -> None:
    model = read(large)
    assert (model.architecture, model.name) == ("qwen35moe", "header only")
    assert (model.trunk_layers, model.head_layers) == (40, 1)
    assert (model.n_expert, model.n_expert_used, model.file_type) == (256, 8, 1)
    head = [tensor for tensor in model.tensors if tensor.draft_head]
    assert {tensor.layer for tensor in head} == {40}
    assert [tensor.name for tensor in head if tensor.role == "nextn"] == ["blk.40.nextn.eh_proj.weight"]
    assert round(sum(tensor.n_elements for tensor in model.tensors) / 1e9, 2) == 35.51
    routed = next(tensor for tensor in model.tensors if tensor.name == "blk.7.ffn_down_exps.weight")
    assert (routed.shape, routed.role, routed.layer, routed.draft_head) == ((512, 2048, 256), "routed", 7, False)
    assert routed.n_bytes == 2 * 512 * 2048 * 256


def test_the_testbed(testbed: Path) -> None:
    model = read(testbed)
    assert model.head_layers == 1
    assert model.tensors[-1].draft_head
    assert {tensor.role for tensor in model.tensors} == {
        *("routed", "shared", "attention", "ssm", "router", "norm", "conv", "nextn", "embedding", "output", "other")
    }


def test_roles_that_no_plugin_knows_are_other(tiny: Path) -> None:
    model = read_model(tiny, lambda architecture, name: None)
    assert {tensor.role for tensor in model.tensors} == {"other"}
    asked: set[str] = set()
    read_model(tiny, lambda architecture, name: asked.add(architecture))
    assert asked == {"qwen35moe"}


def test_a_model_without_a_head(tmp_path: Path) -> None:
    model = read(write_header_only(tmp_path / "a.gguf", TINY, metadata={"qwen35moe.nextn_predict_layers": 0}))
    assert (model.trunk_layers, model.head_layers) == (5, 0)
    assert not any(tensor.draft_head for tensor in model.tensors)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"qwen35moe.block_count": 4}, r"blk\.4\.\S+ is in block 4, but qwen35moe.block_count says 4"),
        ({"qwen35moe.block_count": 0}, "block_count is 0"),
        ({"qwen35moe.nextn_predict_layers": 5}, "nextn_predict_layers 5"),
        ({"qwen35moe.block_count": "five"}, "block_count is 'five': expected a whole number"),
        ({"qwen35moe.expert_count": 2.5}, "expert_count is 2.5"),
        ({"qwen35moe.expert_used_count": True}, "expert_used_count is True"),
        ({"general.architecture": "other"}, "it has no other.block_count"),
        ({"general.architecture": 7}, "general.architecture is 7"),
        ({"general.architecture": "a\x1b[2Jb"}, r"general.architecture is 'a\\x1b\[2Jb'"),
        ({"general.type": "x\x1by" * 999}, r"of kind 'x\\x1byx"),
        ({"general.type": "adapter"}, "of kind 'adapter'"),
        ({"general.type": "mmproj"}, "of kind 'mmproj'"),
    ],
)
def test_metadata_that_contradicts(tmp_path: Path, metadata: dict[str, str | int | float | bool], message: str) -> None:
    path = write_header_only(tmp_path / "a.gguf", TINY, metadata=metadata)
    with pytest.raises(ModelInvalid, match=message) as caught:
        read(path)
    assert str(path) in caught.value.message


def test_an_imatrix_is_no_model(tmp_path: Path) -> None:
    path = write_imatrix(tmp_path / "imatrix.gguf", {"blk.0.attn_q.weight": (256, [8])})
    with pytest.raises(ModelInvalid, match="of kind 'imatrix'") as caught:
        read(path)
    assert caught.value.hint == f"apex inspect {path}"


# --- shards -----------------------------------------------------------------------------------------------------------


def split(
    folder: Path, names: tuple[str, ...] = ("m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf")
) -> list[Path]:
    """Three files that claim to be shards; each has one tensor more than the first."""
    import gguf
    import numpy as np

    paths = []
    for number, name in enumerate(names):
        writer = gguf.GGUFWriter(folder / name, "qwen35moe")
        writer.add_uint32("qwen35moe.block_count", 3)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", len(names))
        writer.add_int32("split.tensors.count", len(names))
        writer.add_tensor(f"blk.{number}.attn_q.weight", np.zeros((4, 256), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(folder / name)
    return paths


def test_any_shard_gives_the_whole_model(tmp_path: Path) -> None:
    paths = split(tmp_path)
    for path in paths:
        model = read(path)
        assert (model.path, list(model.files)) == (paths[0], paths)
        assert [tensor.layer for tensor in model.tensors] == [0, 1, 2]


def test_shards_that_llama_gguf_split_wrote(tools: Toolset, testbed: Path, tmp_path: Path) -> None:
    command: list[str | Path] = [
        tools.tool("llama-gguf-split"),
        "--split-max-tensors",
        "50",
        testbed,
        tmp_path / "part",
    ]
    subprocess.run(command, check=True, capture_output=True)
    shards = sorted(tmp_path.glob("part-*.gguf"))
    assert len(shards) > 1
    model, whole = read(shards[-1]), read(testbed)
    assert list(model.files) == shards
    assert model.tensors == whole.tensors
    assert model.trunk_layers == whole.trunk_layers


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[1].unlink()
    with pytest.raises(
        ModelMissing, match=r"shard 2 of 3 of the model is missing: no such file: .*m-00002-of-00003\.gguf"
    ):
        read(paths[2])


def test_shards_that_do_not_belong_together(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(
        ModelInvalid, match=r"m-00003-of-00003\.gguf: the name says shard 3 of 3, but the metadata 2 of 3"
    ):
        read(paths[0])
    renamed = paths[0].rename(tmp_path / "first.gguf")
    with pytest.raises(ModelInvalid, match="one of 3 shards, but its name does not end in"):
        read(renamed)


def test_a_tensor_that_two_shards_hold(tmp_path: Path) -> None:
    paths = split(tmp_path)
    data = bytearray(paths[1].read_bytes())
    at = data.index(b"blk.1.attn_q")
    data[at + 4 : at + 5] = b"0"
    paths[1].write_bytes(data)
    with pytest.raises(ModelInvalid, match=r"the tensor blk\.0\.attn_q\.weight is also in .*m-00001-of-00003\.gguf"):
        read(paths[0])


# --- what llama-quantize converts -------------------------------------------------------------------------------------


def dry_run(tools: Toolset, path: Path) -> dict[str, bool]:
    """Tensor name -> whether `llama-quantize --dry-run` would convert it to Q8_0."""
    command: list[str | Path] = [tools.tool("llama-quantize"), "--dry-run", "--pure", path, "Q8_0"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line for line in (out.stdout + out.stderr).splitlines() if " type = " in line]
    return {row.split("]", 1)[1].split()[0]: "->" in row for row in rows}


def test_quantizable_is_what_llama_quantize_converts(tools: Toolset, large: Path, tmp_path: Path) -> None:
    """This also shows that llama-quantize accepts the header-only file of the 35B-A3B."""
    odd: dict[str, tuple[int, ...]] = {
        f"blk.0.{name}": (256, 4)
        for name in (
            "altup_proj.weight",
            "laurel_l.weight",
            "ssm_conv1d_q.weight",
            "shortconv.conv.weight",
            "shortconv.in_proj.weight",
        )
    }
    odd |= {
        "position_embd.weight": (256, 4),
        "blk.0.odd_weight": (256, 4),
        "blk.0.odd": (256, 4),
        "blk.0.line.weight": (256, 1, 1),
    }
    odd |= {
        "blk.0.deep.weight": (256, 1, 2),
        "blk.0.time_mix_w1.weight": (256, 4),
        "blk.0.time_mix_key.weight": (256, 4),
    }
    for path in (large, write_header_only(tmp_path / "odd.gguf", TINY, extra=odd)):
        converted = dry_run(tools, path)
        model: Model = read(path)
        assert set(converted) == {tensor.name for tensor in model.tensors}
        assert {tensor.name: quantizable(tensor.name, tensor.shape) for tensor in model.tensors} == converted


@pytest.mark.parametrize(
    ("shape", "dimensions"), [((5,), 1), ((5, 1), 1), ((5, 2), 2), ((5, 1, 2), 3), ((1, 1, 1, 1), 1)]
)
def test_dimensions_as_ggml_counts_them(shape: tuple[int, ...], dimensions: int) -> None:
    assert n_dims(shape) == dimensions
