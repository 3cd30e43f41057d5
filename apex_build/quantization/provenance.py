"""A quantized file's metadata: how it was made (`apex.*`), what it is and whose (`general.*`).

llama-quantize takes all of it as --override-kv, so texts have at most 127 bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from gguf.utility import size_label

from apex_build import __version__
from apex_build.errors import ParameterUnknown
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.fingerprint import fingerprint
from apex_build.gguf_model.metadata import Setting
from apex_build.hookspecs import PolicySpec
from apex_build.native.toolset import Toolset
from apex_build.policy.dry_run import base_types
from apex_build.policy.plan import Plan
from apex_build.quantization.naming import type_of_most_bytes
from apex_build.storage.digests import sha256_file, sha256_json

Value = str | int | float

_LONGEST = 127  # of a --override-kv text: llama_model_kv_override.val_str in include/llama.h


def provenance(
    plan: Plan, policy: PolicySpec, model: Model, imatrix: str, tools: Toolset, head_rows: str | None = None
) -> dict[str, str]:
    """Metadata keys and values; digests are sha256. `imatrix`: its digest; `head_rows`: those of its data for the draft
    head.
    """
    given = {name: value for name, value in plan.parameters.items() if name in policy.parameters}
    shown = {
        name: Path(str(value)).name if policy.parameters[name].kind == "file" else value
        for name, value in given.items()
        if value != policy.parameters[name].default
    }
    changed = " ".join(f"{name}={value}" for name, value in shown.items())
    keys = {
        "apex.version": __version__,
        "apex.policy": plan.policy,
        "apex.parameters": changed if len(changed.encode()) <= _LONGEST else f"sha256 {sha256_json(changed)}",
        "apex.plan": plan.identity,
        "apex.input": fingerprint(model),
        "apex.imatrix": imatrix,
        "apex.head_rows": head_rows or "",
        "apex.tools": _tools(tools),
    }
    return {key: value for key, value in keys.items() if value}


def description(plan: Plan, model: Model, settings: Sequence[Setting], tools: Toolset) -> dict[str, Value]:
    """What the file is and whose: its file type by most of its bytes, its size if the model does not have it, and
    `settings`.

    llama-quantize itself would write the base type, which hardly a tensor of a mixture may have. Raises
    ParameterUnknown for what cannot be set here.
    """
    keys: dict[str, Value] = {}
    if (number := base_types(tools).get(type_of_most_bytes(plan))) is not None:
        keys["general.file_type"] = number
    if not model.metadata.get("general.size_label"):
        keys["general.size_label"] = _size_label(model)
    for one in settings:
        if isinstance(one.value, tuple) or len(str(one.value).encode()) > _LONGEST or len(one.key.encode()) > _LONGEST:
            raise ParameterUnknown(
                f"--meta {one.key}: llama-quantize cannot set lists, or texts of more than {_LONGEST} bytes",
                hint=f"set it when the model is made: apex convert --meta {one.key}=...",
            )
        keys[one.key] = (
            struct.unpack("f", struct.pack("f", one.value))[0] if isinstance(one.value, float) else one.value
        )
    return keys


def override(key: str, value: Value) -> str:
    """A --override-kv argument."""
    kind = "str" if isinstance(value, str) else "float" if isinstance(value, float) else "int"
    return f"{key}={kind}:{value}"


def _size_label(model: Model) -> str:
    """Such as 35B or 256x1.2B: as gguf-py makes it for the converter."""
    experts = [tensor for tensor in model.tensors if "_exps." in tensor.name and len(tensor.shape) > 2]
    total = sum(tensor.n_elements for tensor in model.tensors)
    shared = total - sum(tensor.n_elements for tensor in experts)
    one_expert = sum(math.prod(tensor.shape[:2]) for tensor in experts)
    return str(size_label(total, shared, one_expert, model.n_expert if experts else 0))


def identity(keys: Mapping[str, Value]) -> str:
    """Identity of the whole file: its metadata names everything that it is made from."""
    return sha256_json(dict(keys))


def _tools(tools: Toolset) -> str:
    """The build's key if it is ours, else the digest of the tool."""
    return str(tools.manifest.get("key") or sha256_file(tools.tool("llama-quantize")))
