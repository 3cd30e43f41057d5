"""Checkpoints that are rejected before anything runs; the error names what is missing."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from checkpoints import CONFIG, make_checkpoint, shapes, write_safetensors

from apex_build.conversion import heads
from apex_build.conversion.checkpoint import Checkpoint, read_checkpoint
from apex_build.conversion.converter import family
from apex_build.conversion.heads import missing_head_tensors
from apex_build.conversion.safetensors import read_tensors
from apex_build.errors import CheckpointInvalid


def require_head(checkpoint: Checkpoint, source: Path) -> None:
    heads.require_head(checkpoint, family(source, checkpoint.architecture), source.name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "hf")


def test_a_whole_checkpoint(folder: Path, source: Path) -> None:
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.architecture, checkpoint.trunk_layers, checkpoint.head_layers) == ("Qwen3_5MoeForCausalLM", 4, 1)
    assert len(checkpoint.tensors) == len(shapes())
    assert checkpoint.tensors["mtp.fc.weight"].shape == (64, 128)
    require_head(checkpoint, source)


def test_shards_with_an_index(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(make_checkpoint(tmp_path / "hf", shards=3))
    assert len(checkpoint.tensors) == len(shapes())
    assert len({tensor.file for tensor in checkpoint.tensors.values()}) == 3


def test_a_promised_head_that_is_not_there(tmp_path: Path, source: Path) -> None:
    checkpoint = read_checkpoint(make_checkpoint(tmp_path / "hf", without="mtp."))
    with pytest.raises(CheckpointInvalid) as caught:
        require_head(checkpoint, source)
    assert "declares a draft head (mtp_num_hidden_layers = 1)" in caught.value.message
    assert "mtp.fc.weight" in caught.value.message
    assert "--no-head" in str(caught.value.hint)
    missing = missing_head_tensors(checkpoint)
    assert "mtp.layers.0.self_attn.q_proj.weight" in missing
    assert "mtp.layers.0.mlp.*" in missing


@pytest.mark.parametrize(
    "lost",
    [
        "mtp.pre_fc_norm_hidden.weight",
        "mtp.layers.0.self_attn.k_norm.weight",
        "mtp.layers.0.post_attention_layernorm.weight",
    ],
)
def test_one_tensor_of_the_head_is_lost(tmp_path: Path, lost: str) -> None:
    assert missing_head_tensors(read_checkpoint(make_checkpoint(tmp_path / "hf", without=lost))) == [lost]


def test_the_head_of_a_multimodal_checkpoint(tmp_path: Path, source: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", config={"architectures": ["Qwen3_5MoeForConditionalGeneration"]})
    nested = {name: value for name, value in CONFIG.items() if name != "architectures"}
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["Qwen3_5MoeForConditionalGeneration"], "text_config": nested})
    )
    named = {name.replace("model.", "model.language_model.", 1): shape for name, shape in shapes().items()}
    write_safetensors(folder / "model.safetensors", named)
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.trunk_layers, checkpoint.head_layers) == (4, 1)
    require_head(checkpoint, source)
    write_safetensors(
        folder / "model.safetensors", {name: shape for name, shape in named.items() if name != "mtp.norm.weight"}
    )
    assert missing_head_tensors(read_checkpoint(folder)) == ["mtp.norm.weight"]


def test_a_head_in_blocks_after_the_last(tmp_path: Path, source: Path) -> None:
    """The layout of GLM and DeepSeek."""
    folder = make_checkpoint(
        tmp_path / "hf",
        config={"mtp_num_hidden_layers": 0, "num_nextn_predict_layers": 1, "architectures": ["Glm4MoeForCausalLM"]},
        without="mtp.",
    )
    assert missing_head_tensors(read_checkpoint(folder)) == [
        f"model.layers.4.{name}.weight" for name in ("eh_proj", "enorm", "hnorm")
    ]
    tensors = {**shapes(), **{f"model.layers.4.{name}.weight": (64,) for name in ("eh_proj", "enorm", "hnorm")}}
    write_safetensors(
        folder / "model.safetensors", {name: shape for name, shape in tensors.items() if not name.startswith("mtp.")}
    )
    require_head(read_checkpoint(folder), source)


def test_a_head_that_the_config_does_not_mention(tmp_path: Path, source: Path) -> None:
    checkpoint = read_checkpoint(make_checkpoint(tmp_path / "hf", config={"mtp_num_hidden_layers": 0}))
    with pytest.raises(CheckpointInvalid, match=r"has tensors of a draft head, such as mtp\."):
        require_head(checkpoint, source)


def test_no_head_promised_none_there(tmp_path: Path, source: Path) -> None:
    require_head(
        read_checkpoint(make_checkpoint(tmp_path / "hf", config={"mtp_num_hidden_layers": 0}, without="mtp.")), source
    )


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer"),
        ("model.safetensors", r"has no model\*\.safetensors"),
    ],
)
def test_a_file_is_missing(folder: Path, gone: str, says: str) -> None:
    (folder / gone).unlink()
    with pytest.raises(CheckpointInvalid, match=says):
        read_checkpoint(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match="does not exist"):
        read_checkpoint(tmp_path / "nothing")


def test_pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointInvalid, match="is a pickle"):
        read_checkpoint(folder)


def test_a_shard_is_missing_and_an_index_that_leaves_the_folder(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", shards=2)
    (folder / "model-00002-of-00002.safetensors").rename(tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointInvalid, match="lacks 1 of the 2 files"):
        read_checkpoint(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002", "../model-00002"))
    with pytest.raises(CheckpointInvalid, match=r"expected a \.safetensors file beside it"):
        read_checkpoint(folder)


def test_an_index_that_names_more_than_the_files_hold(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"mtp.fc.weight"', '"mtp.other.weight"'))
    with pytest.raises(CheckpointInvalid, match=r"names tensors that its files lack: mtp\.other\.weight"):
        read_checkpoint(folder)


def damage(kind: str, content: bytes) -> bytes:
    length: int = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    data: bytes = content[8 + length :]
    match kind:
        case "cut":
            return content[:-10]
        case "empty":
            return b""
        case "huge header":
            return struct.pack("<Q", 1 << 60) + content[8:]
        case "not json":
            return content[:8] + b"\xff" * length + data
        case "list":
            header = []
        case "negative":
            header["mtp.norm.weight"]["shape"] = [-1]
        case "offsets":
            header["mtp.norm.weight"]["data_offsets"] = [8, 4]
        case "far":
            header["mtp.norm.weight"]["data_offsets"] = [0, 1 << 62]
        case "deep":
            text = b"[" * 100_000
            return struct.pack("<Q", len(text)) + text + data
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "kind", ["cut", "empty", "huge header", "not json", "list", "negative", "offsets", "far", "deep"]
)
def test_damaged_tensors(folder: Path, kind: str) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(kind, path.read_bytes()))
    with pytest.raises(CheckpointInvalid, match="model"):
        read_tensors(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"architectures": []}', '{"architectures": "x"}', "\xff", "[" * 100_000])
def test_damaged_configs(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointInvalid, match=r"config\.json"):
        read_checkpoint(folder)
