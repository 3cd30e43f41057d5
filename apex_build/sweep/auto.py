"""Measure values on the user's model: `draft_head=auto` becomes the smallest mixture that loses little there.

A type's loss on one model says little about another (docs/results/draft-head.md), so none is built in. The mixtures
that the policy names (Parameter.measured) are swept on the trunk that the policy makes, the largest first, until one
clearly loses too much.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from apex_build.errors import DataMissing, EvaluationRefused
from apex_build.evaluation.run import Inputs
from apex_build.evaluation.services import settings_for, the_one_serving
from apex_build.evaluation.task import ToolOptions
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.fingerprint import fingerprint
from apex_build.gguf_model.mtp_rows import CHOICE_OF, Rows
from apex_build.hookspecs import Evaluator, PolicySpec, Service
from apex_build.loaded import origin_of
from apex_build.native.toolset import Toolset
from apex_build.parameters import AUTO, Value
from apex_build.places import cache_root
from apex_build.progress import Report, silent
from apex_build.storage.digests import sha256_file, sha256_json
from apex_build.sweep.loss import Loss, loss_of
from apex_build.sweep.plan import Request, Sweep, plan_sweep
from apex_build.sweep.rows import Row, read_rows
from apex_build.sweep.run import Progress, run_sweep

CHUNKS = 8  # of each text: of 512 tokens, the second half scored
BOUND = 0.5  # points, of a parameter that names no bound
_PER_CENT_A_POINT = 2.0  # a bound of 0.5 points of agreement goes with one of 1 % of the tokens per step
_DOUBT = 2.0  # the interval's upper end may be this many times the bound


@dataclass(frozen=True)
class Candidate:
    """A value that was measured. `agreement`: loss in points; `tokens`: loss in % of the tokens per step; against the
    first value.
    """

    value: str
    head_bytes: int
    agreement: Loss
    tokens: Loss
    fits: bool


@dataclass(frozen=True)
class Choice:
    """What 'auto' chose and why: the candidates in the order in which they were tried, largest first."""

    parameter: str
    value: str
    bound: float
    positions: int
    candidates: tuple[Candidate, ...]
    reused: bool  # measured before

    @property
    def chosen(self) -> Candidate | None:
        return next((one for one in self.candidates if one.value == self.value), None)

    @property
    def text(self) -> str:
        """In one line, for the file's metadata: at most 127 bytes."""
        if self.chosen is None:
            return f"{self.value}: none smaller loses less than {self.bound:g} points"
        agreement, tokens = self.chosen.agreement, self.chosen.tokens
        return (
            f"loss {agreement.told(2)} points of agreement, {tokens.told(2)} % of tokens a step, {self.positions} "
            "positions"
        )


@dataclass(frozen=True)
class Question:
    """What is to be measured: a policy on a model, with a parameter at 'auto'."""

    model: Model
    policy: PolicySpec
    parameters: Mapping[str, Value]
    imatrix: Path | None
    tools: Toolset
    evaluators: Mapping[str, Evaluator]
    texts: Mapping[str, Path]
    options: ToolOptions = field(default_factory=ToolOptions)
    threads: int | None = None
    chunks: int = CHUNKS
    head_rows: Rows | None = None  # that the draft head was trained on, if not those known of its architecture


def parameter_at_auto(policy: PolicySpec, given: Mapping[str, Value]) -> str | None:
    """The parameter that is to be measured, if there is one."""
    for name, parameter in policy.parameters.items():
        if parameter.measured and str(given.get(name, parameter.default)).strip().lower() == AUTO:
            return name
    return None


def measure(question: Question, *, report: Report = silent, progress: Progress | None = None) -> Choice:
    """Measure whatever has not been measured yet, and choose. Resumes an interrupted run.

    Raises EvaluationRefused for a model without a draft head, DataMissing without an imatrix that covers it, and what
    a sweep raises.
    """
    sweep, name, bound = _planned(question, report)
    return _chosen(sweep, name, bound, progress)


def known_choice(question: Question) -> Choice | None:
    """The choice, if earlier measurements decide it; None while one that is needed is missing."""
    if question.imatrix is None or not question.model.has_head:
        return None
    name, bound = _asked(question)
    figures = _service(question)[1].figures
    rows = list(read_rows(_folder(question, name)).values())
    baseline = next((row for row in rows if row.baseline), None)
    if baseline is None:
        return None
    left = set(question.policy.parameters[name].measured) - {row.values[name] for row in rows}
    if left and not any(_clearly_over(row, baseline, bound, figures) for row in rows):
        return None
    return _choice(rows, name, bound, figures, reused=True)


def _asked(question: Question) -> tuple[str, float]:
    """The parameter and its bound."""
    name = parameter_at_auto(question.policy, question.parameters)
    assert name is not None
    bound = question.policy.parameters[name].bound
    default = question.policy.parameters[bound].default if bound in question.policy.parameters else BOUND
    return name, float(question.parameters.get(bound, default))


def _others(question: Question, name: str) -> dict[str, Value]:
    """The other settings: without the measured parameter and its bound."""
    apart = (name, question.policy.parameters[name].bound)
    return {key: value for key, value in question.parameters.items() if key not in apart}


def _service(question: Question) -> tuple[Evaluator, Service]:
    return the_one_serving(question.evaluators, "auto", "agreement")


def _planned(question: Question, report: Report) -> tuple[Sweep, str, float]:
    name, bound = _asked(question)
    model = question.model
    parameter = question.policy.parameters[name]
    if not model.has_head:
        plain = f", or --policy {question.policy.otherwise}" if question.policy.otherwise else ""
        raise EvaluationRefused(
            f"{model.path} has no draft head, which {name}=auto would measure",
            hint=f"--set {name}={(*parameter.words, *parameter.measured)[0]}{plain}",
        )
    if question.imatrix is None:
        raise DataMissing(
            f"{name}=auto measures mixtures that need calibration data of the head, and no imatrix was given",
            hint=f"apex calibrate {model.path}, then --imatrix FILE; or --set {name}={parameter.measured[0]}",
        )
    evaluator, service = _service(question)
    rows = CHOICE_OF.get(question.head_rows, "auto")
    folder = _folder(question, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    request = Request(
        model=model,
        policy=question.policy,
        parameters=_others(question, name),
        over={name: parameter.measured},
        imatrix=question.imatrix,
        folder=folder,
        tools=question.tools,
        evaluators=question.evaluators,
        only=(evaluator.name,),
        inputs=Inputs(
            texts=question.texts,
            settings=settings_for(evaluator, service, chunks=str(question.chunks), rows=rows),
            options=question.options,
        ),
        curves=(True,),
        baseline={name: parameter.measured[0]},
        threads=question.threads,
        head_rows=question.head_rows,
    )
    return plan_sweep(request, report=report), name, bound


def _folder(question: Question, name: str) -> Path:
    """The folder of the measurements: one for each set of inputs. The bound is not an input."""
    assert question.imatrix is not None
    evaluator, service = _service(question)
    parts = {
        "model": fingerprint(question.model),
        "policy": question.policy.name,
        "parameters": {key: str(value) for key, value in _others(question, name).items()},
        "measured": question.policy.parameters[name].measured,
        "imatrix": sha256_file(question.imatrix),
        "texts": {domain: sha256_file(path) for domain, path in question.texts.items()},
        "chunks": question.chunks,
        "tools": question.tools.identity,
        "head_rows": question.head_rows,
        "evaluator": [
            evaluator.name,
            evaluator.version,
            *origin_of(evaluator),
            dict(service.settings),
            dict(service.figures),
        ],
        **question.options.parts(question.tools),
    }
    return cache_root() / "evaluation" / "auto" / sha256_json(parts)[:32]


def _chosen(sweep: Sweep, name: str, bound: float, progress: Progress | None) -> Choice:
    rows: list[Row] = []
    reused = True
    figures = the_one_serving(sweep.request.evaluators, "auto", "agreement")[1].figures
    with contextlib.closing(run_sweep(sweep, progress=progress) if progress else run_sweep(sweep)) as outcomes:
        for outcome in outcomes:
            if outcome.errors:
                raise outcome.errors[0]
            rows.append(outcome.row)
            reused &= outcome.reused or not outcome.row.measured
            if _clearly_over(outcome.row, rows[0], bound, figures):
                break
    shutil.rmtree(sweep.request.folder / "files", ignore_errors=True)  # the trunk and the baseline, after a break
    return _choice(rows, name, bound, figures, reused=reused)


def _choice(rows: Sequence[Row], name: str, bound: float, figures: Mapping[str, str], *, reused: bool) -> Choice:
    """Choose from the measured rows, which include the baseline. `figures`: names of the figures (Service.figures)."""
    baseline = next(row for row in rows if row.baseline)
    candidates = [
        one for row in rows if row is not baseline and (one := _candidate(row, baseline, name, bound, figures))
    ]
    candidates.sort(key=lambda one: -one.head_bytes)
    smallest = min((one for one in candidates if one.fits), key=lambda one: one.head_bytes, default=None)
    figure = baseline.figure(figures["agreement"])
    value = smallest.value if smallest else baseline.values[name]
    return Choice(name, value, bound, (figure.n if figure else 0) or 0, tuple(candidates), reused)


def _candidate(row: Row, baseline: Row, name: str, bound: float, figures: Mapping[str, str]) -> Candidate | None:
    agreement, tokens = loss_of(row, figures["agreement"]), _tokens(row, baseline, figures)
    if agreement is None or tokens is None:
        return None
    fits = all(
        loss.value < limit and loss.high is not None and loss.high < _DOUBT * limit
        for loss, limit in ((agreement, bound), (tokens, _PER_CENT_A_POINT * bound))
    )
    return Candidate(row.values[name], row.head_bytes or 0, agreement, tokens, fits)


def _tokens(row: Row, baseline: Row, figures: Mapping[str, str]) -> Loss | None:
    """In per cent of the baseline's."""
    loss, of = loss_of(row, figures["tokens"]), baseline.figure(figures["tokens"])
    if loss is None or of is None or not of.value:
        return None
    scale = 100 / of.value
    return Loss(*(None if one is None else one * scale for one in (loss.value, loss.low, loss.high)))  # type: ignore[arg-type]


def _clearly_over(row: Row, baseline: Row, bound: float, figures: Mapping[str, str]) -> bool:
    """Whether it loses so much that no smaller one needs to be tried."""
    agreement, tokens = loss_of(row, figures["agreement"]), _tokens(row, baseline, figures)
    return any(
        loss is not None and loss.low is not None and loss.low > limit
        for loss, limit in ((agreement, bound), (tokens, _PER_CENT_A_POINT * bound))
    )
