"""`fit`: the best quantization that fits a size, measured on the model itself. See docs/fit.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from apex_build.plugin_api import Computed, Parameter, PolicySpec, PolicyTask, hookimpl

if TYPE_CHECKING:
    import click

APEX_API = 3

PARAMETERS = {
    "measurement": Parameter("", "file", "measurement of the model, as written by apex fit"),
    "target_size": Parameter("", "text", "size of the whole file, such as 12.5GiB; or set target_bpw"),
    "target_bpw": Parameter(0.0, "number", "average bits per weight"),
    "types": Parameter("", "text", "types to choose from, such as Q4_K,Q3_K; or all but some, such as -IQ2_XXS,-IQ3_S"),
    "keep": Parameter("", "text", "type of matching tensors, PATTERN=TYPE,...; 'keep' as type leaves them as they are"),
    "min": Parameter("", "text", "least bits per role, such as attention=Q4_K,output=Q6_K; draft_head is a role here"),
    "draft_loss": Parameter(0.5, "number", "points of agreement that the draft head may lose"),
}


@hookimpl
def apex_policies() -> list[PolicySpec]:
    return [
        PolicySpec(
            "fit",
            None,
            "Q8_0",
            calibrated=True,
            parameters=PARAMETERS,
            description="the least divergence for a given size, according to a measurement of the model",
            compute=_compute,
            predict=_predict,
        )
    ]


@hookimpl
def apex_commands() -> list[click.Command]:
    from .command import command  # imports NumPy, so only when the verb is used

    return [command]


def _compute(task: PolicyTask) -> Computed:
    from .policy import compute  # imports NumPy, so not at every start of `apex`

    return compute(task)


def _predict(task: PolicyTask, types: Mapping[str, str]) -> Mapping[str, float]:
    from .policy import predict

    return predict(task, types)
