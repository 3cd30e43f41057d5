"""How the rooms report progress without knowing who shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Step:
    """The progress of a long task. `total` is None while unknown; `unit`: the unit of the counts.

    `said`: not work, but a warning to show at once and keep. `detail`: the current piece of a task made of several;
    `left`: seconds to its end, if the reporter knows better than linear extrapolation.
    """

    task: str
    done: float
    total: float | None = None
    unit: str = ""
    said: bool = False
    detail: str = ""
    left: float | None = None


Report = Callable[[Step], None]


def silent(_step: Step) -> None:
    """A `Report` that shows nothing."""


_TELLING = 0.02  # share of a piece: with less its pace is unknown
_SHOWN = 4  # pieces that are worked on at the same time


@dataclass(frozen=True)
class Piece:
    """A part of a whole. `runs`: the tasks that it will report, in order, and the work in each, in units of `kind`.

    Work of one kind takes proportional time; `expected` is the estimate for all of it, in seconds. `alone`: no other
    piece is worked on at the same time.
    """

    kind: str
    runs: Mapping[str, float]
    expected: float
    alone: bool = False

    @property
    def units(self) -> float:
        return sum(self.runs.values()) or 1.0


@dataclass
class _Running:
    """A piece that is being worked on. `last`: what it reported; `seen`: run -> share done."""

    began: float
    last: Step | None = None
    seen: dict[str, float] = field(default_factory=dict)


@dataclass
class Whole:
    """One bar for several pieces of work: computes from their reports how far the whole is and when it will end."""

    task: str
    report: Report
    pieces: Sequence[Piece]
    clock: Callable[[], float] = time.monotonic
    at_once: Callable[[], int] = lambda: 1  # how many pieces are worked on at the same time
    finished: dict[int, float] = field(
        default_factory=dict
    )  # piece -> seconds that it took, 0 if its result was already there
    running: dict[int, _Running] = field(default_factory=dict)
    # runs of finished pieces: for others that name them too, the result is cached
    over: set[str] = field(default_factory=set)
    paces: dict[str, tuple[float, float]] = field(default_factory=dict)  # kind -> seconds and units of finished pieces

    def of(self, number: int) -> Report:
        """The report to give to a piece."""

        def take(step: Step) -> None:
            if step.said:
                self.report(step)
                return
            if number not in self.finished:
                one = self.running.setdefault(number, _Running(self.clock()))
                one.last = step
                if step.total:
                    one.seen[step.task] = min(1.0, step.done / step.total)
            self._tell()

        return take

    def finish(self, number: int, *, reused: bool = False) -> tuple[float, float]:
        """The piece is done. `reused`: its result was already there, so it says nothing about how long others take.

        Returns the share of it that had to be done, and the seconds.
        """
        one = self.running.pop(number, None)
        taken = self.clock() - one.began if one else 0.0
        self.finished[number] = 0.0 if reused else taken
        share = 0.0
        if one and not reused:
            piece = self.pieces[number]
            done = self._to_do(piece, one.seen)
            share = done / piece.units
            seconds, units = self.paces.get(piece.kind, (0.0, 0.0))
            self.paces[piece.kind] = (seconds + taken, units + done)
            self.over |= set(one.seen)
        self._tell()
        return share, taken

    def left(self) -> float:
        """Seconds to the end."""
        rests = self._rests(alone=False)
        together = max(sum(rests) / max(1, min(self.at_once(), len(rests))), max(rests, default=0.0))
        return together + sum(self._rests(alone=True))

    def _rests(self, *, alone: bool) -> list[float]:
        """Seconds of work left in each piece of the kind that is not finished."""
        return [
            max(0.0, self._rest_of(number)) if number in self.running else self._expected(piece)
            for number, piece in enumerate(self.pieces)
            if number not in self.finished and piece.alone == alone
        ]

    def _rest_of(self, number: int) -> float:
        """Seconds left of a running piece: from its own pace as soon as that is known."""
        piece, one = self.pieces[number], self.running[number]
        units, done = self._to_do(piece, one.seen), self._done(number)
        taken = self.clock() - one.began
        before = max(0.0, self._expected(piece) * units / self._to_do(piece, {}) - taken)
        if done / units < _TELLING:
            return before
        trust = min(1.0, done / units * 10)  # after a tenth of it, only its own pace counts
        return trust * taken / done * (units - done) + (1 - trust) * before

    def _done(self, number: int) -> float:
        """Units of a running piece that are done."""
        runs = self.pieces[number].runs
        return sum(share * runs.get(run, 0.0) for run, share in self.running[number].seen.items())

    def _to_do(self, piece: Piece, seen: Mapping[str, float]) -> float:
        """Units of the runs that are needed: an unseen one before the last seen one was not needed."""
        names = list(piece.runs)
        last = max((names.index(run) for run in seen if run in piece.runs), default=-1)
        wanted = (run in seen or (at > last and not self._elsewhere(run, piece)) for at, run in enumerate(names))
        return sum(piece.runs[run] for run, needed in zip(names, wanted, strict=True) if needed) or piece.units

    def _elsewhere(self, run: str, piece: Piece) -> bool:
        """Whether another piece does it earlier: the reference's scores are made once for all files."""
        if run in self.over:
            return True
        return next((one for one in self.pieces if run in one.runs), piece) is not piece

    def _expected(self, piece: Piece) -> float:
        """From work of its kind just done; else as estimated, scaled by how the other estimates turned out."""
        seconds, units = self.paces.get(piece.kind, (0.0, 0.0))
        others = [
            (self.pieces[number], self.clock() - one.began, self._done(number)) for number, one in self.running.items()
        ]
        telling = [
            (other, taken, done)
            for other, taken, done in others
            if other is not piece and done / other.units >= _TELLING
        ]
        for other, taken, done in telling:
            if other.kind == piece.kind:
                seconds, units = seconds + taken, units + done
        if units and seconds:
            return seconds / units * self._to_do(piece, {})
        known = [number for number, spent in self.finished.items() if spent]
        foreseen = sum(self.pieces[number].expected for number in known)
        spent = sum(self.finished[number] for number in known)
        for other, taken, done in telling:
            foreseen, spent = foreseen + other.expected * done / other.units, spent + taken
        return piece.expected * (spent / foreseen if foreseen and spent else 1.0)

    def _tell(self) -> None:
        rest = sum((*self._rests(alone=False), *self._rests(alone=True)))
        seconds = sum(self.finished.values()) + sum(self.clock() - one.began for one in self.running.values())
        everything = seconds + rest
        share = seconds / everything if everything else float(len(self.finished) == len(self.pieces))
        steps = [one.last for one in self.running.values() if one.last]
        begun = min(len(self.finished) + max(1, len(steps)), len(self.pieces))
        more = [f"and {len(steps) - _SHOWN} more"] if len(steps) > _SHOWN else []
        detail = ", ".join([f"{begun} of {len(self.pieces)}", *map(_counted, steps[:_SHOWN]), *more])
        ended = len(self.finished) == len(self.pieces)
        self.report(
            Step(
                self.task,
                100.0 if ended else min(99.0, 100 * share),
                100,
                "%",
                detail="" if ended else detail,
                left=self.left(),
            )
        )


def _counted(step: Step) -> str:
    return f"{step.task} {step.done:.0f}/{step.total:.0f} {step.unit}".rstrip() if step.total else step.task
