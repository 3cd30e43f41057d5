"""Run evaluators over files: check first, record each result as it arrives, and do not repeat recorded ones."""

from __future__ import annotations

import datetime
import json
import math
import numbers
import operator
import os
import platform
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from apex_build import __version__
from apex_build.errors import (
    ApexError,
    EvaluationRefused,
    EvaluatorUnknown,
    OutputUnwritable,
    ParameterUnknown,
    PluginFailed,
)
from apex_build.evaluation.task import Prompt, Task, ToolOptions
from apex_build.evaluation.vocabulary import check_same_vocabulary
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.fingerprint import fingerprint
from apex_build.gguf_model.runnable import check_runnable
from apex_build.hookspecs import Evaluator, Figure
from apex_build.loaded import origin_of
from apex_build.native.ggml import Ggml
from apex_build.native.toolset import Toolset
from apex_build.near import nearby, no_such
from apex_build.parameters import Value, values_of
from apex_build.places import cache_root, in_use
from apex_build.progress import Report, silent
from apex_build.storage.digests import sha256_file, sha256_json
from apex_build.storage.disk import check_room
from apex_build.storage.outputs import check_apart, check_place, locked_output, whole_file
from apex_build.system import cpus

_ELSEWHERE = "give another file with --results"
_FIELDS = frozenset(one.name for one in fields(Figure))
_RESULT_ROOM = 4 << 20  # bytes free, for the records of a run


@dataclass(frozen=True)
class Inputs:
    """Inputs of evaluators besides the file: each gets only what it needs or uses. `options` are for their tools."""

    reference: Model | None = None
    texts: Mapping[str, Path] = field(default_factory=dict, hash=False)  # domain -> UTF-8 text
    prompts: tuple[Prompt, ...] = ()
    data: Mapping[str, Path] = field(default_factory=dict, hash=False)  # evaluator -> its file
    settings: Mapping[str, str] = field(default_factory=dict, hash=False)  # evaluator.parameter -> value
    options: ToolOptions = field(default_factory=ToolOptions)
    files: tuple[Path, ...] = ()  # other files that were read: prompts, plugins; no output may replace them


@dataclass(frozen=True)
class Work:
    """One evaluator on one file, checked and ready. `parts` is what its result depends on; `identity` their sha256."""

    evaluator: Evaluator
    task: Task
    parts: Mapping[str, Any] = field(hash=False)
    identity: str


@dataclass(frozen=True)
class Result:
    """`figures`, or the error that prevented them. `reused`: they were recorded earlier."""

    work: Work
    figures: tuple[Figure, ...]
    seconds: float
    reused: bool = False
    error: ApexError | None = None


def choose(
    evaluators: Mapping[str, Evaluator], only: Sequence[str], model: Model, inputs: Inputs
) -> tuple[list[Evaluator], list[str]]:
    """The evaluators for a file: those in `only`, or all whose inputs are given. Second, a line for each one left out.

    Raises EvaluatorUnknown; EvaluationRefused where one of `only` lacks something.
    """
    for name in only:
        if name not in evaluators:
            raise EvaluatorUnknown(
                no_such("evaluator", name, evaluators),
                hint="apex evaluate --list",
            )
    chosen: list[Evaluator] = []
    lacks: list[tuple[tuple[bool, int], str]] = []
    for name in dict.fromkeys(only) or evaluators:
        lacking = _lacking(evaluators[name], model, inputs)
        if lacking is None:
            chosen.append(evaluators[name])
        elif only:
            raise EvaluationRefused(f"{name} cannot be run on {model.path}: {lacking[0]}", hint=lacking[1])
        else:
            needs = evaluators[name].needs  # inputs that are easiest to provide first
            lacks.append((("data" in needs, len(needs)), f"{name}: {lacking[0]}"))
    left_out = [line for _, line in sorted(lacks, key=lambda one: one[0])]
    if not chosen:
        raise EvaluationRefused(
            f"nothing to measure {model.path} with: {'; '.join(left_out)}", hint="apex evaluate --help"
        )
    return chosen, left_out


def plan_work(
    evaluator: Evaluator,
    model: Model,
    inputs: Inputs,
    tools: Toolset,
    *,
    threads: int | None = None,
    report: Report = silent,
) -> Work:
    """Raises ParameterUnknown, EvaluationRefused (vocabularies differ), ModelInvalid (cannot be run)."""
    check_runnable(model)
    takes = {*evaluator.needs, *evaluator.uses}
    reference = inputs.reference if "reference" in takes else None
    if reference is not None:
        check_same_vocabulary(model, reference)
    texts = inputs.texts if "text" in takes else {}
    prompts = inputs.prompts if "prompts" in takes else ()
    data = inputs.data.get(evaluator.name) if "data" in takes else None
    settings = settings_of(evaluator, inputs.settings, tools)
    _, code = origin_of(evaluator)
    task = Task(
        evaluator.name, model, tools, reference, texts, prompts, data, settings, threads, report, inputs.options, code
    )
    parts: dict[str, Any] = {
        "evaluator": evaluator.name,
        "model": fingerprint(model),
        "reference": fingerprint(reference) if reference else None,
        "texts": {domain: sha256_file(path) for domain, path in texts.items()},
        "prompts": sha256_json([[prompt.domain, prompt.text] for prompt in prompts]) if prompts else None,
        "data": sha256_file(data) if data else None,
        "settings": settings,
        "tools": tools.identity,
        **inputs.options.parts(tools),
    }
    if code:
        parts["code"] = code
    if evaluator.version != 1:
        parts["version"] = evaluator.version
    if evaluator.timed:
        parts |= {"machine": platform.node(), "cores": cpus(), "threads": threads}
        if devices := os.environ.get("CUDA_VISIBLE_DEVICES"):
            parts["devices"] = devices
    return Work(evaluator, task, parts, sha256_json(parts))


def settings_of(evaluator: Evaluator, given: Mapping[str, str], tools: Toolset) -> dict[str, Value]:
    """The evaluator's parameters, including those given as `evaluator.parameter`."""
    own = {name.partition(".")[2]: value for name, value in given.items() if name.partition(".")[0] == evaluator.name}
    return values_of(f"evaluator '{evaluator.name}'", evaluator.parameters, dict(own), Ggml(tools))


def check_settings(given: Mapping[str, str], evaluators: Mapping[str, Evaluator]) -> None:
    """Raises ParameterUnknown for a setting that belongs to no evaluator."""
    for name in given:
        owner, dot, _ = name.partition(".")
        if not dot or owner not in evaluators:
            raise ParameterUnknown(
                f"'{name}' is not EVALUATOR.PARAMETER{nearby(owner, evaluators)}. The evaluators: "
                f"{', '.join(evaluators)}",
                hint=f"for example: --set {example}"
                if (example := _example_of(evaluators))
                else "apex evaluate --list",
            )


def _example_of(evaluators: Mapping[str, Evaluator]) -> str:
    """A setting that could be given."""
    return next(
        (f"{one.name}.{name}={p.default}" for one in evaluators.values() for name, p in one.parameters.items()), ""
    )


def evaluate(
    works: Sequence[Work], results: Path | None = None, *, force: bool = False
) -> Generator[Result, None, None]:
    """Do the work one after the other, each with all cores; timed evaluators last.

    Results are appended to `results`, one JSON object a line, and taken from there where they are; `force` measures
    again. An evaluator that fails gives a Result with its error, and the others still run. Raises OutputUnwritable.
    """
    known = {} if force or results is None else recorded(results)
    for work in sorted(works, key=lambda work: work.evaluator.timed):
        if (line := known.get(work.identity)) is not None:
            yield Result(work, tuple(map(_figure, line["figures"])), line["seconds"], True)
            continue
        began = time.monotonic()
        try:
            with in_use(cache_root() / "evaluation"):
                figures = checked(work.evaluator, work.evaluator.evaluate(work.task))
        except ApexError as error:
            yield Result(work, (), time.monotonic() - began, error=error)
            continue
        yield from kept(Result(work, figures, time.monotonic() - began), results)


def kept(result: Result, results: Path | None) -> Iterator[Result]:
    """The result, recorded first. Raises DiskTooSmall, OutputUnwritable, but only after it was given: hours of results
    are not lost.
    """
    try:
        if results is not None:
            append_record(results, record(result))
    except ApexError:
        yield result
        raise
    yield result


def in_order(works: Sequence[Work], results: Iterable[Result]) -> list[Result]:
    """Results of these works as `evaluate` gives them: a cluster gives those first that are done first."""
    places = {place_of(work): number for number, work in enumerate(works)}
    return sorted(results, key=lambda result: (result.work.evaluator.timed, places[place_of(result.work)]))


def place_of(work: Work) -> tuple[str, Path]:
    """Names it among the works of a run: the same file may be measured under two names."""
    return work.identity, work.task.model.path


def check_results(path: Path, works: Sequence[Work] = (), inputs: Inputs | None = None) -> None:
    """Refuse, before hours of work, a results file that could not be written afterwards: an input, another file, a full
    disk.

    Raises OutputUnwritable, DiskTooSmall.
    """
    path = path.absolute()
    check_place(path, _ELSEWHERE)
    check_apart([path], _inputs(works, inputs), _ELSEWHERE)
    recorded(path)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OutputUnwritable(f"{path}: the results cannot be written", hint=_ELSEWHERE)
    check_room(path.parent, path.stat().st_size if path.exists() else 0, path.name, spare=_RESULT_ROOM, hint=_ELSEWHERE)


def _inputs(works: Sequence[Work], inputs: Inputs | None) -> Iterator[Path]:
    for task in (work.task for work in works):
        yield from task.model.files
        yield from task.tools.files()
    if inputs:
        yield from inputs.reference.files if inputs.reference else ()
        yield from (*inputs.texts.values(), *inputs.data.values(), *inputs.files)


def recorded(path: Path) -> dict[str, dict[str, Any]]:
    """Records of a results file by identity; empty if there is no file. Raises OutputUnwritable for any other file."""
    return _records(path)[0]


def _records(path: Path) -> tuple[dict[str, dict[str, Any]], bytes]:
    """The records, and the file's content with its last line completed; a last one that a crash cut short is left out,
    where it follows a whole record.
    """
    if not path.exists():
        return {}, b""
    found: dict[str, dict[str, Any]] = {}
    outdated = False
    try:
        content = path.read_bytes()
        content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OutputUnwritable(f"{path}: not a file of results: {error}", hint=_ELSEWHERE) from None
    lines = content.split(b"\n")  # only a line feed ends a record
    unfinished = lines.pop()
    kept = lines
    for number, line in enumerate([*lines, unfinished] if unfinished else lines, 1):
        try:
            row = json.loads(line)
            for figure in row["figures"]:
                _figure(figure)
            if not isinstance(row["seconds"], (int, float)):
                raise ValueError
            # otherwise from an older version, and measured again
            if all("better" in figure for figure in row["figures"]):
                found[row["identity"]] = row
            else:
                outdated = True
        except (ValueError, TypeError, KeyError, RecursionError):
            if number <= len(lines) or not (found or outdated) or not line.startswith(b"{"):
                raise OutputUnwritable(f"{path}:{number}: not a result of apex evaluate", hint=_ELSEWHERE) from None
        else:
            if number > len(lines):
                kept = [*lines, unfinished]
    return found, b"".join(line + b"\n" for line in kept)


def record(result: Result) -> dict[str, Any]:
    """A result as a record of the results file."""
    task = result.work.task
    return {
        "identity": result.work.identity,
        "file": task.model.path.name,
        **result.work.parts,
        "plugin": origin_of(result.work.evaluator)[0],
        "apex": __version__,
        "reference_file": task.reference.path.name if task.reference else None,
        "figures": [asdict(figure) for figure in result.figures],
        "seconds": round(result.seconds, 3),
        "measured": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def append_record(path: Path, row: Mapping[str, Any]) -> None:
    """Append one line, whole or not at all, however the run ends. Several runs may append to the same file."""
    path = path.resolve()  # the file that a link leads to
    line = json.dumps(row, ensure_ascii=False, sort_keys=True).encode() + b"\n"
    with locked_output(path, wait=True), whole_file(path) as part:
        part.write_bytes(_records(path)[1] + line)


def checked(evaluator: Evaluator, figures: Sequence[Figure]) -> tuple[Figure, ...]:
    """What an evaluator gave. Raises PluginFailed for what cannot be recorded or shown."""
    try:
        return tuple(map(_plain, figures))
    except (TypeError, ValueError) as error:
        raise PluginFailed(f"plugin '{origin_of(evaluator)[0]}': evaluator '{evaluator.name}' gave {error}") from None


def _plain(figure: Figure) -> Figure:
    """The figure with plain Python numbers, also from NumPy's. Raises ValueError for what cannot be recorded or
    shown.
    """
    found: dict[str, Any] = {}
    for name in ("value", "low", "high"):
        number = getattr(figure, name)
        if number is not None and (not isinstance(number, numbers.Real) or not math.isfinite(number)):
            raise ValueError(
                f"a figure whose {name} is {number!r:.40}, expected a finite number or None: {figure!r:.200}"
            )
        found[name] = number if number is None or isinstance(number, (int, float)) else float(number)
    texts = (figure.name, figure.unit, figure.domain, figure.note, figure.better, figure.paired, figure.label)
    if not all(isinstance(text, str) and text == text.encode(errors="replace").decode() for text in texts):
        raise ValueError(f"a figure whose name, unit, domain, note, paired or label is not a string: {figure!a:.200}")
    if figure.better not in ("", "lower", "higher"):
        raise ValueError(f"a figure whose better is '{figure.better}', expected lower or higher: {figure!r:.200}")
    return replace(figure, **found, n=None if figure.n is None else operator.index(figure.n))


def _figure(data: Mapping[str, Any]) -> Figure:
    """The figure as recorded; ignores fields added by later versions. Raises TypeError, ValueError."""
    return _plain(Figure(**{name: data[name] for name in data if name in _FIELDS}))


def _lacking(evaluator: Evaluator, model: Model, inputs: Inputs) -> tuple[str, str] | None:
    """What the evaluator needs and lacks: the message and the hint."""
    tests: dict[str, tuple[Callable[[], bool], str, str]] = {
        "head": (lambda: model.has_head, "the file has no draft head", "apex inspect FILE"),
        "text": (lambda: bool(inputs.texts), "it needs a text", "--text FILE (several times, one for each domain)"),
        "prompts": (lambda: bool(inputs.prompts), "it needs prompts", "--prompts FILE.jsonl"),
        "reference": (lambda: inputs.reference is not None, "it needs a reference model", "--reference F16.gguf"),
        "data": (lambda: evaluator.name in inputs.data, "it needs its data file", f"--data {evaluator.name}=FILE"),
    }
    for need in evaluator.needs:
        if need not in tests:
            raise EvaluationRefused(
                f"evaluator '{evaluator.name}' of plugin '{origin_of(evaluator)[0]}' needs '{need}', which nothing "
                "gives"
            )
        there, what, hint = tests[need]
        if not there():
            return what, hint
    return None


def with_report(work: Work, report: Report) -> Work:
    return replace(work, task=replace(work.task, report=report))
