"""--refine: try exchanges of bits between two tensors near the optimum, measure each, and keep those that help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apex_build.plugin_api import Probe, ProbeScore

from . import sensitivity
from .allocate import Item, Option


@dataclass(frozen=True)
class Exchange:
    """`types`: of the two tensors afterwards. `n_bytes`, `loss`: the bytes and the predicted loss that it adds."""

    types: Mapping[str, str]
    n_bytes: int
    loss: float


def exchanges(items: Sequence[Item], types: Mapping[str, str], slack: int, count: int) -> list[Exchange]:
    """Move one tensor up and another down, adding at most `slack` bytes; the best by prediction come first."""
    ups, downs = [], []
    for item in items:
        ladder = sorted(item.options, key=lambda one: (one.n_bytes, one.loss))
        at = next((number for number, one in enumerate(ladder) if one.type == types.get(item.name)), None)
        if at is None:
            continue
        ups += [(item.name, ladder[at], one) for one in ladder[at + 1 : at + 3]]
        downs += [(item.name, ladder[at], one) for one in ladder[max(0, at - 2) : at]]
    found = [
        _exchange(up, down)
        for up in ups
        for down in downs
        if up[0] != down[0] and up[2].n_bytes - up[1].n_bytes <= down[1].n_bytes - down[2].n_bytes + slack
    ]
    found.sort(key=lambda one: (one.loss, sorted(one.types.items())))
    return found[:count]


def probes(types: Mapping[str, str], some: Sequence[Exchange]) -> list[Probe]:
    """A probe of the file as allocated, and one for each exchange."""
    return [Probe("as allocated", types), *(Probe(_name(one), {**types, **one.types}) for one in some)]


def that_pay(some: Sequence[Exchange], scores: Sequence[ProbeScore], slack: int) -> list[Exchange]:
    """Exchanges that lower the divergence of the file as allocated (the first score) beyond doubt, best first. Each
    tensor changes only once, and together they stay within the slack.
    """
    base, *others = scores
    measured = [(sensitivity.difference(score, base), one) for score, one in zip(others, some, strict=True)]
    better = sorted(
        (found.value, number) for number, (found, _) in enumerate(measured) if found.high is not None and found.high < 0
    )
    kept: list[Exchange] = []
    touched: set[str] = set()
    for _, number in better:
        one = some[number]
        if not touched & one.types.keys() and one.n_bytes <= slack:
            kept.append(one)
            touched |= one.types.keys()
            slack -= one.n_bytes
    return kept


def _exchange(up: tuple[str, Option, Option], down: tuple[str, Option, Option]) -> Exchange:
    return Exchange(
        {up[0]: up[2].type, down[0]: down[2].type},
        up[2].n_bytes - up[1].n_bytes + down[2].n_bytes - down[1].n_bytes,
        up[2].loss - up[1].loss + down[2].loss - down[1].loss,
    )


def _name(one: Exchange) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in one.types.items())
