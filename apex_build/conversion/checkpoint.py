"""A Hugging Face folder to convert: its contents."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apex_build.conversion.converter import HEAD_KEYS
from apex_build.conversion.folders import refuse_other_kinds
from apex_build.conversion.safetensors import TensorInfo, read_json, read_tensors
from apex_build.errors import CheckpointInvalid
from apex_build.storage.digests import sha256_file

MAX_CONFIG = 16 << 20
_READ = (".jinja", ".json", ".md", ".txt")  # what the converter reads besides tensors and tokenizers
_SAMPLE = 4096
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "*.tiktoken", "tokenizer.tiktoken")


@dataclass(frozen=True)
class Checkpoint:
    """`head_layers`: blocks of the draft head that the config promises, by `head_key`; `trunk_layers` are the others.
    Names as in the files. `quantization`: the method, if the values are already quantized (fp8, gptq, awq, ...).
    """

    path: Path
    architecture: str
    trunk_layers: int
    head_layers: int
    head_key: str | None
    quantization: str | None
    config: Mapping[str, Any] = field(hash=False)
    tensors: Mapping[str, TensorInfo] = field(hash=False)

    @property
    def n_elements(self) -> int:
        return sum(tensor.n_elements for tensor in self.tensors.values())


def read_checkpoint(path: Path) -> Checkpoint:
    """Raises CheckpointInvalid naming what is missing: the folder, config, tokenizer, tensors or architecture."""
    refuse_other_kinds(path)
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
    layers = next((count for part in parts(config) if (count := _count(part, "num_hidden_layers"))), 0)
    promised = ((key, count) for part in parts(config) for key in HEAD_KEYS if (count := _count(part, key)))
    head_key, head_layers = next(promised, (None, 0))
    return Checkpoint(
        path, architectures[0], layers, head_layers, head_key, quantization(config, tensors), config, tensors
    )


def fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 over the small files whole, and of each tensor over its entry and the first and last 4 KiB of its data.

    As for a model (gguf_model/fingerprint.py): it guards against mix-ups, not against malice.
    """
    digest = hashlib.sha256()
    for path in sorted(checkpoint.path.iterdir()):
        if path.is_file() and (path.suffix in _READ or any(path.match(name) for name in _TOKENIZERS)):
            digest.update(f"{path.name}\n{sha256_file(path)}\n".encode())
    for name, tensor in sorted(checkpoint.tensors.items(), key=lambda item: (item[1].file, item[1].place)):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        start, end = tensor.place
        with (checkpoint.path / tensor.file).open("rb") as file:
            for at in (start, max(start, end - _SAMPLE)):
                file.seek(at)
                digest.update(file.read(min(_SAMPLE, end - start)))
    return digest.hexdigest()


def quantization(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str | None:
    """How the values are quantized, according to the config or the tensors' names."""
    for part in parts(config):
        about = part.get("quantization_config")
        if isinstance(about, dict) and isinstance(method := about.get("quant_method"), str):
            return method.lower()
        if isinstance(about, dict) or isinstance(part.get("quantization"), dict):
            return (
                "mlx" if any(name.endswith(".biases") for name in tensors) else "a method that its config does not name"
            )
    for end, method in ((".qweight", "gptq or awq"), (".weight.quant_state.bitsandbytes__nf4", "bitsandbytes")):
        if any(name.endswith(end) for name in tensors):
            return method
    return None


def parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config, and its part that describes the text model, if any."""
    return [
        config,
        *(
            part
            for key in ("text_config", "llm_config", "language_config")
            if isinstance(part := config.get(key), dict)
        ),
    ]


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    return value if type(value) is int and 0 < value < 10_000 else 0
