"""Perplexity of a model on texts, from what llama-perplexity prints after each chunk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from apex_build.plugin_api import (
    Figure,
    Task,
    check_context,
    clustered_ratio,
    run_over_chunks,
    running_perplexities,
    scored_positions,
    text_arguments,
    total_chunks,
)

Floats = npt.NDArray[np.float64]


def perplexity(task: Task) -> list[Figure]:
    """`ppl` over all texts and of each. A chunk is the unit that is taken as independent, the texts are strata."""
    context = check_context(task)
    sums = []
    for domain, text in task.texts.items():
        what = f"{task.model.path.name} on {domain or text.name}"
        sums.append(
            run_over_chunks(
                task, task.model.path, text, text_arguments(task, text), what, lambda lines: chunk_sums(lines, context)
            )
        )
    figures = [_figure(sums, context, "")]
    if len(sums) > 1:
        figures += [_figure([one], context, domain) for domain, one in zip(task.texts, sums, strict=True)]
    return figures


def chunk_sums(lines: Sequence[str], context: int) -> Floats | None:
    """The sum of negative log-likelihoods of each chunk, in nats; None if the tool's last word is missing.

    The tool prints the perplexity of all chunks so far, to four decimals: their differences are good to 0.01 nats a
    token for hundreds of chunks, which is what intervals are made of; their sum matches its final estimate.
    """
    plan = total_chunks(lines)
    running = running_perplexities(lines)
    if plan is None or [number for number, _ in running] != list(range(1, plan[0] + 1)):
        return None
    so_far = np.array([value for _, value in running])
    with np.errstate(invalid="ignore", divide="ignore"):
        totals: Floats = np.log(so_far) * np.arange(1, len(so_far) + 1) * scored_positions(context)
    with np.errstate(invalid="ignore"):  # inf less inf
        sums: Floats = np.diff(totals, prepend=0.0)
    return sums


def _figure(sums: Iterable[Floats], context: int, domain: str) -> Figure:
    parts = list(sums)
    over = np.concatenate(parts)
    n = len(over) * scored_positions(context)
    if not np.isfinite(over).all():
        return Figure(
            "ppl",
            None,
            n=n,
            domain=domain,
            note="the model gives no finite perplexity",
            better="lower",
            label="perplexity",
        )
    text = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    mean = clustered_ratio(over, np.full(len(over), n / len(over)), text)
    return Figure("ppl", *mean.exp(), n=n, domain=domain, better="lower", label="perplexity")
