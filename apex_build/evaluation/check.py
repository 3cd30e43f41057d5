"""`apex check`: does a file work? The trunk writes text, its drafts are accepted, and drafting does not change the
text.

Files whose head never had a draft accepted (0 of 3595) have been published. A check takes one or two minutes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apex_build.errors import CheckFailed
from apex_build.evaluation.run import Inputs, evaluate, plan_work
from apex_build.evaluation.services import settings_for, the_one_serving
from apex_build.evaluation.task import Prompt, ToolOptions
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.header import ArrayValue
from apex_build.hookspecs import Evaluator, Figure
from apex_build.native.toolset import Toolset
from apex_build.progress import Report, silent


@dataclass(frozen=True)
class Bounds:
    """Limits for a good file. Acceptance in %, the share of the reference's as a fraction, perplexities as ratios."""

    acceptance: float = 20.0
    of_reference: float = 0.5
    perplexity_ratio: float = 1.5  # of the reference's
    perplexity: float = (
        1000.0  # without a reference; for a small vocabulary a quarter of its size, which is close to guessing
    )
    same_text: float = 50.0


@dataclass(frozen=True)
class Checked:
    """Measured figures by domain ('' is all of them), and problems: none for a good file. `heldout`: the folder of the
    texts, where they are those kept apart from calibration.
    """

    model: Model
    acceptance: Mapping[str, Figure]  # %, without a head empty
    same_text: Figure | None
    perplexity: Mapping[str, Figure]
    problems: tuple[str, ...]
    heldout: Path | None = None

    def refuse(self) -> None:
        """Raises CheckFailed for a file with problems."""
        if self.problems:
            raise CheckFailed(
                f"{self.model.path}: {'; '.join(self.problems)}",
                hint=f"apex evaluate {self.model.path} --reference F16-FILE",
            )


def check(
    model: Model,
    evaluators: Mapping[str, Evaluator],
    tools: Toolset,
    prompts: Sequence[Prompt],
    texts: Mapping[str, Path],
    *,
    reference: Model | None = None,
    bounds: Bounds = Bounds(),
    threads: int | None = None,
    options: ToolOptions = ToolOptions(),  # noqa: B008  frozen
    report: Report = silent,
) -> Checked:
    """Measure the file, and the reference if there is one, and compare with the bounds.

    Raises what evaluators raise where the file cannot be measured at all: it does not load, a prompt does not fit.
    """
    of_trunk, of_head = (the_one_serving(evaluators, "check", meaning) for meaning in ("perplexity", "acceptance"))
    settings = {**settings_for(*of_trunk), **settings_for(*of_head)}
    names = {**of_trunk[1].figures, **of_head[1].figures}
    inputs = Inputs(texts=texts, prompts=tuple(prompts), settings=settings, options=options)

    def measured(one: Model) -> dict[tuple[str, str], Figure]:
        taken = dict.fromkeys(evaluator.name for evaluator, _ in (of_trunk, *([of_head] if one.has_head else [])))
        works = [plan_work(evaluators[name], one, inputs, tools, threads=threads, report=report) for name in taken]
        found: dict[tuple[str, str], Figure] = {}
        with tempfile.TemporaryDirectory(prefix="apex-check-") as scratch:
            for result in evaluate(works, Path(scratch) / "results.jsonl"):
                if result.error:
                    raise result.error
                found |= {(figure.name, figure.domain): figure for figure in result.figures}
        return found

    ours = measured(model)
    theirs = measured(reference) if reference else {}
    acceptance, perplexity = _of(ours, names["acceptance"]), _of(ours, names["perplexity"])
    same = ours.get((names.get("same_text", ""), ""))
    problems = [
        *_trunk(perplexity, _of(theirs, names["perplexity"]), bounds, vocabulary_size(model)),
        *_head(acceptance, _of(theirs, names["acceptance"]), bounds),
    ]
    if same and same.value is not None and same.value < bounds.same_text:
        problems.append(
            f"drafting changes the text after {100 - same.value:.0f} % of the prompts (at most "
            f"{100 - bounds.same_text:g} %)"
        )
    return Checked(model, acceptance, same, perplexity, tuple(problems))


def _trunk(
    ours: Mapping[str, Figure], theirs: Mapping[str, Figure], bounds: Bounds, vocabulary: int | None
) -> list[str]:
    value = _value(ours)
    if value is None:
        return ["its perplexity is not finite"]
    if (reference := _value(theirs)) is not None:
        most = bounds.perplexity_ratio * reference
        told = f"{bounds.perplexity_ratio:g} times the reference's {reference:.2f}"
    else:
        most = min(bounds.perplexity, (vocabulary or 1e9) / 4)
        told = f"{most:g}"
    return (
        [f"its perplexity is {value:.2f}, expected at most {told}: the trunk does not write text"]
        if value > most
        else []
    )


def _head(ours: Mapping[str, Figure], theirs: Mapping[str, Figure], bounds: Bounds) -> list[str]:
    if not ours:
        return []
    value = _value(ours)
    if value is None:
        return ["its draft head drafted nothing"]
    if value < bounds.acceptance:
        return [f"{value:.1f} % of the drafts of its head are accepted, expected at least {bounds.acceptance:g} %"]
    if (reference := _value(theirs)) is not None and value < bounds.of_reference * reference:
        return [
            f"{value:.1f} % of the drafts of its head are accepted, expected at least {100 * bounds.of_reference:g} % "
            "of the "
            f"reference's {reference:.1f} %"
        ]
    return []


def vocabulary_size(model: Model) -> int | None:
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, ArrayValue | tuple) else None


def _of(figures: Mapping[tuple[str, str], Figure], name: str) -> dict[str, Figure]:
    return {domain: figure for (known, domain), figure in figures.items() if known == name}


def _value(by_domain: Mapping[str, Figure]) -> float | None:
    """The value over all domains; a single domain has no row for all, so its own."""
    figure = by_domain.get("") or next(iter(by_domain.values()), None)
    return figure.value if figure else None
