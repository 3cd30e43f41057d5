"""Policies to compare with: all tensors of one type, and the draft head alone at another than the trunk."""

from __future__ import annotations

from pathlib import Path

from apex_build.hookspecs import Parameter, PolicySpec, hookimpl

_HERE = Path(__file__).parent
_INHERIT = ("inherit",)
_EXCEPT = ("inherit", "keep")


@hookimpl
def apex_policies() -> list[PolicySpec]:
    return [
        PolicySpec(
            name="uniform",
            template=_HERE / "uniform.jinja",
            base_type="{type}",
            parameters={
                "type": Parameter("Q4_K", "type", "the type of every tensor that llama-quantize quantizes"),
                "token_embd": Parameter("inherit", "type", "token embeddings, if of another type", _EXCEPT),
                "output": Parameter("inherit", "type", "the output matrix, if of another type", _EXCEPT),
            },
            description="every tensor of one type",
        ),
        PolicySpec(
            name="draft-head-only",
            template=_HERE / "draft-head-only.jinja",
            base_type="Q8_0",
            parameters={
                "trunk": Parameter(
                    "Q8_0", "type", "the type of the trunk, token_embd and output; 'keep' leaves them as they are", ("keep",)
                ),
                "draft_head": Parameter(
                    "Q4_K", "type", "the whole draft head; A+B: its routed experts A, the rest B", mixtures=True
                ),
                "draft_head.routed": Parameter("inherit", "type", "the head's routed experts", _INHERIT),
                "draft_head.shared": Parameter("inherit", "type", "the head's shared expert", _INHERIT),
                "draft_head.dense": Parameter(
                    "inherit", "type", "the head's dense feed-forward, where it has no experts", _INHERIT
                ),
                "draft_head.attention": Parameter("inherit", "type", "the head's attention", _INHERIT),
                "draft_head.eh_proj": Parameter("inherit", "type", "nextn.eh_proj, which joins token and hidden state", _INHERIT),
                "draft_head.other": Parameter("inherit", "type", "all of the head that has no setting of its own", _INHERIT),
            },
            needs=("head",),
            description="the trunk of one type, the draft head of another: what does the head's type cost?",
        ),
    ]
