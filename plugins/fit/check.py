"""Part 4: measure a file's divergence on text that no probe used, and compare it with the prediction and the tiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from apex_build.plugin_api import (
    BASELINE,
    Chart,
    EvaluateOptions,
    Mark,
    Planned,
    PlanOptions,
    PolicyUnfit,
    Probe,
    Series,
    ShapeUnfit,
    Workplace,
    can_plot,
    draw,
    evaluate_files,
    plan_model,
    run_probes,
)

from . import measure, policy, sensitivity
from .data import Asked, Preview, Row
from .measurement import Measurement


def row_of(name: str, target: int | None, planned: Planned, before: Preview) -> Row:
    plan = planned.plan
    n_bytes = plan.n_bytes + before.task.other_bytes
    changed = {entry.name: entry.type for entry in plan.entries if entry.type != entry.from_type}
    return Row(
        name,
        target,
        n_bytes,
        plan.bits_per_weight,
        plan.predicted.get(policy.KLD),
        types=changed,
        agreement=plan.predicted.get(policy.AGREEMENT),
    )


def tiers_of(before: Preview, found: Measurement, asked: Asked, place: Workplace) -> list[Row]:
    """The files that the other calibrated policies would write, with the divergence that this measurement predicts."""
    rows = []
    for name, one in place.plugins.policies().items():
        if not one.calibrated or one.compute is not None or one.needs:
            continue
        own = {key: value for key, value in asked.tiers.items() if key in one.parameters}
        try:
            planned = plan_model(before.model, PlanOptions(name, own, before.data.path), place=place)
        except (PolicyUnfit, ShapeUnfit):
            continue
        row = row_of(name, None, planned, before)
        rows.append(replace(row, predicted=policy.predicted(found, before.task, row.types).get(policy.KLD)))
    return sorted(rows, key=lambda row: row.n_bytes)


def scored(rows: Sequence[Row], before: Preview, asked: Asked, place: Workplace) -> list[Row]:
    """Score the rows on the text that no probe used. The types are changed in memory: no file is written."""
    if not rows:
        return []
    texts = before.plan.texts.unseen
    task = measure.task_for(before.model, place, texts, asked.check_chunks, asked.threads, "check", "--check-chunks")
    heads = {tensor.name for tensor in before.model.tensors if tensor.draft_head}
    probes = [BASELINE, *(Probe(row.name, _trunk(row.types, heads)) for row in rows)]
    base, *scores = run_probes(task, probes, before.data.path, chunks=asked.check_chunks)
    found = []
    for row, score in zip(rows, scores, strict=True):
        cost = sensitivity.difference(score, base)
        found.append(replace(row, measured=cost.value, low=cost.low, high=cost.high))
    return found


def _trunk(types: Mapping[str, str], heads: set[str]) -> dict[str, str]:
    return {name: kind for name, kind in types.items() if name not in heads}


def with_check(
    rows: Sequence[Row], tiers: Sequence[Row], before: Preview, asked: Asked, place: Workplace
) -> tuple[list[Row], list[Row], tuple[str, ...]]:
    """Evaluate the written file: its divergence, that of its weights alone, and the agreement that its draft head lost.
    Score the tiers with probes.
    """
    assert asked.out is not None
    chunks, context = str(asked.check_chunks), str(measure.CONTEXT)
    settings = {"kld.chunks": chunks, "kld.context": context}
    only: tuple[str, ...] = ("kld",)
    if any(tensor.draft_head for tensor in before.model.tensors):
        settings |= {"draft-head.chunks": chunks, "draft-head.context": context, "draft-head.depth": "1"}
        only = ("kld", "draft-head")
    options = EvaluateOptions(
        before.model.path,
        tuple(before.plan.texts.unseen.values()),
        only=only,
        settings=settings,
        threads=asked.threads,
    )
    results = evaluate_files([asked.out], options, place=place)
    for result in results:
        if result.error is not None:
            raise result.error
    figures = {one.name: one for result in results for one in result.figures if not one.domain}
    figure = figures[policy.KLD]
    row = replace(
        rows[0],
        name=asked.out.name,
        n_bytes=asked.out.stat().st_size,
        measured=figure.value,
        low=figure.low,
        high=figure.high,
    )
    types = {tensor.name: tensor.type for tensor in before.model.tensors}
    written = {tensor.name: tensor.type for tensor in place.model(asked.out).tensors}
    own = replace(row, name="its weights", types={name: kind for name, kind in written.items() if kind != types[name]})
    weights, *beside = scored([own, *tiers], before, asked, place)
    said = [_weights(weights)]
    if (lost := figures.get(policy.AGREEMENT)) is not None and lost.value is not None:
        interval = f" [{lost.low:.2f}, {lost.high:.2f}]" if lost.low is not None and lost.high is not None else ""
        expected = f", predicted {row.agreement:+.2f}" if row.agreement is not None else ""
        said.append(f"draft head: {lost.value:+.2f}{interval} points of agreement{expected}")
    return [row], beside, tuple(said)


def _weights(row: Row) -> str:
    """What is predicted, and what a probe says of a tier, is of weights: a CPU's or GPU's kernels add to it."""
    interval = f" [{row.low:.4f}, {row.high:.4f}]" if row.low is not None and row.high is not None else ""
    return f"its weights alone: KLD {row.measured:.4f}{interval}; kernels add to it by rounding activations to 8 bits"


def plot(out: Path, rows: Sequence[Row], tiers: Sequence[Row], before: Preview) -> tuple[Path, ...]:
    if not can_plot():
        return ()
    paths = (out.with_suffix(".png"), out.with_suffix(".svg"))
    draw(chart(rows, tiers, before.model.path.name), *paths)
    return paths


def chart(rows: Sequence[Row], tiers: Sequence[Row], name: str) -> Chart:
    def marks(some: Sequence[Row], *, named: bool) -> tuple[Mark, ...]:
        return tuple(
            Mark(
                row.n_bytes / 1e6,
                row.measured,
                row.name if named else "",
                y_interval=(row.low, row.high) if row.low is not None and row.high is not None else None,
            )
            for row in some
            if row.measured is not None
        )

    predicted = tuple(Mark(row.n_bytes / 1e6, row.predicted) for row in rows if row.predicted is not None)
    return Chart(
        f"{name}: divergence against size",
        "bytes of the file (MB)",
        "KL divergence from the F16 (nats)",
        (
            Series("fit, measured on unseen text", marks(rows, named=False)),
            Series("fit, predicted", predicted),
            Series("tiers", marks(tiers, named=True), joined=False),
        ),
    )
