"""`fit`: the best file that a number of bytes can buy, measured on the model itself: docs/fit.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from apex_build.plugin_api import Computed, Parameter, PolicySpec, PolicyTask, hookimpl

if TYPE_CHECKING:
    import click

APEX_API = 3

PARAMETERS = {
    "measurement": Parameter("", "file", "what apex fit measured of the model"),
    "target_size": Parameter("", "text", "bytes of the whole file, such as 12.5GiB; or"),
    "target_bpw": Parameter(0.0, "number", "bits a weight, over all tensors"),
    "types": Parameter("", "text", "the types to choose from, as Q4_K,Q3_K; or -IQ2_XXS,-IQ3_S to leave some out"),
    "keep": Parameter("", "text", "tensors of a given type, PATTERN=TYPE,...; the word keep leaves them as they are"),
    "min": Parameter("", "text", "no type of fewer bits for a role, as attention=Q4_K,output=Q6_K; or for draft_head"),
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
            description="the least divergence that a number of bytes can buy, from a measurement of the model",
            compute=_compute,
            predict=_predict,
        )
    ]


@hookimpl
def apex_commands() -> list[click.Command]:
    from .command import command  # with NumPy, and only where the verb is asked for

    return [command]


def _compute(task: PolicyTask) -> Computed:
    from .policy import compute  # with NumPy: not for every start of `apex`

    return compute(task)


def _predict(task: PolicyTask, types: Mapping[str, str]) -> Mapping[str, float]:
    from .policy import predict

    return predict(task, types)
