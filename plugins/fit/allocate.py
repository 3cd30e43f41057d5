"""Part 3: choose a type for each tensor so that the total loss is smallest within a number of bytes.

Take each tensor's lower convex hull of loss over bytes, and walk the steps of all hulls in order of loss saved per
byte: this is the Lagrangian solution. Spend the rest of the budget on single steps, also off the hulls, and on
exchanges between two tensors, until nothing helps any more. The same items always give the same types.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_EXCHANGES = 200  # maximum; each one looks at every step of every tensor once


@dataclass(frozen=True)
class Option:
    type: str
    n_bytes: int
    loss: float


@dataclass(frozen=True)
class Item:
    """A tensor and the types it can get."""

    name: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Allocation:
    """`looked_at`: number of steps considered; a test checks the cost with it."""

    types: Mapping[str, str]
    n_bytes: int
    loss: float
    looked_at: int = 0


@dataclass
class _State:
    """`ladders`: the useful options of each item, smallest first, each with less loss than the one before."""

    items: Sequence[Item]
    ladders: list[list[Option]]
    at: list[int]
    looked_at: int = 0
    n_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.n_bytes = sum(ladder[at].n_bytes for ladder, at in zip(self.ladders, self.at, strict=True))

    def move(self, item: int, to: int) -> None:
        self.n_bytes += self.ladders[item][to].n_bytes - self.ladders[item][self.at[item]].n_bytes
        self.at[item] = to

    @property
    def loss(self) -> float:
        return sum(ladder[at].loss for ladder, at in zip(self.ladders, self.at, strict=True))

    def result(self) -> Allocation:
        chosen = {
            item.name: ladder[at].type for item, ladder, at in zip(self.items, self.ladders, self.at, strict=True)
        }
        return Allocation(chosen, self.n_bytes, self.loss, self.looked_at)


def smallest(items: Sequence[Item]) -> int:
    """Size in bytes of the smallest allocation."""
    return sum(min(option.n_bytes for option in item.options) for item in items)


def largest(items: Sequence[Item]) -> int:
    """Size in bytes beyond which the loss gets no smaller."""
    return sum(_ladder(item)[-1].n_bytes for item in items)


def allocate(items: Sequence[Item], budget: int) -> Allocation:
    """Minimize the loss within `budget` bytes; `budget` must be at least `smallest(items)`."""
    state = _State(items, [_ladder(item) for item in items], [0] * len(items))
    assert state.n_bytes <= budget
    for _, item, to in _steps(state):
        # skip an item's later steps too once one does not fit: they need even more bytes
        if to > state.at[item] and _reaches(state, item, to, budget):
            state.move(item, to)
    _fill(state, budget)
    for _ in range(_EXCHANGES):
        if not _exchange(state, budget):
            break
        _fill(state, budget)
    return state.result()


def cheapest(items: Sequence[Item], bound: float) -> Allocation:
    """Minimize the bytes with a loss of at most `bound`; if nothing stays within it, minimize the loss."""
    state = _State(items, [_ladder(item) for item in items], [0] * len(items))
    for _, item, to in _steps(state):
        if state.loss <= bound:
            break
        if to > state.at[item]:
            state.move(item, to)
    while True:  # undo steps while the loss stays within the bound, the largest saving first
        loss = state.loss
        back = [
            (ladder[at - 1].n_bytes - ladder[at].n_bytes, item)
            for item, (ladder, at) in enumerate(zip(state.ladders, state.at, strict=True))
            if at and loss + ladder[at - 1].loss - ladder[at].loss <= bound
        ]
        if not back:
            return state.result()
        _, item = min(back)
        state.move(item, state.at[item] - 1)


def _ladder(item: Item) -> list[Option]:
    found: list[Option] = []
    for option in sorted(item.options, key=lambda one: (one.n_bytes, one.loss, one.type)):
        if not found or option.loss < found[-1].loss:
            found.append(option)
    return found


def _hull(ladder: Sequence[Option]) -> list[int]:
    """Indices of the options on the ladder's lower convex hull."""
    hull: list[int] = []
    for index, option in enumerate(ladder):
        while len(hull) > 1 and _gain(ladder[hull[-1]], option) >= _gain(ladder[hull[-2]], ladder[hull[-1]]):
            hull.pop()
        hull.append(index)
    return hull


def _gain(before: Option, after: Option) -> float:
    """Loss saved per additional byte."""
    return (before.loss - after.loss) / max(1, after.n_bytes - before.n_bytes)


def _steps(state: _State) -> list[tuple[float, int, int]]:
    """Steps along all hulls, the largest gain per byte first: (minus the gain, item, new option)."""
    steps = []
    for item, ladder in enumerate(state.ladders):
        hull = _hull(ladder)
        steps += [(-_gain(ladder[before], ladder[after]), item, after) for before, after in itertools.pairwise(hull)]
    state.looked_at += len(steps)
    return sorted(steps)


def _reaches(state: _State, item: int, to: int, budget: int) -> bool:
    ladder = state.ladders[item]
    return state.n_bytes + ladder[to].n_bytes - ladder[state.at[item]].n_bytes <= budget


def _fill(state: _State, budget: int) -> None:
    """Take single steps of any length that fit into the remaining bytes, the one that saves most loss first."""
    while True:
        best: tuple[float, int, int] | None = None
        for item, ladder in enumerate(state.ladders):
            at = state.at[item]
            for to in range(len(ladder) - 1, at, -1):
                state.looked_at += 1
                if _reaches(state, item, to, budget):
                    gain = ladder[at].loss - ladder[to].loss
                    if best is None or gain > best[0]:
                        best = (gain, item, to)
                    break
        if best is None:
            return
        state.move(best[1], best[2])


def _exchange(state: _State, budget: int) -> bool:
    """Move one tensor up and another down, choosing the pair that saves most loss; if no pair saves any, one up and
    several down. False if that saves none either.
    """
    downs, ups = [], []
    for item, (ladder, at) in enumerate(zip(state.ladders, state.at, strict=True)):
        now = ladder[at]
        downs += [_Down(now.n_bytes - ladder[to].n_bytes, ladder[to].loss - now.loss, item, to) for to in range(at)]
        ups += [
            (ladder[to].n_bytes - now.n_bytes, now.loss - ladder[to].loss, item, to)
            for to in range(at + 1, len(ladder))
        ]
    state.looked_at += len(downs) + len(ups)
    if not downs or not ups:
        return False
    saving = _Saving(downs)
    slack = budget - state.n_bytes
    best: tuple[float, tuple[int, int], list[_Down]] | None = None
    for several in (False, True):
        for n_bytes, gain, item, to in ups:
            found = saving.of(n_bytes - slack, item, gain - (best[0] if best else 1e-12 * abs(gain)), several=several)
            if found is not None:
                best = (gain - found[0], (item, to), found[1])
        if best is not None:
            break
    state.looked_at += saving.looked_at
    if best is None:
        return False
    _, (item, to), moved = best
    for down in moved:
        state.move(down.item, down.to)
    state.move(item, to)
    return True


class _Down(NamedTuple):
    """A step to a smaller type: bytes saved, and loss added."""

    saves: int
    cost: float
    item: int
    to: int


class _Saving:
    """The cheapest steps down that save a number of bytes."""

    def __init__(self, downs: Sequence[_Down]) -> None:
        self.looked_at = 0
        # the largest first; at each place the cheapest so far, and the cheapest so far of another tensor
        self.downs = sorted(downs, key=lambda one: (-one.saves, *one[1:]))
        self.saves = [-one.saves for one in self.downs]
        self.cheapest: list[tuple[_Down, _Down | None]] = []
        for down in self.downs:
            first, second = self.cheapest[-1] if self.cheapest else (down, None)
            if down.cost < first.cost:
                first, second = down, first if first.item != down.item else second
            elif down.item != first.item and (second is None or down.cost < second.cost):
                second = down
            self.cheapest.append((first, second))
        # along each tensor's lower convex hull; what costs least for a byte saved first, so each tensor's in order
        ascending = sorted(downs, key=lambda one: (one.item, one.saves, one.cost))
        steps = [step for _, own in itertools.groupby(ascending, lambda one: one.item) for step in _chain(own)]
        self.frugal = [down for _, down in sorted(steps, key=lambda one: (one[0], one[1].item, one[1].saves))]

    def of(self, n_bytes: int, but: int, below: float, *, several: bool) -> tuple[float, list[_Down]] | None:
        """Cost and steps, of other tensors than `but`: the cheapest one that saves `n_bytes`, or several frugal ones
        and one that saves the rest. None if all cost `below` or more.
        """
        found: tuple[float, list[_Down]] | None = None
        taken: dict[int, _Down] = {}
        saved, cost = 0, 0.0
        for frugal in itertools.chain(self.frugal, [None]):
            if frugal is not None and frugal.item == but:
                continue
            self.looked_at += 1
            last = self._one(n_bytes - saved, {but} | taken.keys())
            if last is not None and cost + last.cost < (found[0] if found else below):
                found = (cost + last.cost, [*taken.values(), last])
            if frugal is None or not several or saved >= n_bytes or cost >= below:
                break
            before = taken.get(frugal.item, _Down(0, 0.0, frugal.item, -1))
            saved, cost = saved + frugal.saves - before.saves, cost + frugal.cost - before.cost
            taken[frugal.item] = frugal
        if several and saved >= n_bytes and cost < (found[0] if found else below):
            found = (cost, [*taken.values()])
        return found

    def _one(self, n_bytes: int, but: set[int]) -> _Down | None:
        count = bisect.bisect_right(self.saves, -n_bytes)
        if not count:
            return None
        return next((one for one in self.cheapest[count - 1] if one is not None and one.item not in but), None)


def _chain(downs: Iterable[_Down]) -> list[tuple[float, _Down]]:
    """A tensor's steps on the lower convex hull of cost over bytes saved; each with its cost for a byte beyond the one
    before it.
    """
    hull: list[tuple[float, _Down]] = []
    for down in downs:
        while hull and _rate(hull[-2][1] if len(hull) > 1 else None, down) <= hull[-1][0]:
            hull.pop()
        hull.append((_rate(hull[-1][1] if hull else None, down), down))
    return hull


def _rate(before: _Down | None, after: _Down) -> float:
    saves, cost = (before.saves, before.cost) if before else (0, 0.0)
    return (after.cost - cost) / max(1, after.saves - saves)
