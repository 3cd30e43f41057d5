"""What a model loses where some of its tensors are quantized: its KL divergence from a reference, for many choices of
tensors and types in one run, without writing a file for any of them. Part of the plugin API.

`llama-perplexity --kl-divergence-probes` of this project's build quantizes the tensors of the loaded model, scores the
chunks, and puts the tensors back: a probe costs one evaluation of the chunks, and its tensors are quantized once for
all texts, whose references are joined into one file (joined.py). The tool writes a line for each probe and chunk of
this file as soon as it has it. The files with these lines are kept in the cache as they are, beside each other, for
each model, imatrix, set of texts and build; what is in any of them is not measured again. A run that was killed left
such a file.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from apex_build.errors import EvaluationRefused, ToolFailed
from apex_build.evaluation import pace
from apex_build.evaluation.chunked import check_context
from apex_build.evaluation.intervals import Estimate, clustered_ratio
from apex_build.evaluation.joined import distinct_texts, first_chunks, joined_reference, known_chunks, places
from apex_build.evaluation.task import Task
from apex_build.gguf_model.fingerprint import fingerprint
from apex_build.gguf_model.imatrix import read_imatrix
from apex_build.gguf_model.mtp_rows import AUTO, tool_arguments
from apex_build.native.ggml import Ggml
from apex_build.native.type_costs import quantize_seconds
from apex_build.places import cache_folder, cache_root, in_use
from apex_build.storage.digests import sha256_file, sha256_json
from apex_build.storage.locks import locked_in_thread
from apex_build.storage.scratch import scratch_folder
from apex_build.system import cpus

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_HEADER = ("probe", "chunk", "n", "kld", "same_top")
_HEAD = ("n", "agree", "p", "kld", "tokens", "tokens_p")  # of each depth: the columns mtp1_n, mtp1_agree, ...
_WIDE = ("F32", "F16", "BF16")  # types of a model whose tensors can be quantized in its memory


@dataclass(frozen=True)
class Probe:
    """Tensors, and the type that each is quantized to; none: the model as it is. The name is for people."""

    name: str
    types: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> str:
        """What the tool is given for a name, so that its lines say what they are of, whatever the probe is called."""
        return sha256_json({name: kind.upper() for name, kind in self.types.items()})[:20]


@dataclass(frozen=True, eq=False)
class ProbeScore:
    """The chunks of all texts, one text after the other; sums over the scored positions of each."""

    probe: Probe
    n: Ints
    kld: Floats  # nats
    same_top: Ints  # positions where the most probable token is the reference's
    text: Ints  # number of the text that the chunk is of
    # [chunk, depth - 1, _HEAD]: sums over the drafts of the draft head, where it is scored
    head: Floats = field(default_factory=lambda: np.zeros((0, 0, len(_HEAD))))

    @property
    def positions(self) -> int:
        return int(self.n.sum())

    @property
    def mean(self) -> Estimate:
        """Divergence at a position, in nats; chunks are independent, texts are strata."""
        return clustered_ratio(self.kld, self.n, self.text)

    @property
    def top1(self) -> Estimate:
        return clustered_ratio(self.same_top, self.n, self.text).within(0.0, 1.0)

    def of_head(self, what: str, depth: int) -> Estimate:
        """For each draft up to `depth` tokens: `agree` (its last token is the trunk's first choice), `p` (the trunk's
        probability of it), `kld` (of the head from the trunk), `tokens` and `tokens_p` (a step, greedy and sampled).
        """
        sums = self.head[:, depth - 1]
        return clustered_ratio(sums[:, _HEAD.index(what)], sums[:, 0], self.text)


BASELINE = Probe("the model as it is")

_Sums = dict[str, dict[int, tuple[float, ...]]]  # key of a probe -> chunk -> the other columns


def run_probes(
    task: Task, probes: Sequence[Probe], imatrix: Path | None, *, chunks: int, head_depth: int = 0
) -> tuple[ProbeScore, ...]:
    """Score each probe on the first `chunks` chunks of each of the task's texts: what is not known of them yet.

    With `head_depth` the draft head too, with drafts of up to so many tokens; only then may it be among the tensors.

    The task has the settings `context`, `parse_special` and `chunks`: how many chunks of a text its reference is made
    for, so that more of them can be scored later. Its reference is the model itself if it names none. Raises
    EvaluationRefused, ParameterUnknown, DiskTooSmall, CalibrationSetInvalid, ToolFailed, ToolKilled.
    """
    check_context(task)
    check_probes(task, probes, imatrix)
    task = _with_reference(task)
    with in_use(cache_root() / "evaluation"):
        reference = joined_reference(task)
        wanted = first_chunks(reference.chunks, chunks)
        folder = _folder(task, imatrix, head_depth)
        with locked_in_thread(folder / "probes", what="another run of the same probes", report=task.report):
            for start, few in _missing(probes, _read(folder), wanted).items():
                _run(task, few, imatrix, reference.logits, folder, range(start, wanted), head_depth)
            sums = _read(folder)
    if lost := [probe for probe in probes if len(_of(sums, probe, range(wanted))) < wanted]:
        raise ToolFailed(
            f"{task.model.path}: llama-perplexity exited without writing the scores of {lost[0].name}",
            hint="check free disk space (df -h), then run the command again",
        )
    lines = _lines(task, reference.chunks, chunks)
    scores = tuple(_score(probe, sums, lines) for probe in probes)
    for score in scores:
        if not (np.isfinite(score.kld).all() and np.isfinite(score.head).all()):
            raise ToolFailed(
                f"{task.model.path}: with the types of probe {score.probe.name} the divergence is not a finite number",
                hint="is the model sound without them? apex check FILE",
            )
    return scores


def probe_seconds(
    task: Task,
    probes: Sequence[Probe],
    imatrix: Path | None,
    *,
    chunks: int,
    head_depth: int = 0,
    references: bool = True,
) -> pace.Estimate:
    """How long `run_probes` would take now; for texts of at least as many chunks. Without `references` they are counted
    elsewhere.
    """
    task = _with_reference(task)
    counts = known_chunks(task)
    texts = len(distinct_texts(task))
    wanted = first_chunks(counts, chunks) if counts else texts * chunks
    passes, quantizing = 0, 0.0
    known = _read(_folder(task, imatrix, head_depth))
    for start, few in _missing(probes, known, wanted).items():
        passes += (wanted - start) * len(few)
        quantizing += _quantizing(task, few)
    if references and not (known or counts):
        passes += texts * task.number("chunks")
    found = pace.expect(_kind(task), _work(task, passes), gpu=task.gpu)
    return replace(found, seconds=found.seconds + quantizing)


def check_probes(task: Task, probes: Sequence[Probe], imatrix: Path | None) -> None:
    """Raises EvaluationRefused for a probe that the tool would refuse; TypeUnknown."""
    ggml = Ggml(task.tools)
    tensors = {tensor.name: tensor for tensor in task.model.tensors}
    data = read_imatrix(imatrix).entries.keys() if imatrix else set()
    for probe in probes:
        for name, kind in probe.types.items():
            traits = ggml.type_traits(kind)
            if name not in tensors:
                raise EvaluationRefused(
                    f"{task.model.path} has no tensor {name} (probe {probe.name})",
                    hint=f"apex inspect {task.model.path}",
                )
            tensor = tensors[name]
            if tensor.type not in _WIDE:
                raise EvaluationRefused(
                    f"{task.model.path}: {name} is {tensor.type}, expected one of {', '.join(_WIDE)}: tensors that are "
                    "quantized already cannot be probed",
                    hint="give the model that the quantized file was made from",
                )
            ggml.row_bytes(traits.name, tensor.shape[0])
            if traits.library_requires_imatrix and name not in data:
                raise EvaluationRefused(
                    f"{name} cannot be {traits.name} without data of it in the imatrix (probe {probe.name})",
                    hint="give an imatrix that has it (apex calibrate), or another type",
                )


def _with_reference(task: Task) -> Task:
    return task if task.reference else replace(task, reference=task.model)


def _rows(task: Task) -> list[str]:
    """Which hidden rows the head is fed with."""
    return tool_arguments(AUTO, task.model.architecture, task.tools.tool("llama-perplexity"))


def _folder(task: Task, imatrix: Path | None, head_depth: int) -> Path:
    """Not of the chunks that the reference has: those that a smaller one has too are at the same places in it."""
    assert task.reference is not None
    texts = list(distinct_texts(task))
    parts: dict[str, Any] = {
        "what": "probes",
        "model": fingerprint(task.model),
        "reference": fingerprint(task.reference),
        "imatrix": sha256_file(imatrix) if imatrix else None,
        "text": texts if len(texts) > 1 else texts[0],
        "context": task.number("context"),
        "parse_special": bool(task.settings["parse_special"]),
        "tools": task.tools.identity,
        **task.options.parts(task.tools),
    }
    if head_depth:
        parts |= {"head_depth": head_depth, "rows": _rows(task)}
    return cache_folder("evaluation", sha256_json(parts)[:32])


def _run(
    task: Task,
    probes: Sequence[Probe],
    imatrix: Path | None,
    logits: Path,
    folder: Path,
    chunks: range,
    head_depth: int,
) -> None:
    """Score these probes on these chunks of the reference's file; the tool's lines are added to what the folder has."""
    out = folder / f"probes-{len(list(folder.glob('probes-*.tsv'))):06}.tsv"
    began = time.monotonic()
    with scratch_folder("probes") as scratch:
        (scratch / "probes.txt").write_text(
            "".join(
                "\t".join([probe.key, *(f"{name}={kind}" for name, kind in probe.types.items())]) + "\n"
                for probe in probes
            ),
            encoding="utf-8",
        )
        task.run(
            "llama-perplexity",
            *("-m", task.model.path, "-c", str(task.number("context"))),
            *("--kl-divergence", "--kl-divergence-base", logits),
            *("--kl-divergence-probes", scratch / "probes.txt", "--kl-divergence-output", out),
            *("--from-chunk", str(chunks.start), "--chunks", str(len(chunks))),
            *(("--imatrix", imatrix) if imatrix else ()),
            *(("--mtp", "--mtp-depth", str(head_depth), *_rows(task)) if head_depth else ()),
            what=f"{task.model.path.name} on {_named(task)}",
        )
    seconds = time.monotonic() - began - _quantizing(task, probes)
    pace.remember(_kind(task), _work(task, len(chunks) * len(probes)), seconds, gpu=task.gpu)


def _named(task: Task) -> str:
    (domain, text), *others = task.texts.items()
    return f"{len(task.texts)} texts" if others else domain or text.name


def _work(task: Task, passes: int) -> float:
    """In what `pace` counts, of evaluations of a chunk."""
    return passes * task.number("context") * pace.active_parameters(task.model)


def _kind(task: Task) -> str:
    return pace.of_size("probes", pace.active_parameters(task.model))


def _quantizing(task: Task, probes: Sequence[Probe]) -> float:
    """Seconds to quantize the tensors of these probes: as much for one chunk as for many, and on a GPU most of it."""
    sizes = {tensor.name: tensor.n_elements for tensor in task.model.tensors}
    found = sum(quantize_seconds(kind, sizes[name]) for probe in probes for name, kind in probe.types.items())
    return found / (task.threads or cpus())


def _missing(probes: Sequence[Probe], known: _Sums, chunks: int) -> dict[int, list[Probe]]:
    """The first chunk that is not known -> the probes of which that is so; each kind of probe once."""
    found: dict[int, list[Probe]] = {}
    for probe in {probe.key: probe for probe in probes}.values():
        if gaps := set(range(chunks)) - known.get(probe.key, {}).keys():
            found.setdefault(min(gaps), []).append(probe)
    return dict(sorted(found.items()))


def _read(folder: Path) -> _Sums:
    """All that the tool wrote in this and earlier runs; without a line that a kill cut short."""
    found: _Sums = {}
    for path in sorted(folder.glob("probes-*.tsv")):
        header, *lines = path.read_text(encoding="ascii", errors="replace").split("\n")
        columns = header.split("\t")
        if tuple(columns[: len(_HEADER)]) != _HEADER:
            continue
        for line in lines[:-1]:  # the last one has no end, or is empty
            try:
                key, chunk, *numbers = line.split("\t")
                if len(numbers) == len(columns) - 2:
                    found.setdefault(key, {})[int(chunk)] = tuple(map(float, numbers))
            except ValueError:
                continue
    return found


def _of(sums: _Sums, probe: Probe, lines: Sequence[int]) -> list[tuple[float, ...]]:
    known = sums.get(probe.key, {})
    return [known[line] for line in lines if line in known]


def _lines(task: Task, counts: Sequence[int], chunks: int) -> list[list[int]]:
    """For each of the task's texts, where its first `chunks` chunks are in the reference's file."""
    place = {of: line for line, of in enumerate(places(counts))}
    numbers = {identity: number for number, identity in enumerate(distinct_texts(task))}
    texts = [numbers[task.identity_of_text(domain)] for domain in task.texts]
    return [[place[text, chunk] for chunk in range(min(chunks, counts[text]))] for text in texts]


def _score(probe: Probe, sums: _Sums, lines: Sequence[Sequence[int]]) -> ProbeScore:
    rows = [(text, *row) for text, of in enumerate(lines) for row in _of(sums, probe, of)]
    table = np.array(rows, dtype=np.float64)
    text, n, same_top = (table[:, column].astype(np.int64) for column in (0, 1, 3))
    return ProbeScore(probe, n, table[:, 2], same_top, text, table[:, 4:].reshape(len(table), -1, len(_HEAD)))
