"""The draft head of a checkpoint: does it have what its config promises, and does the converter know its names?"""

from __future__ import annotations

import re
from collections.abc import Iterator

from apex_build.conversion.checkpoint import Checkpoint
from apex_build.conversion.converter import HEAD_KEYS, Family
from apex_build.errors import CheckpointInvalid
from apex_build.places import newer_converter

_QWEN, _APPENDED = HEAD_KEYS
_QWEN_SHARED = ("mtp.fc.weight", "mtp.norm.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight")
_NAMED = re.compile(r"(^|\.)(mtp|nextn)([._]|$)")
_LAYER = re.compile(r"^(?:model|backbone|transformer|language_model)?\.?layers\.(\d+)\.")
_SHOWN = 6


def head_tensors(checkpoint: Checkpoint) -> frozenset[str]:
    """Tensors of a draft head, by name: mtp (Qwen, MiMo, Nemotron, Ernie), or in a block after the trunk's last."""
    return frozenset(
        name for name in checkpoint.tensors if _NAMED.search(name) or _after_trunk(checkpoint, plain(name))
    )


def require_head(checkpoint: Checkpoint, family: Family, source: str) -> None:
    """Raise CheckpointInvalid if the config's promise, the tensors and the converter do not agree on the draft head.

    `source`: the name of the tree whose converter has `family`. The message names tensors.
    """
    there = sorted(head_tensors(checkpoint))
    known = family.writes_heads and (not family.head_keys or checkpoint.head_key in {None, *family.head_keys})
    if there and not known:
        raise unknown_head(checkpoint, source, there)
    if not family.head_keys and family.writes_heads:
        return  # it does not use the config; the result shows what became of the tensors
    missing = missing_head_tensors(checkpoint)
    if missing and there and not _has_marks(checkpoint):
        raise unknown_head(checkpoint, source, there)
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise CheckpointInvalid(
            f"{checkpoint.path / 'config.json'} declares a draft head ({checkpoint.head_key} = "
            f"{checkpoint.head_layers}), "
            f"but the checkpoint lacks these tensors of it: {', '.join(missing[:_SHOWN])}{more}",
            hint="take them from the original checkpoint (transformers drops them when it saves a fine-tuned model); "
            "or convert without a draft head: apex convert --no-head",
        )
    if there and not checkpoint.head_layers:
        raise CheckpointInvalid(
            f"{checkpoint.path} has tensors of a draft head, such as {there[0]}, but its config does not declare one",
            hint=f"set {' or '.join(sorted(family.head_keys))} in config.json (1 where there is one block of it), "
            "or: apex convert --no-head",
        )


def unknown_head(checkpoint: Checkpoint, source: str, names: list[str]) -> CheckpointInvalid:
    """The refusal for a draft head that the converter would drop."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return CheckpointInvalid(
        f"{checkpoint.path} has a draft head of {len(names)} tensors, which the converter of {source} does not know "
        "under these "
        f"names for {checkpoint.architecture}, and would leave out: {', '.join(names[:_SHOWN])}{more}",
        hint=f"a newer source may know it: {newer_converter(source)}; or convert without the head: apex convert "
        "--no-head",
    )


def missing_head_tensors(checkpoint: Checkpoint) -> list[str]:
    """Tensors that the promised head needs and the checkpoint lacks.

    The head's block is a full-attention block like the trunk's: its attention and norms are named as in the last
    such block of the trunk. Experts may be fused or separate, so any tensor of theirs counts.
    """
    names = {plain(name) for name in checkpoint.tensors}
    if not checkpoint.head_layers:
        return []
    if checkpoint.head_key == _APPENDED and not any(name.startswith("mtp.") for name in names):
        return list(_missing_appended(checkpoint, names))
    return list(_missing_qwen(checkpoint.head_layers, names))


def _missing_qwen(head_layers: int, names: set[str]) -> Iterator[str]:
    yield from (name for name in _QWEN_SHARED if name not in names)
    blocks = [
        found for name in names if (found := re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.q_proj\.weight", name))
    ]
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


def plain(name: str) -> str:
    """The name without the prefix of multimodal checkpoints."""
    name = name.replace("model.language_model.", "model.").replace("language_model.model.", "model.")
    return name.removeprefix("model.") if name.startswith("model.mtp.") else name


def _has_marks(checkpoint: Checkpoint) -> bool:
    """Whether the head's projection or a norm has an expected name: if not, the head has other names."""
    names = {plain(name) for name in checkpoint.tensors}
    return (
        not names.isdisjoint(_QWEN_SHARED)
        or len(list(_missing_appended(checkpoint, names))) < 3 * checkpoint.head_layers
    )


def _after_trunk(checkpoint: Checkpoint, name: str) -> bool:
    found = _LAYER.match(name)
    return bool(found) and 0 < checkpoint.trunk_layers <= int(found[1])  # type: ignore[index]
