"""The steps of the verb, from a model and a size to a file; nothing is printed here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from apex_build.plugin_api import (
    BudgetUnfit,
    Ggml,
    Model,
    OutputUnwritable,
    Planned,
    PlanOptions,
    PolicyTask,
    Probe,
    QuantizeOptions,
    Workplace,
    cache_folder,
    check_place,
    cpus,
    fingerprint,
    footprint,
    gpus_of,
    other_bytes,
    plan_files,
    plan_model,
    quantizable_tensors,
    read_data,
    run_probes,
    sha256_json,
    values_of,
    whole_file,
    write_file,
)

from . import budget, errors, measure, measurement, policy, refine, sensitivity
from .check import plot, row_of, scored, tiers_of, with_check
from .data import NAME, Asked, Done, Made, Preview, Row
from .measurement import Measurement
from .plugin import PARAMETERS

_MARGIN = 0.03  # share of a GPU's memory to leave for its driver and the display


def preview(path: Path, asked: Asked, place: Workplace) -> Preview:
    """Check the whole request. Raises BudgetUnfit, MeasurementUnfit, CalibrationSetInvalid, ParameterUnknown,
    TypeUnknown.
    """
    model = place.model(path)
    data = read_data(asked.imatrix, model)
    ggml = Ggml(place.tools)
    names = quantizable_tensors(model, place.tools)
    wanted = budget.types_of(str(asked.settings.get("types", "")), errors.TYPES)
    measured = tuple(one for one in errors.TYPES if one in (*wanted, *measure.PROBED))
    types = {
        tensor.name: found
        for tensor in model.tensors
        if tensor.name in names and (found := errors.candidates(tensor, ggml, data, measured))
    }
    task = PolicyTask(
        NAME,
        model,
        values_of(f"policy '{NAME}'", PARAMETERS, dict(asked.settings), ggml),
        names,
        ggml,
        True,
        other_bytes(model),
        place.tools.identity,
    )
    choices = policy.choices_of(task, _blank(model, types, head=asked.head_score))
    room, targets = _targets(model, asked, place)
    if room:  # the GPU may have more memory than the largest file needs
        targets = tuple(min(target, choices.largest) for target in targets)
    for target in targets:
        policy.check_target(target, choices, model)
    texts = measure.split(place.texts(asked.texts, model))
    threads = asked.threads or cpus()
    at = asked.measurement or _beside(asked, model)
    work = errors.Work(model, data, place.tools, types, asked.sample)
    plan = measure.Plan(
        work,
        texts,
        asked.chunks,
        asked.probe_budget,
        asked.threads,
        threads,
        head_score=asked.head_score and any(tensor.draft_head for tensor in model.tensors),
        policy_task=replace(task, parameters={**task.parameters, "keep": "", "min": "", "types": ",".join(wanted)}),
    )
    known, warnings = _known(at, plan, asked, place)
    return Preview(
        model,
        data,
        plan,
        task,
        targets,
        choices.smallest,
        choices.largest,
        at,
        known,
        warnings,
        measure.expected(plan, place),
        room,
    )


def fit(before: Preview, asked: Asked, place: Workplace) -> Done:
    """Measure, allocate, quantize, score."""
    found = before.known
    if found is None:
        found = measure.measure(before.plan, place)
        measurement.write(found, before.at)
    found = replace(found, file=before.at)
    planned = [_planned(target, before, asked, place) for target in before.targets]
    rows = [
        row_of(f"{NAME} {budget.shown(target)}", target, one, before)
        for target, one in zip(before.targets, planned, strict=True)
    ]
    warnings = [*before.warnings, *(text for one in planned for text in one.plan.warnings)]
    tiers = tiers_of(before, found, asked, place) if asked.beside else []
    if not asked.curve:
        nearest = min(tiers, key=lambda row: abs(row.n_bytes - rows[0].n_bytes), default=None)
        tiers = [nearest] if nearest else []
    made: Made | None = None
    plots: tuple[Path, ...] = ()
    if asked.curve:
        every = scored([*rows, *tiers], before, asked, place)
        rows, tiers = every[: len(rows)], every[len(rows) :]
        if asked.out is not None:
            plots = plot(asked.out, rows, tiers, before)
            if not plots:
                warnings.append("no plot written: plots need matplotlib; pip install 'apex-build[report]'")
    else:
        assert asked.out is not None
        types, said = _refined(rows[0], before, found, asked, place)
        made = _made(rows[0], before, asked, place, types, said)
        rows, tiers, lost = with_check(rows, tiers, before, asked, place)
        made = replace(made, lines=(*made.lines, *lost))
    return Done(tuple(rows), tuple(tiers), before.at, made, plots, tuple(dict.fromkeys(warnings)))


def _blank(model: Model, types: Mapping[str, tuple[str, ...]], *, head: bool) -> Measurement:
    """A measurement in which every type costs nothing, to find out what choices there will be."""
    nothing = measurement.Sensitivity(0.0, None, None, 1.0, "")
    known = {name: dict.fromkeys(some, errors.TypeLoss(0.0, 0.0)) for name, some in types.items()}
    heads = tuple(tensor.name for tensor in model.tensors if tensor.draft_head and tensor.name in types)
    parts = (measurement.HeadPart(heads, 0.0, None, None),) if head and heads else ()
    return Measurement(
        model.path.name, measurement.shapes_of(model), {}, known, dict.fromkeys(types, nothing), head=parts
    )


def _targets(model: Model, asked: Asked, place: Workplace) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """How the GPU's memory is used, in words, and the size of each file in bytes. Raises BudgetUnfit, GpuUnknown."""
    if asked.curve:
        return (), asked.curve
    if asked.size is not None:
        return (), (asked.size,)
    if asked.bits is not None:
        return (), (budget.bytes_for(asked.bits, model) + other_bytes(model),)
    assert asked.gpu is not None
    (target, *_) = gpus_of([asked.gpu], place.plugins)
    if not target.memory_gib:
        raise BudgetUnfit(
            f"the memory size of '{target.name}' is unknown", hint="use --target-size SIZE instead of --gpu"
        )
    vocabulary = len(model.metadata.get("tokenizer.ggml.tokens", ()))
    taken = footprint(place.tools, model.path, context=asked.context, vocabulary=vocabulary)
    memory = int(target.memory_gib * 2**30)
    margin = int(_MARGIN * memory)
    parts = {
        "KV cache": taken.kv_cache,
        "recurrent state": taken.recurrent_state,
        "compute buffers": taken.compute_buffers,
        "driver and display": margin,
    }
    left = memory - sum(parts.values())
    listed = ", ".join(f"{name} {budget.shown(size)}" for name, size in parts.items() if size)
    if left <= 0:
        raise BudgetUnfit(
            f"{target.name}: {budget.shown(memory)} of memory cannot hold {asked.context} tokens of context: {listed}",
            hint=f"--context {max(1, asked.context // 4)}, or another GPU (apex build --list-gpus shows them)",
        )
    said = f"{target.name}: {budget.shown(memory)}; with {asked.context} tokens of context: {listed}"
    return (f"{said}; left for the file: {budget.shown(left)}",), (left,)


def _beside(asked: Asked, model: Model) -> Path:
    if asked.out is not None:
        return asked.out.with_name(f"{asked.out.stem}.measurement.json")
    return Path(f"{model.path.stem}.measurement.json")


def _known(at: Path, plan: measure.Plan, asked: Asked, place: Workplace) -> tuple[Measurement | None, tuple[str, ...]]:
    """The measurement in `at` if it fits the plan; a file that the user named may also belong to a model with the same
    shapes.

    What was made from something else is not replaced without --force, with the exception of the model's own beside the
    output. Raises OutputUnwritable, MeasurementUnfit.
    """
    given, model = asked.measurement is not None, plan.model
    if not at.exists():
        if given:
            check_place(at, hint="give another name with --measurement")
        return None, ()
    found = replace(measurement.read(at), file=at)
    if found.parts == plan.parts:
        return found, ()
    own = found.parts.get("model") == fingerprint(model) and found.parts.get("tools") == place.tools.identity
    if given and not own:
        return found, tuple(measurement.check(found, model, place.tools.identity))
    if own:
        other = "; ".join(measurement.differing(found.parts, plan.parts))
    else:
        other = f"the model {found.model}, with the build {str(found.parts.get('tools'))[:12]}"
    if not asked.force and (given or not own):
        measurement.check(found, model, place.tools.identity)
        name = "--measurement" if given else "-o"
        raise OutputUnwritable(
            f"{at} exists and was made from something else: {other}",
            hint=f"give another name with {name}, or --force to replace it",
        )
    return None, (f"{at} was made from something else and is replaced: {other}",)


def _planned(target: int, before: Preview, asked: Asked, place: Workplace) -> Planned:
    settings = {name: value for name, value in asked.settings.items() if value != ""}
    parameters = {**settings, "measurement": str(before.at), "target_size": str(target)}
    return plan_model(before.model, PlanOptions(NAME, parameters, asked.imatrix), place=place)


def _refined(
    row: Row, before: Preview, found: Measurement, asked: Asked, place: Workplace
) -> tuple[Path | None, tuple[str, ...]]:
    """A file of types to override the policy's, if exchanges help; and a line that tells how many did."""
    if not asked.refine:
        return None, ()
    items = policy.choices_of(before.task, found).trunk
    types = {item.name: row.types.get(item.name, "") for item in items}
    assert row.target is not None
    slack = max(0, row.target - row.n_bytes)
    some = refine.exchanges(items, types, slack, asked.refine)
    plain = {name: kind for name, kind in types.items() if kind}
    task = measure.task_for(before.model, place, before.plan.texts.probed, before.plan.most, asked.threads, "refining")
    tried = refine.probes(plain, some)
    scores = run_probes(task, tried, before.data.path, chunks=before.plan.chunks)
    kept = refine.that_pay(some, scores, slack)
    if not kept:
        return None, (f"refined: none of {len(some)} exchanges helps beyond doubt",)
    changed = {name: kind for one in kept for name, kind in one.types.items()}
    (together,) = run_probes(
        task, [Probe("all that pay", {**plain, **changed})], before.data.path, chunks=before.plan.chunks
    )
    gain = sensitivity.difference(together, scores[0])
    if gain.value >= 0:
        return None, (f"refined: {len(kept)} of {len(some)} exchanges help alone, but not together",)
    text = "".join(f"^{re.escape(name)}$={kind}\n" for name, kind in sorted(changed.items()))
    path = cache_folder("fit", "refined", sha256_json([row.target, text])[:32]) / "types.txt"
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")
    gained = f"{-gain.value:.5f} nats less on the probes' text"
    return path, (f"refined: {len(kept)} of {len(some)} exchanges help: {gained}",)


def _made(
    row: Row, before: Preview, asked: Asked, place: Workplace, types: Path | None = None, said: tuple[str, ...] = ()
) -> Made:
    assert asked.out is not None
    settings = {name: value for name, value in asked.settings.items() if value != ""}
    parameters = {**settings, "measurement": str(before.at), "target_size": str(row.target)}
    options = QuantizeOptions(
        (NAME,), parameters, asked.imatrix, tensor_types=types, threads=asked.threads, force=asked.force
    )
    (planned,) = plan_files(before.model, asked.out, options, place=place)
    if row.target is not None and planned.job.n_bytes > row.target:
        raise BudgetUnfit(
            f"{asked.out}: would be too large: expected at most {row.target} bytes, found {planned.job.n_bytes}",
            hint=f"--target-size {row.target - (planned.job.n_bytes - row.target)}",
        )
    done = write_file(planned, options, place=place)
    return Made(done.path, done.done.n_bytes, done.done.reused, said)
