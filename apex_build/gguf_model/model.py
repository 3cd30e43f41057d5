"""Read a model file, or all its shards, as a catalogue of tensors with layer, role and draft head."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apex_build.errors import ModelInvalid, ModelMissing
from apex_build.gguf_model.catalogue import Model, RoleOf, Tensor
from apex_build.gguf_model.cursor import quoted
from apex_build.gguf_model.header import Header, read_header
from apex_build.gguf_model.quantizable import n_dims
from apex_build.hookspecs import Part

# how llama-gguf-split names shards (llama_split_path in src/llama.cpp)
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
_BLOCK = re.compile(r"^blk\.(\d+)\.")
OTHER = "other"


def read_model(path: Path, role_of: RoleOf) -> Model:
    """The model of a GGUF file. Given any shard of a split model, all of it.

    `role_of` names each tensor's role, by default 'other'. Raises ModelMissing (also for a missing shard) and
    ModelInvalid.
    """
    return model_of(read_header(path), role_of)


def model_of(header: Header, role_of: RoleOf) -> Model:
    """`read_model` for a header that has been read, of any shard if the model is split."""
    path, what = header.path, kind_of(header)
    if what != "model":
        raise ModelInvalid(
            f"{path}: not a model, but a file of kind {quoted(what)}",
            hint=f"apex inspect {path}" if what == "imatrix" else None,
        )
    headers = tuple(_shards(header))
    first = headers[0]
    architecture = first.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not re.fullmatch(r"[\w.-]{1,64}", architecture, re.ASCII):
        raise ModelInvalid(f"{path}: not a model: its general.architecture is {quoted(architecture)}")
    n_blocks = _count(first, f"{architecture}.block_count")
    head_layers = _count(first, f"{architecture}.nextn_predict_layers", 0)
    if n_blocks == 0 or head_layers >= n_blocks:
        raise ModelInvalid(
            f"{path}: {architecture}.block_count is {n_blocks} and {architecture}.nextn_predict_layers {head_layers}: "
            "the blocks include the draft head's, so the first must be larger"
        )
    trunk_layers = n_blocks - head_layers
    name = first.metadata.get("general.name")
    file_type = first.metadata.get("general.file_type")
    return Model(
        path=first.path,
        files=tuple(header.path for header in headers),
        architecture=architecture,
        name=name if isinstance(name, str) and name else first.path.stem,
        trunk_layers=trunk_layers,
        head_layers=head_layers,
        n_expert=_count(first, f"{architecture}.expert_count", 0),
        n_expert_used=_count(first, f"{architecture}.expert_used_count", 0),
        file_type=file_type if _is_count(file_type) else None,
        metadata=first.metadata,
        tensors=tuple(_tensors(headers, architecture, n_blocks, trunk_layers, role_of)),
        headers=headers,
    )


def kind_of(header: Header) -> str:
    """What a GGUF file holds: model, imatrix, adapter, mmproj, vocab... (general.type; older files have none)."""
    kind = header.metadata.get("general.type")
    if any(tensor.name.endswith(".in_sum2") for tensor in header.tensors):
        return "imatrix"
    return kind if isinstance(kind, str) and kind else "model"


def _tensors(
    headers: tuple[Header, ...], architecture: str, n_blocks: int, trunk_layers: int, role_of: RoleOf
) -> Iterator[Tensor]:
    seen: dict[str, Path] = {}
    for header in headers:
        for entry in header.tensors:
            if entry.name in seen:
                raise ModelInvalid(f"{header.path}: the tensor {entry.name} is also in {seen[entry.name]}")
            seen[entry.name] = header.path
            block = _BLOCK.match(entry.name)
            layer = int(block[1]) if block else None
            if layer is not None and layer >= n_blocks:
                raise ModelInvalid(
                    f"{header.path}: the tensor {entry.name} is in block {layer}, but {architecture}.block_count says "
                    f"{n_blocks}"
                )
            part = role_of(architecture, entry.name) or OTHER
            head = layer is not None and layer >= trunk_layers
            yield Tensor(
                name=entry.name,
                shape=entry.shape[: n_dims(entry.shape)],
                type=entry.type,
                n_bytes=entry.n_bytes,
                role=part.role if isinstance(part, Part) else part,
                layer=layer,
                draft_head=part.draft_head if isinstance(part, Part) else head,
            )


def _shards(given: Header) -> Iterator[Header]:
    """The headers of all files of the model, in order; only the given one if it is not split."""
    count = _count(given, "split.count", 0)
    if count < 2:
        yield given
        return
    named = _SHARD.match(given.path.name)
    if named is None or int(named["count"]) != count:
        raise ModelInvalid(
            f"{given.path}: one of {count} shards, but its name does not end in -NNNNN-of-{count:05}.gguf",
            hint="restore the names that llama-gguf-split gave the shards",
        )
    n_tensors = 0
    for number in range(1, count + 1):
        path = given.path.with_name(f"{named['stem']}-{number:05}-of-{count:05}.gguf")
        try:
            header = given if path == given.path else read_header(path)
        except ModelMissing as error:
            raise ModelMissing(
                f"shard {number} of {count} of the model is missing: {error.message}",
                hint="put all shards into one folder",
            ) from None
        says = (_count(header, "split.no"), _count(header, "split.count"))
        if says != (number - 1, count):
            raise ModelInvalid(
                f"{path}: the name says shard {number} of {count}, but the metadata {says[0] + 1} of {says[1]}"
            )
        n_tensors += len(header.tensors)
        yield header
    promised = _count(given, "split.tensors.count", n_tensors)
    if promised != n_tensors:
        raise ModelInvalid(
            f"{given.path}: the shards hold {n_tensors} tensors, but split.tensors.count says {promised}"
        )


def _count(header: Header, key: str, default: int | None = None) -> int:
    value = header.metadata.get(key, default)
    if value is None:
        raise ModelInvalid(f"{header.path}: not a complete model: it has no {key}")
    if not _is_count(value):
        raise ModelInvalid(f"{header.path}: {key} is {quoted(value)}: expected a whole number")
    count: int = value
    return count


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
