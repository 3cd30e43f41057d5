"""The catalogue of a model: each tensor with its layer and role, and whether it belongs to the draft head."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apex_build.gguf_model.header import Header
from apex_build.hookspecs import Part

# (architecture, tensor name) -> role, or None if this function does not know the architecture or the tensor
RoleOf = Callable[[str, str], "str | Part | None"]


@dataclass(frozen=True)
class Tensor:
    """One tensor of a model. `shape` is ggml's order, the row length first, without trailing extents of 1, as ggml
    writes it.
    """

    name: str
    shape: tuple[int, ...]
    type: str  # as ggml names its types: F16, Q4_K, IQ2_XXS
    n_bytes: int
    role: str  # one of hookspecs.ROLES, or of a plugin's own
    layer: int | None  # the block number, None outside blocks
    draft_head: bool  # in a block after the trunk's, layer >= Model.trunk_layers, unless a plugin says otherwise (Part)

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Model:
    """A GGUF model, with all its shards. `trunk_layers` does not count the draft head's blocks."""

    path: Path  # the first shard
    files: tuple[Path, ...]
    architecture: str
    name: str
    trunk_layers: int
    head_layers: int
    n_expert: int
    n_expert_used: int
    file_type: int | None  # general.file_type (LLAMA_FTYPE)
    metadata: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    headers: tuple[Header, ...] = field(default=(), repr=False, compare=False)  # of the files, as they were read

    @property
    def has_head(self) -> bool:
        """Whether the model has a draft head, in separate blocks or according to a plugin's roles."""
        return self.head_layers > 0 or any(tensor.draft_head for tensor in self.tensors)
