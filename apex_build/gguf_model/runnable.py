"""Whether the tools can run a model, checked from its header before one of them starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from apex_build.errors import ModelInvalid
from apex_build.gguf_model.catalogue import Model

# Keys that determine a context's memory for each layer: no tensor has to match them, and the tools trust them.
_WIDTHS = (
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.key_length_mla", "attention.value_length_mla", "attention.kv_lora_rank", "attention.q_lora_rank"),
    *(
        "attention.key_length_swa",
        "attention.value_length_swa",
        "attention.indexer.head_count",
        "attention.indexer.key_length",
    ),
    *("ssm.conv_kernel", "ssm.group_count", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank"),
    *("expert_used_count", "kda.head_dim", "shortconv.l_cache", "wkv.head_size"),
)


def check_runnable(model: Model) -> None:
    """Raises ModelInvalid for a file without a trunk, and for hyper-parameters larger than every tensor of the
    model.
    """
    if not trunk_blocks(model):
        raise ModelInvalid(
            f"{model.path}: none of the trunk's {model.trunk_layers} blocks is in the file, so it cannot be run by "
            "itself" + (": it holds only a draft head" if any(tensor.draft_head for tensor in model.tensors) else ""),
            hint="give the whole model; its imatrix holds data for the head too",
        )
    widest = max(extent for tensor in model.tensors if tensor.layer is not None for extent in tensor.shape[:2])
    for name in _WIDTHS:
        key = f"{model.architecture}.{name}"
        for value in _numbers(model.metadata.get(key)):
            if value > widest:
                raise ModelInvalid(
                    f"{model.path}: {key} is {value}, and no tensor of its blocks is wider than {widest}: "
                    "the tools would allocate memory for nothing",
                    hint=f"convert or download it again, then: apex inspect {model.path}",
                )


def trunk_blocks(model: Model) -> int:
    """How many of the trunk's blocks have tensors in the file."""
    return len({tensor.layer for tensor in model.tensors if tensor.layer is not None and not tensor.draft_head})


def _numbers(value: Any) -> Iterator[int]:
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, int) and not isinstance(one, bool):
            yield one
