"""Part 3: choose a type for each tensor so that the total loss is smallest within a number of bytes.

Take each tensor's lower convex hull of loss over bytes, and walk the steps of all hulls in order of loss saved per
byte: this is the Lagrangian solution. Spend the rest of the budget on single steps, also off the hulls, and on
exchanges between two tensors, until nothing helps any more. The same items always give the same types.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

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
    """Move one tensor down and another up, choosing the pair that saves most loss. False if no pair saves any."""
    downs, ups = [], []
    for item, (ladder, at) in enumerate(zip(state.ladders, state.at, strict=True)):
        now = ladder[at]
        downs += [(now.n_bytes - ladder[to].n_bytes, ladder[to].loss - now.loss, item, to) for to in range(at)]
        ups += [
            (ladder[to].n_bytes - now.n_bytes, now.loss - ladder[to].loss, item, to)
            for to in range(at + 1, len(ladder))
        ]
    state.looked_at += len(downs) + len(ups)
    if not downs or not ups:
        return False
    # for each number of bytes to save: the cheapest step that saves as many, and the cheapest one of another tensor
    downs.sort(key=lambda one: (-one[0], one[1], one[2], one[3]))
    firsts: list[int] = []
    seconds: list[int] = []
    first = second = -1
    for index, (_, cost, item, _) in enumerate(downs):
        if first < 0 or cost < downs[first][1]:
            second = first if first >= 0 and downs[first][2] != item else second
            first = index
        elif item != downs[first][2] and (second < 0 or cost < downs[second][1]):
            second = index
        firsts.append(first)
        seconds.append(second)
    saves = -np.array([one[0] for one in downs])  # ascending
    slack = budget - state.n_bytes
    counts = np.searchsorted(saves, -(np.array([one[0] for one in ups]) - slack), side="right")
    best: tuple[float, int, int] | None = None
    for number, (_, gain, item, _) in enumerate(ups):
        if (count := int(counts[number])) == 0:
            continue
        down = firsts[count - 1] if downs[firsts[count - 1]][2] != item else seconds[count - 1]
        if down < 0 or downs[down][2] == item:
            continue
        net = gain - downs[down][1]
        if net > (best[0] if best else 1e-12 * abs(gain)):
            best = (net, number, down)
    if best is None:
        return False
    _, up, down = best
    state.move(downs[down][2], downs[down][3])
    state.move(ups[up][2], ups[up][3])
    return True
