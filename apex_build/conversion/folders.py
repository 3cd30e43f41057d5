"""Folders and files that are mistaken for a checkpoint: errors that say what they are, and what to do with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from apex_build.errors import CheckpointInvalid

_WANTED = "give the folder of a Hugging Face checkpoint, with its config.json"
_MAX_JSON = 4 << 20


def refuse_other_kinds(path: Path) -> None:
    """Raises CheckpointInvalid, saying what `path` is, unless it is the folder of a complete checkpoint."""
    if not path.exists():
        raise CheckpointInvalid(f"{path} does not exist", hint=_WANTED)
    if not path.is_dir():
        _refuse_file(path)
    for is_it, what, hint in _KINDS:
        if is_it(path):
            raise CheckpointInvalid(f"{path} {what(path)}", hint=hint)


def _refuse_file(path: Path) -> None:
    if path.suffix == ".gguf":
        raise CheckpointInvalid(
            f"{path} is not a folder but a GGUF file: it is already converted", hint=f"apex inspect {path}"
        )
    hint = f"apex convert {path.parent}, its folder" if path.suffix == ".safetensors" else _WANTED
    raise CheckpointInvalid(f"{path} is not a folder", hint=hint)


def _has(*patterns: str) -> Callable[[Path], bool]:
    return lambda folder: any(any(folder.glob(pattern)) for pattern in patterns)


def _whole(folder: Path) -> bool:
    return (folder / "config.json").is_file() and _has("model*.safetensors", "pytorch_model*.bin")(folder)


def _base_of(folder: Path) -> str:
    try:
        raw = (folder / "adapter_config.json").read_bytes()[:_MAX_JSON]
        base = json.loads(raw).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return "another model"
    return base if isinstance(base, str) and base.isprintable() and base else "another model"


# The first match is reported. A folder may hold a complete checkpoint besides these (Mistral's do): that one is
# converted.
_KINDS: tuple[tuple[Callable[[Path], bool], Callable[[Path], str], str], ...] = (
    (
        lambda folder: _has("adapter_config.json", "adapter_model*")(folder) and not _whole(folder),
        lambda folder: f"holds an adapter (LoRA) to {_base_of(folder)}, not a complete model",
        "merge it into its base model (peft: merge_and_unload, then save_pretrained) and convert that folder; or "
        "convert the base "
        "alone, and the adapter with convert_lora_to_gguf.py of the fetched source",
    ),
    (
        lambda folder: _has("consolidated*.safetensors", "consolidated*.pth")(folder) and not _whole(folder),
        lambda _folder: (
            "holds a model in Mistral's own format (consolidated.*, params.json), which apex convert does not read"
        ),
        "download the files of the transformers format of the same model: config.json, model*.safetensors, "
        "tokenizer.json",
    ),
    (
        lambda folder: _has("*.gguf")(folder) and not _whole(folder),
        lambda folder: f"holds GGUF files, such as {min(folder.glob('*.gguf')).name}: it is already converted",
        "apex inspect FILE.gguf  says what it is; apex calibrate and apex quantize accept F16 and BF16 models",
    ),
    (
        _has("model_index.json"),
        lambda _folder: "holds a pipeline of several models (diffusers: model_index.json), not a language model",
        _WANTED,
    ),
    (
        lambda folder: (
            _has("*.nemo", "*.distcp", "mp_rank_*", "global_step*", "iter_*", "*.index", "flax_model*")(folder)
            and not _whole(folder)
        ),
        lambda _folder: (
            "holds a training framework's own files (NeMo, DeepSpeed, Megatron, Flax), not a Hugging Face checkpoint"
        ),
        "convert it to safetensors with that framework first",
    ),
)
