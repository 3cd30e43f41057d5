"""Parts 1 and 2 together: make a measurement, keeping each piece as soon as it is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from apex_build.plugin_api import (
    BASELINE,
    CalibrationSetInvalid,
    Model,
    PaceEstimate,
    PolicyTask,
    Probe,
    Task,
    Workplace,
    cache_folder,
    fingerprint,
    probe_seconds,
    run_probes,
    sha256_file,
    sha256_json,
    whole_file,
)

from . import allocate, errors, head, measurement, policy, sensitivity
from .errors import Errors
from .measurement import Anchor, Measurement, Score, Sensitivity

CONTEXT = 512
PROBED = ("Q2_K", "Q3_K", "IQ4_NL", "Q4_0", "Q8_0")  # types of probes, whatever types the file may have
CHUNKS = 4  # of each text, for the probes
_LEAST_TEXT = 2 * 4 * CONTEXT  # bytes of half a text: two chunks at four bytes a token
_ANCHORS = (2.1, 2.5, 3.0, 3.6, 4.3, 5.2, 6.2)  # bits per weight of the trunk
_LONGER = 4  # whole files get this many times the chunks: a few of them set the level of all predictions


@dataclass(frozen=True)
class Texts:
    """Each text in two halves: one that the probes use, and one that they do not."""

    probed: Mapping[str, Path]
    unseen: Mapping[str, Path]


@dataclass(frozen=True)
class Plan:
    """What to measure, and on which texts. `budget`: extra chunks to evaluate, in total, for probes whose cost is lost
    in noise.
    """

    work: errors.Work
    texts: Texts
    chunks: int = CHUNKS
    budget: int = 0
    threads: int | None = None
    cores: int = 1
    head_score: bool = False
    policy_task: PolicyTask | None = field(default=None, repr=False)

    @property
    def model(self) -> Model:
        return self.work.model

    @property
    def imatrix(self) -> Path | None:
        return self.work.data.path if self.work.data else None

    @property
    def most(self) -> int:
        """Chunks of each text in the reference."""
        return _LONGER * self.chunks

    @property
    def parts(self) -> dict[str, object]:
        """What determines a measurement."""
        return {
            "errors": self.work.identity,
            "model": fingerprint(self.model),
            "imatrix": self.work.data.sha256 if self.work.data else None,
            "tools": self.work.tools.identity,
            "texts": {name: sha256_file(path) for name, path in self.texts.probed.items()},
            "chunks": self.chunks,
            "context": CONTEXT,
            "budget": self.budget,
            "probing": sensitivity.VERSION,
            "head": self.head_score,
            "types": sorted({kind for types in self.work.types.values() for kind in types}),
        }


def split(texts: Mapping[str, Path]) -> Texts:
    """Cut each text in the middle, at the end of a line. Raises CalibrationSetInvalid if a text is too short."""
    probed: dict[str, Path] = {}
    unseen: dict[str, Path] = {}
    for name, path in texts.items():
        content = path.read_bytes()
        cut = content.rfind(b"\n", 0, len(content) // 2 + 1) + 1 or len(content) // 2
        if min(cut, len(content) - cut) < _LEAST_TEXT:
            raise CalibrationSetInvalid(
                f"{path}: text too short for the probes: expected at least {2 * _LEAST_TEXT} bytes (one half for the "
                f"probes, one for the check), found {len(content)}",
                hint="give a longer text, or several joined into one",
            )
        folder = cache_folder("fit", "texts", sha256_json([path.name, sha256_file(path)])[:32])
        for halves, part, half in ((probed, content[:cut], "probed"), (unseen, content[cut:], "unseen")):
            halves[name] = folder / half / f"{name}.txt"
            if not halves[name].is_file() or halves[name].stat().st_size != len(part):
                halves[name].parent.mkdir(exist_ok=True)
                with whole_file(halves[name]) as written:
                    written.write_bytes(part)
    return Texts(probed, unseen)


def task_for(
    model: Model,
    place: Workplace,
    texts: Mapping[str, Path],
    chunks: int,
    threads: int | None,
    name: str = "probes",
    option: str = "--chunks",
) -> Task:
    """`option`: of the verb, which sets the number of chunks."""
    settings = {"context": CONTEXT, "parse_special": True, "chunks": chunks}
    return Task(name, model, place.tools, None, texts, (), None, settings, threads, place.report, chunks_option=option)


def first(plan: Plan, found: Errors) -> tuple[tuple[sensitivity.Group, ...], tuple[Probe, ...]]:
    """The groups of the trunk, and their probes."""
    heads = {tensor.name for tensor in plan.model.tensors if tensor.draft_head}
    groups = sensitivity.groups_of(plan.model, [name for name in plan.work.types if name not in heads])
    return groups, sensitivity.first_probes(groups, plain(found))


def plain(found: Errors) -> dict[tuple[str, str], float]:
    return {(name, kind): one.error for name, types in found.items() for kind, one in types.items()}


@dataclass(frozen=True)
class Expected:
    """How long what is not measured yet will take; 0 seconds: all of it is. `probes`: how many there are in all."""

    errors: PaceEstimate
    probing: PaceEstimate
    probes: int

    @property
    def sum(self) -> PaceEstimate:
        return _sum(self.errors, self.probing)


def expected(plan: Plan, place: Workplace) -> Expected:
    some = {name: {kind: errors.TypeLoss(0.1, 0.0) for kind in types} for name, types in plan.work.types.items()}
    _, probes = first(plan, some)
    task = task_for(plan.model, place, plan.texts.probed, plan.most, plan.threads)
    found = probe_seconds(task, probes, plan.imatrix, chunks=plan.chunks)
    if again := min(len(probes), plan.budget // (plan.chunks * len(plan.texts.probed))):
        found = replace(found, seconds=found.seconds * (1 + again / len(probes)))
    whole = _of_whole_files(plan, some)
    found = _sum(found, probe_seconds(task, whole, plan.imatrix, chunks=plan.most, references=False))
    heads: list[Probe] = []
    if plan.head_score:
        _, heads = head.parts(plan.model, list(plan.work.types), plain(some))
        found = _sum(
            found,
            probe_seconds(task, heads, plan.imatrix, chunks=plan.chunks, head_depth=1, references=False),
        )
    return Expected(errors.expected(plan.work, plan.cores), found, len(probes) + len(whole) + len(heads))


def _sum(*some: PaceEstimate) -> PaceEstimate:
    return PaceEstimate(sum(one.seconds for one in some), all(one.measured for one in some))


def _of_whole_files(plan: Plan, found: Errors) -> list[Probe]:
    """About those that `_anchored` will make: each tensor at the type that is nearest in bits."""
    assert plan.policy_task is not None
    ggml = plan.policy_task.ggml
    heads = {tensor.name for tensor in plan.model.tensors if tensor.draft_head}
    bits = {kind: ggml.type_traits(kind).bits_per_weight for types in found.values() for kind in types}
    return [
        Probe(
            f"whole, {size:g} bits",
            {
                name: min(types, key=lambda kind: abs(bits[kind] - size))
                for name, types in found.items()
                if types and name not in heads
            },
        )
        for size in _ANCHORS
        if min(bits.values(), default=size) <= size <= max(bits.values(), default=size)
    ]


def measure(plan: Plan, place: Workplace) -> Measurement:
    """Measure whatever has not been measured yet; the same call resumes an interrupted run."""
    found = errors.measure(plan.work, threads=plan.cores, report=place.report)
    groups, probes = first(plan, found)
    task = task_for(plan.model, place, plan.texts.probed, plan.most, plan.threads)
    scores = run_probes(task, probes, plan.imatrix, chunks=plan.chunks)
    known = plain(found)
    if plan.budget and (again := sensitivity.more_chunks(groups, scores, known, plan.budget)):
        longer = run_probes(task, again, plan.imatrix, chunks=2 * plan.chunks)
        better = {score.probe.key: score for score in longer}
        scores = tuple(better.get(score.probe.key, score) for score in scores)
    sensitivities = {
        name: Sensitivity(
            one.s.value / len(one.group.tensors),
            None if one.s.low is None else one.s.low / len(one.group.tensors),
            None if one.s.high is None else one.s.high / len(one.group.tensors),
            one.p,
            one.group.name,
            one.measured,
        )
        for one in sensitivity.sensitivities(groups, scores, known)
        for name in one.group.tensors
    }
    listed = tuple(
        Score(score.probe.name, score.mean.value, score.mean.low, score.mean.high, score.positions) for score in scores
    )
    made = Measurement(
        plan.model.path.name, measurement.shapes_of(plan.model), plan.parts, found, sensitivities, (), listed, ()
    )
    if plan.head_score:
        parts, tried = head.parts(plan.model, list(plan.work.types), known)
        heads = head.measure(
            replace(task, evaluator="draft head"), parts, tried, plan.imatrix, known, chunks=plan.chunks
        )
        made = replace(made, head=heads)
    return _anchored(made, plan, task)


def _anchored(made: Measurement, plan: Plan, task: Task) -> Measurement:
    """Add anchors: allocate and measure whole files of several sizes, to see how the losses of tensors add up. They get
    more text than the other probes.
    """
    assert plan.policy_task is not None
    choices = policy.choices_of(plan.policy_task, made)
    tensors = {tensor.name: tensor for tensor in plan.model.tensors}
    weights = sum(tensors[item.name].n_elements for item in choices.trunk)
    least, most = allocate.smallest(choices.trunk), allocate.largest(choices.trunk)
    probes: list[Probe] = []
    totals: list[float] = []
    for bits in _ANCHORS:
        size = int(bits * weights / 8)
        if not least <= size <= most:
            continue
        found = allocate.allocate(choices.trunk, size)
        types = {name: kind for name, kind in found.types.items() if kind != tensors[name].type}
        probes.append(Probe(f"whole, {bits:g} bits", types))
        totals.append(found.loss)
    if not probes:
        return made
    base, *measured = run_probes(
        replace(task, evaluator="whole files"), [BASELINE, *probes], plan.imatrix, chunks=plan.most
    )
    anchors = []
    for total, score in zip(totals, measured, strict=True):
        cost = sensitivity.difference(score, base)
        anchors.append(Anchor(total, cost.value, cost.low, cost.high))
    return replace(made, anchors=tuple(anchors))
