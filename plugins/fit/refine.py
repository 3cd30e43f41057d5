"""--refine: exchanges of two tensors' types near the optimum, measured one by one; those that pay are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apex_build.plugin_api import Probe, ProbeScore

from . import sensitivity
from .allocate import Item, Option


@dataclass(frozen=True)
class Exchange:
    """`types`: of the two tensors, after it. `n_bytes`: that it adds; `loss`: as predicted, that it adds."""

    types: Mapping[str, str]
    n_bytes: int
    loss: float


def exchanges(items: Sequence[Item], types: Mapping[str, str], slack: int, count: int) -> list[Exchange]:
    """One tensor a step up and another a step down, within `slack` bytes more: those that the prediction likes most."""
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
    """The file as it is, and with each of the exchanges."""
    return [Probe("as allocated", types), *(Probe(_name(one), {**types, **one.types}) for one in some)]


def that_pay(some: Sequence[Exchange], scores: Sequence[ProbeScore], slack: int) -> list[Exchange]:
    """Those whose divergence is surely lower than that of the file as it is (the first score), the best first; each
    tensor once, and within the slack together.
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
