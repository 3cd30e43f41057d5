"""Figures of a draft head from its scores, with intervals over chunks; differences from a reference on the same
positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from apex_build.plugin_api import (
    HEAD_ROWS,
    Estimate,
    EvaluationRefused,
    Figure,
    HeadScores,
    Task,
    clustered_mean,
    head_rows_arguments,
)

from .scores import check_same_positions, rows_choice, scored

Values = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
SHOWN = "depth1.agreement"  # the main figure


@dataclass(frozen=True, eq=False)
class Column:
    """A value for each of some positions: what a figure is the mean of. Chunks are numbered through in each text."""

    values: Values
    chunk: Ints
    text: Ints
    unit: str
    better: Literal["lower", "higher"]
    label: str
    scale: float = 1.0
    most: float = math.inf
    exponential: bool = False

    def estimate(self) -> Estimate:
        mean = clustered_mean(self.values, self.chunk, self.text)
        return mean.exp() if self.exponential else mean.times(self.scale).within(0.0, self.most)

    def difference(self, other: Column) -> Estimate:
        """The difference of the means, from the differences at each position."""
        return clustered_mean(self.values - other.values, self.chunk, self.text).times(self.scale)


def draft_head(task: Task) -> list[Figure]:
    """Figures for all texts together, then for each. Chunks are taken as independent, texts are strata."""
    if not task.model.has_head:
        raise EvaluationRefused(f"{task.model.path} has no draft head to score", hint=f"apex inspect {task.model.path}")
    context, depth = task.number("context"), task.number("depth")
    headless = task.reference is not None and not task.reference.has_head
    ours: list[HeadScores] = []
    theirs: list[HeadScores] = []
    for domain in task.texts:
        ours.append(scored(task, domain))
        if task.reference is not None and not headless:
            theirs.append(scored(task, domain, of_reference=True))
            check_same_positions(ours[-1], theirs[-1], task, domain)
    groups = {"": list(range(len(ours)))}
    if len(ours) > 1:
        groups |= {domain: [number] for number, domain in enumerate(task.texts)}
    asked = head_rows_arguments(rows_choice(task), task.model.architecture, task.tools.tool("llama-perplexity"))
    note = (
        f"{HEAD_ROWS[asked[1]]} rows"
        if asked
        else f"the rows that the tool's llama.cpp has for {task.model.architecture}"
    )
    figures: list[Figure] = []
    for domain, members in groups.items():
        columns = dict(columns_of([ours[number] for number in members], depth, context))
        reference = dict(columns_of([theirs[number] for number in members], depth, context)) if theirs else {}
        notes = {} if domain else {"depth1.agreement": note}
        figures += [
            _figure(name, column.estimate(), column, domain, notes.get(name, "")) for name, column in columns.items()
        ]
        for name, column in columns.items():
            if column.exponential:
                continue
            if name in reference:
                figures.append(
                    _figure(f"{name}.difference", column.difference(reference[name]), column, domain, difference=True)
                )
            elif headless and not domain:
                note = f"the reference has no draft head: {task.reference.path.name if task.reference else ''}"
                figures.append(Figure(f"{name}.difference", None, note=note))
    return figures


def columns_of(parts: list[HeadScores], depth: int, context: int) -> Iterator[tuple[str, Column]]:
    """The values to average for each figure, by the figure's name. Parts are texts."""
    text = np.concatenate([np.full(len(part.pos), number) for number, part in enumerate(parts)])
    pos, at, agree, p, kld, nll = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("pos", "depth", "agree", "p", "kld", "nll")
    )
    chunk = (pos.astype(np.int64) - 1) // context
    for d in range(1, depth + 1):
        here = at == d
        where = (chunk[here], text[here])
        same, chance = f"the head's draft {d} is the trunk's choice", f"the trunk's probability of the head's draft {d}"
        apart, surprise = f"divergence of the head from the trunk, draft {d}", f"perplexity of the head, draft {d}"
        yield f"depth{d}.agreement", Column(agree[here].astype(np.float64), *where, "%", "higher", same, 100.0, 100.0)
        yield f"depth{d}.p", Column(p[here].astype(np.float64), *where, "%", "higher", chance, 100.0, 100.0)
        yield f"depth{d}.kld", Column(kld[here].astype(np.float64), *where, "nats", "lower", apart)
        yield f"depth{d}.ppl", Column(nll[here].astype(np.float64), *where, "", "lower", surprise, exponential=True)
    chain = {name: _by_draft(text, pos, at, values, depth) for name, values in (("", agree), (".sampled", p))}
    starts = chain[""][0]
    for n in range(1, depth + 1):
        for suffix, (_, accepted) in chain.items():
            whole = ~np.isnan(
                accepted[:, n - 1]
            )  # only drafts that have all n tokens in their chunk, as the tool counts them
            tokens = 1.0 + np.cumprod(accepted[whole, :n], axis=1).sum(axis=1)
            label = f"tokens for each step with {n} drafted{', sampled' if suffix else ''}"
            where = (starts[whole, 1] // context, starts[whole, 0])
            yield f"tokens.{n}{suffix}", Column(tokens, *where, "tokens", "higher", label, most=n + 1.0)


def _by_draft(text: Ints, pos: Ints, depth: Ints, values: Values, deepest: int) -> tuple[Ints, Values]:
    """(text, position of the last token before the draft) of each draft, and the values at its depths, NaN past the
    chunk's end.
    """
    keys, draft = np.unique(np.stack([text, pos - depth]), axis=1, return_inverse=True)
    table = np.full((keys.shape[1], deepest), np.nan)
    table[draft.reshape(-1), depth - 1] = values
    return keys.T.astype(np.int64), table


def _figure(
    name: str, estimate: Estimate, column: Column, domain: str, note: str = "", *, difference: bool = False
) -> Figure:
    unit = "points" if difference and column.unit == "%" else column.unit
    paired = "" if difference or column.exponential else f"{name}.difference"
    about = Figure(
        name,
        None,
        unit=unit,
        n=len(column.values),
        domain=domain,
        note=note,
        better=column.better,
        paired=paired,
        label=column.label,
        plot=name == SHOWN,
    )
    if not all(math.isfinite(number) for number in estimate if number is not None):
        return replace(about, note="scores that are not finite numbers")
    return replace(about, value=estimate.value, low=estimate.low, high=estimate.high)
