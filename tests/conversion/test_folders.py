"""Paths that users mistake for a checkpoint: the error says what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import make_checkpoint

from apex_build.conversion.checkpoint import read_checkpoint
from apex_build.errors import CheckpointInvalid


@pytest.mark.parametrize(
    ("files", "said", "hint"),
    [
        (
            ["adapter_model.safetensors"],
            "holds an adapter (LoRA) to Qwen/Base, not a complete model",
            "merge_and_unload",
        ),
        (["consolidated.safetensors", "params.json", "tekken.json"], "Mistral's own format", "config.json"),
        (["consolidated.00.pth", "params.json"], "Mistral's own format", "config.json"),
        (["model-Q4_K_M.gguf", "README.md"], "holds GGUF files, such as model-Q4_K_M.gguf", "apex inspect"),
        (["model_index.json"], "a pipeline of several models", "config.json"),
        (["x.nemo"], "a training framework's own files", "safetensors"),
    ],
)
def test_other_folders(tmp_path: Path, files: list[str], said: str, hint: str) -> None:
    for name in files:
        (tmp_path / name).write_text("")
    if "adapter_model.safetensors" in files:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Base"}))
    with pytest.raises(CheckpointInvalid) as caught:
        read_checkpoint(tmp_path)
    assert said in caught.value.message and hint in str(caught.value.hint)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"base_model_name_or_path": 3}', '{"base_model_name_or_path": "a\\u001b[2J"}']
)
def test_a_damaged_adapter(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointInvalid, match=r"an adapter \(LoRA\) to another model"):
        read_checkpoint(tmp_path)


def test_files(tmp_path: Path) -> None:
    for name, said in (
        ("x.gguf", "already converted"),
        ("x.safetensors", "is not a folder"),
        ("x.txt", "is not a folder"),
    ):
        (tmp_path / name).write_text("")
        with pytest.raises(CheckpointInvalid, match=said):
            read_checkpoint(tmp_path / name)


def test_a_whole_checkpoint_with_others_beside_it(tmp_path: Path) -> None:
    """Mistral's folders contain both formats, and a fine-tune may include its adapter."""
    folder = make_checkpoint(tmp_path / "hf")
    for name in ("consolidated.safetensors", "params.json", "adapter_config.json", "old.gguf"):
        (folder / name).write_text("")
    assert read_checkpoint(folder).head_layers == 1
