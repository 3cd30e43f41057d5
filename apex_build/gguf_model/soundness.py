"""Faults that make a model with a well-formed header unusable: seen from names and keys, without the tools."""

from __future__ import annotations

from apex_build.gguf_model.catalogue import Model

PRE_TOKENIZER = "tokenizer.ggml.pre"


def unsound(model: Model) -> list[str]:
    """Reasons why llama.cpp cannot load the model; empty if none is seen."""
    key = f"{model.architecture}.nextn_predict_layers"
    nextn = [tensor for tensor in model.tensors if ".nextn." in tensor.name]
    stray = [tensor.name for tensor in nextn if not tensor.draft_head]
    if stray and not model.head_layers:
        return [f"it has tensors of a draft head ({stray[0]} and {len(stray) - 1} others), but no key {key}"]
    if stray:
        return [f"{stray[0]} is of a draft head, but {key} = {model.head_layers} puts its block into the trunk"]
    if model.head_layers and not any(tensor.draft_head for tensor in model.tensors):
        return [f"{key} = {model.head_layers} declares a draft head, but none of its tensors is in the file"]
    return []
