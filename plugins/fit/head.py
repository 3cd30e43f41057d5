"""Measure what types cost the draft head, in points of agreement with the trunk, by probing its parts and all of it.

The agreement that a single part loses drowns in noise; the divergence that it adds does not. So each part is weighted
by the divergence that it adds between head and trunk, and probes of the whole head convert divergence to points.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from apex_build.plugin_api import Estimate, Model, Probe, ProbeScore, Task, clustered_ratio, run_probes

from . import sensitivity
from .measurement import HeadPart
from .sensitivity import Errors

_AGREE, _KLD, _N = 1, 3, 0  # columns of ProbeScore.head
_WHOLE = ("Q3_K", "Q2_K", "IQ4_NL", "Q4_0")
_POINTS = 60.0  # per nat, if the probes of the whole head do not tell (docs/results/draft-head.md: 46 to 80)


def parts(model: Model, types: Sequence[str], errors: Errors) -> tuple[tuple[sensitivity.Group, ...], list[Probe]]:
    """The head's parts, and the probes: one of each part, then some of the whole head."""
    heads = {tensor.name for tensor in model.tensors if tensor.draft_head}
    groups = sensitivity.groups_of(model, [name for name in types if name in heads])
    probes = list(sensitivity.first_probes(groups, errors, second=()))
    names = [name for group in groups for name in group.tensors]
    for kind in _WHOLE[:2]:
        if chosen := {name: one for name in names if (one := _first(name, kind, errors))}:
            probes.append(Probe(f"draft head {kind}", chosen))
    return groups, probes


def measure(
    task: Task,
    groups: Sequence[sensitivity.Group],
    probes: Sequence[Probe],
    imatrix: Path | None,
    errors: Errors,
    *,
    chunks: int,
) -> tuple[HeadPart, ...]:
    scores = run_probes(task, probes, imatrix, chunks=chunks, head_depth=1)
    base = next(score for score in scores if not score.probe.types)
    nats = {}  # of each part, per unit of error
    for group in groups:
        own = [score for score in scores if score.probe.types.keys() == set(group.tensors)]
        if own:
            nats[group.name] = _cautious(_lost(own[0], base, _KLD)) / _mean(group, own[0].probe, errors)
    whole = [score for score in scores if score.probe.name.startswith("draft head ")]
    measured = [group for group in groups if group.name in nats]
    expected = sum(nats[group.name] * _mean(group, score.probe, errors) for score in whole for group in measured)
    points = [_lost(score, base, _AGREE).times(100) for score in whole]
    lost = sum(one.value for one in points)
    scale = lost / expected if expected > 0 and lost > 0 else _POINTS
    doubt = [one.high - one.value for one in points if one.high is not None]
    half = max(doubt) / max(lost / len(points), 1e-9) if len(doubt) == len(points) and lost > 0 else None
    return tuple(
        HeadPart(
            group.tensors,
            scale * nats[group.name],
            None if half is None else max(0.0, scale * nats[group.name] * (1 - half)),
            None if half is None else scale * nats[group.name] * (1 + half),
        )
        for group in measured
    )


def _lost(score: ProbeScore, base: ProbeScore, column: int) -> Estimate:
    """Agreement lost or divergence added per position, paired."""
    sign = 1 if column == _KLD else -1
    return clustered_ratio(sign * (score.head[:, 0, column] - base.head[:, 0, column]), base.head[:, 0, _N], base.text)


def _cautious(lost: Estimate) -> float:
    """At least half the interval's half-width: a part whose cost is lost in noise may not be free."""
    return max(lost.value, 0.0 if lost.high is None else (lost.high - lost.value) / 2, 0.0)


def _mean(group: sensitivity.Group, probe: Probe, errors: Errors) -> float:
    return max(1e-9, sum(errors[name, probe.types[name].upper()] for name in group.tensors) / len(group.tensors))


def _first(name: str, kind: str, errors: Errors) -> str | None:
    return next((one for one in (kind, *_WHOLE[2:], "Q8_0") if (name, one) in errors), None)
