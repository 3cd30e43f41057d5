"""A policy to compare with: all tensors of one type."""

from __future__ import annotations

from pathlib import Path

from apex_build.plugin_api import Parameter, PolicySpec, hookimpl

APEX_API = 3

_EXCEPT = ("inherit", "keep")


@hookimpl
def apex_policies() -> list[PolicySpec]:
    return [
        PolicySpec(
            name="uniform",
            template=Path(__file__).with_name("uniform.jinja"),
            base_type="{type}",
            parameters={
                "type": Parameter("Q4_K", "type", "the type of every tensor that llama-quantize quantizes"),
                "token_embd": Parameter("inherit", "type", "token embeddings, if of another type", _EXCEPT),
                "output": Parameter("inherit", "type", "the output matrix, if of another type", _EXCEPT),
            },
            description="every tensor of one type",
        ),
    ]
