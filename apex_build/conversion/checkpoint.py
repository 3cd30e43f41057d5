"""A Hugging Face folder before it is converted: what it holds, and whether the draft head that its config promises is there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apex_build.conversion.safetensors import TensorInfo, read_json, read_tensors
from apex_build.errors import CheckpointInvalid

MAX_CONFIG = 16 << 20
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "*.tiktoken", "tokenizer.tiktoken")
# How a config promises a draft head: Qwen3.5/3.6 (mtp.* tensors), and GLM, DeepSeek and their kin (blocks after the last).
_QWEN, _APPENDED = "mtp_num_hidden_layers", "num_nextn_predict_layers"
_QWEN_SHARED = ("mtp.fc.weight", "mtp.norm.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight")
_SHOWN = 6


@dataclass(frozen=True)
class Checkpoint:
    """`head_layers`: blocks of the draft head that the config promises; `trunk_layers` are the others. Names as in the files."""

    path: Path
    architecture: str
    trunk_layers: int
    head_layers: int
    config: Mapping[str, Any] = field(hash=False)
    tensors: Mapping[str, TensorInfo] = field(hash=False)

    @property
    def n_elements(self) -> int:
        return sum(tensor.n_elements for tensor in self.tensors.values())


def read_checkpoint(path: Path) -> Checkpoint:
    """Raises CheckpointInvalid naming what is missing: the folder, its config, tokenizer, tensors, or an architecture."""
    if not path.is_dir():
        raise CheckpointInvalid(
            f"{path} is not a folder", hint="give the folder of a Hugging Face checkpoint, with its config.json"
        )
    if not (path / "config.json").is_file():
        raise CheckpointInvalid(
            f"{path} has no config.json", hint="give the folder of a Hugging Face checkpoint, all of it downloaded"
        )
    config = read_json(path / "config.json", MAX_CONFIG)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise CheckpointInvalid(f"{path / 'config.json'} names no architecture: expected a list `architectures`")
    if not any(any(path.glob(name)) for name in _TOKENIZERS):
        raise CheckpointInvalid(
            f"{path} has no tokenizer: none of {', '.join(_TOKENIZERS[:4])}", hint="download the tokenizer's files too"
        )
    tensors = read_tensors(path)
    layers = next((count for part in _parts(config) if (count := _count(part, "num_hidden_layers"))), 0)
    head = next((count for part in _parts(config) for key in (_QWEN, _APPENDED) if (count := _count(part, key))), 0)
    return Checkpoint(path, architectures[0], layers, head, config, tensors)


def require_head(checkpoint: Checkpoint) -> None:
    """Raise CheckpointInvalid where config and tensors do not agree on the draft head; the message names tensors."""
    config = checkpoint.path / "config.json"
    missing = missing_head_tensors(checkpoint)
    if missing:
        key = next(key for part in _parts(checkpoint.config) for key in (_QWEN, _APPENDED) if _count(part, key))
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise CheckpointInvalid(
            f"{config} promises a draft head ({key} = {checkpoint.head_layers}), but the checkpoint lacks these tensors of it: "
            f"{', '.join(missing[:_SHOWN])}{more}",
            hint="take them from the original checkpoint (transformers drops them when it saves a fine-tuned model); "
            "or convert without a draft head: apex convert --no-head",
        )
    unpromised = [name for name in checkpoint.tensors if _plain(name).startswith("mtp.")]
    if unpromised and not checkpoint.head_layers and checkpoint.architecture.startswith("Qwen3_5"):
        raise CheckpointInvalid(
            f"{checkpoint.path} has tensors of a draft head, such as {unpromised[0]}, but its config does not say so",
            hint=f"set {_QWEN} in config.json (1 where there is mtp.layers.0 alone), or: apex convert --no-head",
        )


def missing_head_tensors(checkpoint: Checkpoint) -> list[str]:
    """Tensors that the promised head must have and the checkpoint lacks.

    The head's block is a full-attention block as the trunk has them: its attention and norms are named as in the last such block
    of the trunk. Experts may be fused or one by one, so for them any tensor will do.
    """
    names = {_plain(name) for name in checkpoint.tensors}
    if not checkpoint.head_layers:
        return []
    if not any(_count(part, _QWEN) for part in _parts(checkpoint.config)) and not any(name.startswith("mtp.") for name in names):
        return list(_missing_appended(checkpoint, names))
    return list(_missing_qwen(checkpoint.head_layers, names))


def _missing_qwen(head_layers: int, names: set[str]) -> Iterator[str]:
    yield from (name for name in _QWEN_SHARED if name not in names)
    blocks = [found for name in names if (found := re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.q_proj\.weight", name))]
    like = f"model.layers.{max(int(found[1]) for found in blocks)}." if blocks else "model.layers.0."
    parts = sorted(name[len(like) :] for name in names if name.startswith(like) and name.endswith(".weight"))
    for layer in range(head_layers):
        for part in parts:
            if not part.startswith("mlp.") and f"mtp.layers.{layer}.{part}" not in names:
                yield f"mtp.layers.{layer}.{part}"
        if not any(name.startswith(f"mtp.layers.{layer}.mlp.") for name in names):
            yield f"mtp.layers.{layer}.mlp.*"


def _missing_appended(checkpoint: Checkpoint, names: set[str]) -> Iterator[str]:
    for layer in range(checkpoint.trunk_layers, checkpoint.trunk_layers + checkpoint.head_layers):
        for part in ("eh_proj", "enorm", "hnorm"):
            if f"model.layers.{layer}.{part}.weight" not in names:
                yield f"model.layers.{layer}.{part}.weight"


def _plain(name: str) -> str:
    """The name without what multimodal checkpoints put before it."""
    name = name.replace("model.language_model.", "model.").replace("language_model.model.", "model.")
    return name.removeprefix("model.") if name.startswith("model.mtp.") else name


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config, and the part of it that describes the text model where there is one."""
    return [
        config,
        *(part for key in ("text_config", "llm_config", "language_config") if isinstance(part := config.get(key), dict)),
    ]


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    return value if type(value) is int and 0 < value < 10_000 else 0
