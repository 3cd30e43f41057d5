"""What a quantized file says about its own making, in its metadata: `apex.*`, all texts of at most 127 bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from apex_build import __version__
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.fingerprint import fingerprint
from apex_build.hookspecs import PolicySpec
from apex_build.identity import sha256_file, sha256_json
from apex_build.native.toolset import Toolset
from apex_build.policy.plan import Plan

_LONGEST = 127  # of a --override-kv text: llama_model_kv_override.val_str in include/llama.h


def provenance(plan: Plan, policy: PolicySpec, model: Model, imatrix: Path | None, tools: Toolset) -> dict[str, str]:
    """Metadata keys and values. Digests are sha256."""
    given = {name: value for name, value in plan.parameters.items() if name in policy.parameters}
    changed = " ".join(f"{name}={value}" for name, value in given.items() if value != policy.parameters[name].default)
    keys = {
        "apex.version": __version__,
        "apex.policy": plan.policy,
        "apex.parameters": changed if len(changed.encode()) <= _LONGEST else f"sha256 {sha256_json(changed)}",
        "apex.plan": plan.identity,
        "apex.input": fingerprint(model),
        "apex.imatrix": sha256_file(imatrix) if imatrix else "",
        "apex.tools": _tools(tools),
    }
    return {key: value for key, value in keys.items() if value}


def identity(keys: Mapping[str, str]) -> str:
    """Of the whole file: it is made of what its provenance names, and of nothing else."""
    return sha256_json(dict(keys))


def _tools(tools: Toolset) -> str:
    """The build's key where it is ours, else the digest of the tool."""
    return str(tools.manifest.get("key") or sha256_file(tools.tool("llama-quantize")))
