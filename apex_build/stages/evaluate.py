"""Stage evaluate: figures of files with their intervals, recorded as soon as they are measured."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from apex_build.cluster.connect import connected
from apex_build.cluster.evaluations import ClusterEvaluations, to_send
from apex_build.errors import ChatTemplateFailed
from apex_build.evaluation.built_in import built_in_prompts, built_in_texts
from apex_build.evaluation.run import (
    Inputs,
    Result,
    Work,
    check_results,
    check_settings,
    choose,
    in_order,
    plan_work,
    with_report,
)
from apex_build.evaluation.run import evaluate as run
from apex_build.evaluation.task import ToolOptions, read_prompts
from apex_build.gguf_model.catalogue import Model
from apex_build.stages.given import ModelFile, Workplace, check_data_files, texts_apart, texts_by_domain, workplace

_PROMPTS = 12  # of each domain, of the built-in set
M = TypeVar("M")


@dataclass(frozen=True)
class EvaluateOptions:
    """`only`: these evaluators; by default all whose inputs are given. `settings`: evaluator.parameter -> value.

    `results`: a file that results are appended to, and reused from (unless `force`).
    `cluster`: the address of a Dask scheduler, or local:N; each evaluator of each file is a task there.
    """

    reference: Path | None = None
    texts: tuple[Path, ...] = ()
    prompts: Path | None = None
    data: Mapping[str, Path] = field(default_factory=dict, hash=False)  # evaluator -> its file
    only: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict, hash=False)
    threads: int | None = None
    tools: ToolOptions = field(default_factory=ToolOptions)
    results: Path | None = None
    force: bool = False
    cluster: str | None = None


@dataclass(frozen=True)
class PlannedEvaluation:
    """`left_out`: names of files, and the evaluators whose inputs they lack. `built_in`: which built-in inputs are
    used, 'texts' or 'prompts'; `without`: why there are none. `heldout`: the folder of the text kept apart from
    calibration that was taken.
    """

    works: tuple[Work, ...]
    inputs: Inputs
    left_out: Mapping[tuple[str, ...], list[str]] = field(hash=False)
    built_in: str = ""
    without: str = ""
    heldout: Path | None = None


def inputs_of(options: EvaluateOptions, place: Workplace) -> Inputs:
    """Raises CalibrationSetInvalid, ParameterUnknown, ModelMissing, ModelInvalid."""
    evaluators = place.plugins.evaluators()
    found = Inputs(
        reference=place.model(options.reference) if options.reference else None,
        texts=texts_by_domain(options.texts),
        prompts=read_prompts(options.prompts) if options.prompts else (),
        data=check_data_files(options.data, evaluators),
        settings=options.settings,
        options=options.tools,
        files=(*([options.prompts] if options.prompts else []), *place.plugins.files()),
    )
    check_settings(found.settings, evaluators)
    return found


def plan(files: Sequence[ModelFile], options: EvaluateOptions, *, place: Workplace | None = None) -> PlannedEvaluation:
    """Plan and check the measurements; all files use the same texts and prompts. Raises as `evaluate`."""
    place = place or workplace()
    evaluators = place.plugins.evaluators()
    models = list({model.path: model for model in map(place.model, files)}.values())
    given = inputs_of(options, place)
    apart = {} if given.texts else texts_apart(models)
    if apart:
        given = replace(given, texts=apart)
    inputs, built_in, without = _with_built_in(given, models[0], options.only, place)
    works: list[Work] = []
    left_out: dict[tuple[str, ...], list[str]] = {}
    for model in models:
        chosen, lacking = choose(evaluators, options.only, model, inputs)
        if lacking:
            left_out.setdefault(tuple(lacking), []).append(model.path.name)
        works += [plan_work(evaluator, model, inputs, place.tools, threads=options.threads) for evaluator in chosen]
    if options.results is not None:
        check_results(options.results, works, inputs)
    heldout = next(iter(apart.values())).parent if apart else None
    return PlannedEvaluation(tuple(works), inputs, left_out, built_in, without, heldout)


def evaluate(
    files: Sequence[ModelFile],
    options: EvaluateOptions = EvaluateOptions(),
    *,
    place: Workplace | None = None,
) -> tuple[Result, ...]:
    """Measure the files. A failing evaluator gives a Result with its error, and the others still run.

    Raises EvaluatorUnknown, EvaluationRefused, ParameterUnknown, CalibrationSetInvalid, VocabularyMismatch,
    OutputUnwritable.
    """
    place = place or workplace()
    planned = plan(files, options, place=place)
    works = [with_report(work, place.report) for work in planned.works]
    with measuring(works, options, place) as how:
        return tuple(in_order(works, how.measure(works, options.results, force=options.force)))


class Measure(Protocol):
    """`evaluation.run.evaluate`, or the same on a cluster."""

    def __call__(
        self, works: Sequence[Work], results: Path | None, *, force: bool = False
    ) -> Generator[Result, None, None]: ...


@dataclass(frozen=True)
class Measuring(Generic[M]):
    """How to measure, and how many at a time: on the workers of a cluster (`away`), or one here."""

    measure: M
    at_once: Callable[[], int] = lambda: 1
    away: bool = False


@contextmanager
def measuring(works: Sequence[Work], options: EvaluateOptions, place: Workplace) -> Iterator[Measuring[Measure]]:
    """How to measure these: here, or on a cluster if one is given, and has something to do. Raises ClusterFailed,
    WorkersUnfit.
    """
    if options.cluster is None or not to_send(works, options.results, force=options.force):
        yield Measuring(run)
        return
    with connected(options.cluster, place.tools, place.report) as found:
        yield Measuring(ClusterEvaluations(found, place.tools, place.report), found.at_once, away=True)


def _with_built_in(inputs: Inputs, model: Model, only: Sequence[str], place: Workplace) -> tuple[Inputs, str, str]:
    """Add the built-in texts, rendered with this model's chat template, if texts are needed and none are given; and
    prompts if an evaluator of `only` requires them.
    """
    evaluators = place.plugins.evaluators()
    wanted = [evaluators[name] for name in only if name in evaluators] or list(evaluators.values())
    texts = not inputs.texts and any("text" in one.needs for one in wanted)
    prompts = not inputs.prompts and bool(only) and any("prompts" in one.needs for one in wanted)
    if not texts and not prompts:
        return inputs, "", ""
    sources = place.plugins.calibration_sources()
    try:
        if texts:
            inputs = replace(inputs, texts=built_in_texts(model, sources))
        if prompts:
            inputs = replace(inputs, prompts=built_in_prompts(model, sources, _PROMPTS))
    except ChatTemplateFailed as error:
        return inputs, "", error.message
    return inputs, "texts" if texts else "prompts", ""
