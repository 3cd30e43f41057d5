"""The trunk against a text, and against its own reference: llama-perplexity, plain and with --kl-divergence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from apex_build.plugin_api import Evaluator, Figure, Parameter, Service, hookimpl

if TYPE_CHECKING:
    from apex_build.plugin_api import Task

APEX_API = 3

_PARAMETERS = {
    "context": Parameter(512, "int", "tokens in a chunk; its second half is scored"),
    "chunks": Parameter(0, "int", "chunks of each text, from its start; 0: all"),
    "parse_special": Parameter(True, "flag", "parse chat markup (<|im_start|>) in the texts as tokens"),
}


@hookimpl
def apex_evaluators() -> list[Evaluator]:
    return [
        Evaluator(
            name="perplexity",
            evaluate=_perplexity,
            needs=("text",),
            parameters=_PARAMETERS,
            description="how well the model predicts the texts",
            headline=(("ppl", "perplexity"),),
            runs=_runs,
            serves=(Service("check", {"perplexity": "ppl"}, {"chunks": "2"}),),
        ),
        Evaluator(
            name="kld",
            evaluate=_kld,
            needs=("text", "reference"),
            parameters=_PARAMETERS,
            description="how far the model's probabilities are from the reference's; the reference's are kept in the "
            "cache",
            headline=(("kld.mean", "KLD"), ("top1.agreement", "top-1")),
            runs=_runs_of_both,
            serves=(Service("sweep"),),
        ),
    ]


def _runs(task: Task) -> dict[str, float]:
    return {
        f"{task.evaluator}: {task.model.path.name} on {domain}": task.tokens_of_text(domain) for domain in task.texts
    }


def _runs_of_both(task: Task) -> dict[str, float]:
    """The reference's are passed over where they are kept in the cache."""
    assert task.reference is not None
    names = (f"reference {task.reference.path.name}", task.model.path.name)
    # comparing two vocabularies of probabilities at each position costs about as much again on a small model
    return {
        f"{task.evaluator}: {name} on {domain}": 1.5 * task.tokens_of_text(domain)
        for domain in task.texts
        for name in names
    }


def _perplexity(task: Task) -> Sequence[Figure]:
    from .perplexity import perplexity  # with NumPy: not for every start of `apex`

    return perplexity(task)


def _kld(task: Task) -> Sequence[Figure]:
    from .divergence import kld

    return kld(task)
