"""How well the draft head predicts the trunk at every scored position of a text: our llama-perplexity --mtp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from apex_build.plugin_api import Evaluator, Figure, Parameter, Service, hookimpl

if TYPE_CHECKING:
    from apex_build.plugin_api import Task

APEX_API = 3


@hookimpl
def apex_evaluators() -> list[Evaluator]:
    return [
        Evaluator(
            name="draft-head",
            evaluate=_draft_head,
            needs=("head", "text"),
            uses=("reference",),
            parameters={
                "depth": Parameter(3, "int", "tokens drafted from each position"),
                "context": Parameter(512, "int", "tokens in a chunk; its second half is scored"),
                "chunks": Parameter(0, "int", "chunks of each text, from its start; 0: all"),
                "rows": Parameter(
                    "auto",
                    "text",
                    "hidden rows that the head reads: pre or post the final norm; auto: those it was trained on",
                ),
                "parse_special": Parameter(True, "flag", "parse chat markup (<|im_start|>) in the texts as tokens"),
            },
            headline=(("depth1.agreement", "agreement"),),
            runs=_runs,
            serves=(
                Service("head"),
                # mixture-of-experts models do best with drafts of two tokens
                Service("auto", {"agreement": "depth1.agreement", "tokens": "tokens.2"}, {"depth": "2"}),
            ),
            description="the head's drafts against the trunk's choices, by depth; paired with the reference's where "
            "one is given",
        )
    ]


def _runs(task: Task) -> dict[str, float]:
    """The reference's runs are skipped if they are cached."""
    models = [task.model, *([task.reference] if task.reference and task.reference.has_head else [])]
    names = [model.path.name for model in models]
    each = 1 + 0.4 * task.number("depth")  # every drafted token runs the head and the output again
    return {
        f"{task.evaluator}: {name} on {domain}": each * task.tokens_of_text(domain)
        for domain in task.texts
        for name in names
    }


def _draft_head(task: Task) -> Sequence[Figure]:
    from .figures import draft_head  # with NumPy: not for every start of `apex`

    return draft_head(task)
