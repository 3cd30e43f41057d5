"""The trunk against a text, and against its own reference: llama-perplexity, plain and with --kl-divergence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from apex_build.hookspecs import Evaluator, Figure, Parameter, hookimpl

if TYPE_CHECKING:
    from apex_build.evaluation.task import Task

_PARAMETERS = {
    "context": Parameter(512, "int", "tokens in a chunk; its second half is scored"),
    "chunks": Parameter(0, "int", "chunks of each text, from its start; 0: all"),
    "parse_special": Parameter(True, "flag", "the texts hold chat markup (<|im_start|>) that stands for tokens"),
}


@hookimpl
def apex_evaluators() -> list[Evaluator]:
    return [
        Evaluator(
            name="perplexity",
            evaluate=_perplexity,
            needs=("text",),
            parameters=_PARAMETERS,
            description="how well the model foretells the texts",
        ),
        Evaluator(
            name="kld",
            evaluate=_kld,
            needs=("text", "reference"),
            parameters=_PARAMETERS,
            description="how far the model's probabilities are from the reference's; the reference's are kept in the cache",
        ),
    ]


def _perplexity(task: Task) -> Sequence[Figure]:
    from .perplexity import perplexity  # with NumPy: not for every start of `apex`

    return perplexity(task)


def _kld(task: Task) -> Sequence[Figure]:
    from .divergence import kld

    return kld(task)
