"""Draw text until every routed expert has seen enough tokens, in rounds: measure one before choosing the next."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from apex_build.calibration.choose import Features, Floats, Measured, Piece, choose, cut, features_of
from apex_build.calibration.disk import imatrix_bytes
from apex_build.calibration.run import SHARDS, Job, Made
from apex_build.calibration.shards import NO_BOUND, Pool, Shard, Task, counts_file, put_together, routed_of
from apex_build.errors import CalibrationSetInvalid
from apex_build.gguf_model.catalogue import Tensor
from apex_build.gguf_model.imatrix import GOAL
from apex_build.progress import Report, Step
from apex_build.storage.disk import check_room, writing

_MOST = 256  # maximum chunks of a round
# Chunks of the first round, minimum chunks of a later one, and its size relative to what was run so far. Each round
# loads the model, so there are fewer rounds of a large one.
_SMALL_ROUNDS, _LARGE_ROUNDS = (8, 4, 0.25), (32, 16, 0.5)
_FEWEST = 4  # minimum chunks of a run, if a round has several
_BYTES = 3.5  # bytes per token, until tokens have been counted
_SMALL = 50_000_000  # bytes of an imatrix that is saved after each chunk
_SEVERAL = 4  # larger ones are saved after this many chunks
_NAMED = 50  # maximum of starved experts per layer in the manifest

Count = Callable[[Sequence[bytes]], Sequence[int]]  # tokens of each text


@dataclass(frozen=True)
class Goal:
    """Tokens that every routed expert of every layer needs; `most`: maximum tokens of text to run, None: no limit."""

    tokens: int
    most: int | None = None


@dataclass(frozen=True)
class DomainRecord:
    domain: str
    pieces: int
    tokens: int


@dataclass(frozen=True)
class StarvedRecord:
    """Experts of one layer that got fewer tokens than the goal: (number, tokens), fewest first."""

    layer: int
    count: int
    experts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class GoalRecord:
    until_experts: int
    max_tokens: int | None
    tokens: int  # of text run
    rounds: int
    experts: int
    fewest: int
    reached: bool
    domains: tuple[DomainRecord, ...]
    starved: tuple[StarvedRecord, ...]


def until_experts(
    goal: Goal, documents: Sequence[tuple[str, bytes]], pool: Pool, *, width: int = 1, count: Count | None = None
) -> Callable[[Job], Made]:
    """Make an imatrix from text drawn from `documents` (domain, text), for `calibrate`. The first round takes them in
    order. `width`: runs per round, for a pool that works in parallel; `count`: the model's tokenizer.
    """

    def make(job: Job) -> Made:
        drawing = _Drawing.of(goal, documents, job, width, count)
        tasks: list[Task] = []
        for number in itertools.count(1):
            chosen = drawing.next(first=number == 1)
            if not chosen:
                break
            made = [*drawing.tasks(number, chosen)]
            if not made:
                break
            check_room(job.work, (len(made) + 2) * imatrix_bytes(job.model), f"the imatrices of round {number}")
            pool([task for task, _ in made], drawing.report(job.report, number))
            for task, parts in made:
                drawing.measure(task, parts)
                tasks.append(task)
        if not tasks:
            raise CalibrationSetInvalid(
                f"{job.text.name}: {goal.most} tokens are too few to run: expected at least 2 chunks of "
                f"{job.settings.context} tokens",
                hint="raise --max-tokens, or add text",
            )
        made_of = put_together(tasks, job.part, job, {GOAL: goal.tokens})
        return Made(made_of.imatrix, made_of.perplexity, made_of.seconds, 0, drawing.record(number - 1))

    return make


@dataclass
class _Drawing:
    goal: Goal
    job: Job
    width: int
    count: Count | None
    pieces: list[Piece]
    domains: list[str]
    features: list[Features]
    sizes: list[float]  # tokens
    left: list[int]
    routed: tuple[Tensor, ...]
    mask: np.ndarray[tuple[int], np.dtype[np.bool_]]  # which of the recorded experts count
    measured: Measured
    spent: int = 0
    drawn: dict[str, tuple[int, float]] | None = None

    @classmethod
    def of(
        cls, goal: Goal, documents: Sequence[tuple[str, bytes]], job: Job, width: int, count: Count | None
    ) -> _Drawing:
        routed = routed_of(job.model)
        mask = np.array(
            [job.settings.head or not one.draft_head for one in routed for _ in range(one.shape[2])], dtype=bool
        )
        if not mask.any():
            raise CalibrationSetInvalid(
                f"{job.model.path} has no routed experts to draw text for (asked for {goal.tokens} tokens each)",
                hint=f"run apex calibrate {job.model.path} without --until-experts",
            )
        texts = [text for _, text in documents]
        # Pieces of about a chunk: what one of them gives is measured almost by itself, and no text comes along unasked.
        per_token = sum(map(len, texts)) / max(1, sum(count(texts))) if count else _BYTES
        pieces = cut(documents, int(job.settings.context * per_token))
        domains = sorted({piece.domain for piece in pieces})
        features = [features_of([(piece, piece.text)], domains) for piece in pieces]
        sizes = list(map(float, count([piece.text for piece in pieces]))) if count else []
        sizes = sizes or [len(piece.text) / _BYTES for piece in pieces]
        left = list(range(len(pieces)))
        return cls(goal, job, width, count, pieces, domains, features, sizes, left, routed, mask, Measured(), drawn={})

    def budget(self) -> float:
        return math.inf if self.goal.most is None else self.goal.most - self.spent

    def next(self, *, first: bool) -> list[int]:
        """Numbers of the pieces for the next round; empty if the goal is reached or no text is left."""
        context = self.job.settings.context
        if not self.left or self.budget() < 2 * context:
            return []
        small = imatrix_bytes(self.job.model) < _SMALL
        begin, fewest, growth = _SMALL_ROUNDS if small else _LARGE_ROUNDS
        least, most = self.width * fewest * context, self.width * _MOST * context
        if first:
            wanted, chosen, total = min(self.budget(), self.width * begin * context), [], 0.0
            for number in self.left:
                if total >= wanted:
                    break
                chosen.append(number)
                total += self.sizes[number]
        else:
            if self.fewest() >= self.goal.tokens:
                return []
            wanted = min(self.budget(), max(least, min(most, growth * self.spent)))
            measured, sizes = self.measured, self.sizes
            chosen = choose(
                measured, self.goal.tokens, self.pieces, self.features, sizes, self.left, min(least, wanted), wanted
            )
        if sum(self.sizes[number] for number in chosen) < 2.2 * context:  # the tool needs at least 2 chunks
            return []
        taken = set(chosen)
        self.left = [number for number in self.left if number not in taken]
        return sorted(chosen)  # neighbours stay together

    def tasks(self, number: int, chosen: Sequence[int]) -> Iterator[tuple[Task, list[int]]]:
        """The runs of a round, with their pieces."""
        context = self.job.settings.context
        most = int(self.budget()) // context if self.goal.most else NO_BOUND
        every = 1 if imatrix_bytes(self.job.model) < _SMALL else _SEVERAL
        total = sum(self.sizes[one] for one in chosen)
        width = max(1, min(self.width, int(total // (_FEWEST * context))))
        groups: list[list[int]] = [[] for _ in range(width)]
        filled = 0.0
        for one in chosen:
            groups[min(width - 1, int(width * filled / total))].append(one)
            filled += self.sizes[one]
        for at, group in enumerate(groups, 1):
            if not group or most < 2:
                continue
            folder = self.job.work / SHARDS / f"{number:04}-{at}"
            text = b"".join(self.pieces[one].text for one in group)
            with writing(folder):
                (folder / "text").mkdir(parents=True, exist_ok=True)
                (folder / "text" / self.job.text.name).write_bytes(text)
            share = sum(self.sizes[one] for one in group) / total
            chunks = max(2, int(most * share)) if self.goal.most else NO_BOUND
            sha256 = hashlib.sha256(text).hexdigest()
            yield Task(folder / "text" / self.job.text.name, sha256, Shard(0, chunks), folder / "1.gguf", every), group

    def measure(self, task: Task, group: Sequence[int]) -> None:
        """Add the measured tokens of a run, stretch by stretch."""
        context = self.job.settings.context
        with np.load(counts_file(task.out)) as noted:
            marks, counts = noted["marks"], noted["counts"][:, self.mask]
        tokens = int(marks[-1]) * context
        ends = np.cumsum([self.sizes[one] for one in group])
        if self.count is None and tokens + context < task.shard.chunks * context:
            # the run covers the whole text, except for less than a chunk that the tool dropped at its end
            self._scale((tokens + context / 2) / float(ends[-1]))
            ends *= (tokens + context / 2) / ends[-1]
        before, counted = 0, np.zeros(counts.shape[1])
        for mark, total in zip(marks, counts, strict=True):
            start, end = before * context, int(mark) * context
            parts = [*self._between(group, ends, start, end)]
            self.measured.add(features_of(parts, self.domains), end - start, total - counted)
            before, counted = int(mark), total
        self.spent += tokens
        assert self.drawn is not None
        run = np.diff(np.minimum(ends, tokens), prepend=0.0)
        for one, share in zip(group, run / run.sum(), strict=True):
            pieces, of = self.drawn.get(self.pieces[one].domain, (0, 0.0))
            self.drawn[self.pieces[one].domain] = pieces + bool(share), of + share * tokens

    def _scale(self, factor: float) -> None:
        """Correct the sizes of the pieces that are left: they have about as many tokens per byte as those run."""
        for one in self.left:
            self.sizes[one] *= factor

    def _between(self, group: Sequence[int], ends: Floats, start: float, end: float) -> Iterator[tuple[Piece, bytes]]:
        """The text between two positions of a run, in tokens."""
        begin = 0.0
        for one, stop in zip(group, ends, strict=True):
            piece = self.pieces[one]
            if stop > start and begin < end and stop > begin:
                shares = [min(1.0, max(0.0, (at - begin) / (stop - begin))) for at in (start, end)]
                yield piece, piece.text[int(shares[0] * len(piece.text)) : int(shares[1] * len(piece.text))]
            begin = float(stop)

    def fewest(self) -> float:
        return float(self.measured.total.min()) if self.measured.counts else 0.0

    def report(self, report: Report, number: int) -> Report:
        starving = int((self.measured.total < self.goal.tokens).sum()) if self.measured.counts else None
        told = "" if starving is None else f", {starving} of {int(self.mask.sum())} experts below {self.goal.tokens}"
        limit = self.goal.most or self.spent + sum(self.sizes[one] for one in self.left)

        def take(step: Step) -> None:
            if step.said or not step.total:
                report(step)
                return
            done = self.spent + step.done * self.job.settings.context
            report(Step("calibrating", min(done, limit), limit, "tokens", detail=f"round {number}{told}"))

        return take

    def record(self, rounds: int) -> GoalRecord:
        total = self.measured.total
        kept = [one for one in self.routed if self.job.settings.head or not one.draft_head]
        starved = []
        start = 0
        for one in kept:
            assert one.layer is not None
            counts = total[start : start + one.shape[2]]
            start += one.shape[2]
            few = [
                (int(at), int(counts[at])) for at in np.argsort(counts, kind="stable") if counts[at] < self.goal.tokens
            ]
            if few:
                starved.append(StarvedRecord(one.layer, len(few), tuple(few[:_NAMED])))
        assert self.drawn is not None
        domains = tuple(DomainRecord(name, drawn[0], round(drawn[1])) for name, drawn in sorted(self.drawn.items()))
        return GoalRecord(
            self.goal.tokens, self.goal.most, self.spent, rounds, len(total), int(total.min()),
            bool(total.min() >= self.goal.tokens), domains, tuple(starved),
        )  # fmt: skip
