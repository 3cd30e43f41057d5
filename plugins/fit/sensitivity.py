"""How much of the divergence each part of a model is good for, from probes of it and from the errors of its types.

The model of the loss: a group of tensors, one role in one layer, costs

    KLD = s * mean(e**p)        e: the relative error that the chosen type makes of each of its tensors

with a sensitivity `s` of the group, and p = 1, the product law, as long as the probes agree with it. A group that was
probed with two types shows whether they do. Where they do not, p is what they say, also for groups of the same role
that were probed once. Groups add up; how well they do is measured with probes of the whole model (`Total`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, median

import numpy as np
import numpy.typing as npt

from apex_build.plugin_api import NORMAL, Estimate, Model, Probe, ProbeScore, Tensor, clustered_ratio, student

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Errors = Mapping[tuple[str, str], float]  # (tensor, type in upper case) -> relative error; missing: cannot be

BASELINE = Probe("the model as it is")
_NOISY = 0.5  # half an interval, relative to the value: a probe that says less than this is given more chunks
_EXPONENTS = (0.5, 2.0)  # what two probes may say of p: beyond it they say that one of them is noise
_APART = 0.2  # logarithm of the ratio of two errors: nearer ones say nothing of p
_NORMAL = NormalDist()
_Probed = tuple[ProbeScore, tuple[float, ...]]  # with the errors of its tensors


@dataclass(frozen=True)
class Group:
    name: str
    role: str  # what it is pooled with: `routed.down`, `attention`
    layer: int | None
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Sensitivity:
    """`s`: with its 95 % interval. `pooled_with`: groups whose probes were put together with this one's, since noise
    hides each. `note`: what the probes said of the product law, where they said anything.
    """

    group: Group
    s: Estimate
    p: float = 1.0
    pooled_with: tuple[str, ...] = ()
    note: str = ""

    def loss(self, errors: Mapping[str, float]) -> float:
        """The group's divergence where its tensors have these relative errors."""
        return float(self.s.value * _strength([errors[name] for name in self.group.tensors], self.p))


@dataclass(frozen=True)
class Total:
    """How the groups add up: measured = factor * predicted**power, from probes of the whole model."""

    factor: float = 1.0
    power: float = 1.0

    def of(self, predicted: float) -> float:
        return float(self.factor * predicted**self.power)


def groups_of(model: Model, can_be: Sequence[str]) -> tuple[Group, ...]:
    """The tensors `can_be` that a type is to be chosen for, in groups: of feed-forward networks down apart from gate
    and up, the rest of a layer by role; each of those outside layers by itself.
    """
    wanted = frozenset(can_be)
    members: dict[tuple[str, int | None], list[str]] = {}
    for tensor in model.tensors:
        if tensor.name in wanted:
            members.setdefault((_role(tensor), tensor.layer), []).append(tensor.name)
    return tuple(
        Group(role if layer is None else f"blk.{layer}.{role}", role, layer, tuple(names))
        for (role, layer), names in members.items()
    )


def first_probes(
    groups: Sequence[Group],
    errors: Errors,
    types: Sequence[str] = ("Q3_K", "IQ4_NL", "Q4_0", "Q8_0"),
    second: Sequence[str] = ("Q2_K", "Q4_0", "Q8_0"),
    *,
    second_every: int = 6,
) -> tuple[Probe, ...]:
    """The model as it is, each group at the first of `types` that its tensors can be, and some of each role at one of
    `second` too. A group with a tensor that can be none of them is left out.
    """
    probes, seen = [BASELINE], dict[str, int]()
    for group in groups:
        if (low := _probe(group, errors, types)) is None:
            continue
        probes.append(low)
        seen[group.role] = number = seen.get(group.role, -1) + 1
        other = _probe(group, errors, second)
        if number % second_every == 0 and other is not None and other.key != low.key:
            probes.append(other)
    return tuple(probes)


def more_chunks(
    groups: Sequence[Group], scores: Sequence[ProbeScore], errors: Errors, budget: int
) -> tuple[Probe, ...]:
    """The probes that noise hides, with the baseline, those first that may cost most; as many as `budget` evaluations
    of a chunk allow, where each is to get as many chunks more as it has. None: nothing would be told by more chunks.
    """
    base = _baseline(scores)
    hidden = []
    for group in groups:
        for score, _ in _of(group, scores, errors):
            found = difference(score, base)
            if found.low is None or found.high is None or found.high - found.value > _NOISY * max(found.value, 0.0):
                hidden.append((found.high if found.high is not None else math.inf, score))
    hidden.sort(key=lambda one: -one[0])
    chosen = [base, *(score for _, score in hidden)] if hidden else []
    chunks = len(base.kld)
    return tuple(score.probe for score in chosen[: max(0, budget // max(1, chunks))]) if budget >= 2 * chunks else ()


def difference(score: ProbeScore, base: ProbeScore) -> Estimate:
    """What a probe costs: its divergence less that of the model as it is, on the chunks that both have."""
    probed, plain = _paired(score, base)
    return clustered_ratio(probed[0] - plain, probed[1], probed[2])


def sensitivities(groups: Sequence[Group], scores: Sequence[ProbeScore], errors: Errors) -> tuple[Sensitivity, ...]:
    """Of each group that was probed, in their order."""
    base = _baseline(scores)
    found = {group.name: _of(group, scores, errors) for group in groups}
    slopes = {group.name: slope for group in groups if (slope := _slope(found[group.name], base)) is not None}
    by_role = {role: _common(groups, slopes, role) for role in {group.role for group in groups}}
    everywhere = _common(groups, slopes, None)
    each = []
    for group in groups:
        if not found[group.name]:
            continue
        p, note = by_role[group.role] or everywhere or 1.0, ""
        if (own := slopes.get(group.name)) is not None:
            if own.low is not None and own.high is not None and own.low <= 1.0 <= own.high:
                p, note = 1.0, f"the product law holds: KLD ~ E^{_shown(own)}"
            elif own.low is not None:
                p = min(max(own.value, _EXPONENTS[0]), _EXPONENTS[1])
                note = f"the product law fails: KLD ~ E^{_shown(own)}"
        each.append(Sensitivity(group, _fit(found[group.name], base, p), p, note=note))
    return _pooled(each, found, base)


def total_of(predicted: Sequence[float], measured: Sequence[float]) -> Total:
    """From probes of the whole model: one gives the factor, more the power as well (least squares of logarithms)."""
    pairs = [(math.log(a), math.log(b)) for a, b in zip(predicted, measured, strict=True) if a > 0 and b > 0]
    if not pairs:
        return Total()
    x, y = np.array(pairs).T
    spread = float(((x - x.mean()) ** 2).sum())
    power = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread > 0.01 else 1.0
    power = min(max(power, _EXPONENTS[0]), _EXPONENTS[1])
    return Total(math.exp(float(y.mean()) - power * float(x.mean())), power)


def _role(tensor: Tensor) -> str:
    stem = tensor.name.split(".")[-2] if "." in tensor.name else tensor.name
    prefix = "head." if tensor.draft_head else ""
    if tensor.layer is None:
        return prefix + tensor.name.removesuffix(".weight")
    if stem.startswith("ffn_") and tensor.role not in ("router", "norm"):
        return prefix + tensor.role + (".down" if stem.startswith("ffn_down") else ".up")
    return prefix + ("attention" if tensor.role in ("attention", "ssm") else tensor.role)


def _probe(group: Group, errors: Errors, types: Sequence[str]) -> Probe | None:
    """Each tensor at the first of the types that it can be."""
    chosen = {name: next((kind for kind in types if (name, kind) in errors), None) for name in group.tensors}
    if None in chosen.values():
        return None
    named = {name: kind for name, kind in chosen.items() if kind is not None}
    return Probe(f"{group.name} {'+'.join(dict.fromkeys(named.values()))}", named)


def _baseline(scores: Sequence[ProbeScore]) -> ProbeScore:
    return next(score for score in scores if not score.probe.types)


def _of(group: Group, scores: Sequence[ProbeScore], errors: Errors) -> list[_Probed]:
    """The group's own probes, each with the errors of its tensors, the least error first."""
    own = frozenset(group.tensors)
    found = [
        (score, tuple(errors[name, kind.upper()] for name, kind in score.probe.types.items()))
        for score in scores
        if score.probe.types.keys() == own
    ]
    return sorted(found, key=lambda one: sum(one[1]))


def _strength(errors: Sequence[float], p: float = 1.0) -> float:
    return math.fsum(max(error, 1e-12) ** p for error in errors) / len(errors)


def _paired(score: ProbeScore, base: ProbeScore) -> tuple[tuple[Floats, Floats, Ints], Floats]:
    """(divergence, positions, text) of the chunks that both have, and the baseline's divergence: of each text the
    first ones.
    """
    kept, plain = [], []
    for text in np.unique(score.text):
        here, there = np.flatnonzero(score.text == text), np.flatnonzero(base.text == text)
        n = min(len(here), len(there))
        kept.append(here[:n])
        plain.append(there[:n])
    rows, others = np.concatenate(kept), np.concatenate(plain)
    return (score.kld[rows], score.n[rows].astype(np.float64), score.text[rows]), base.kld[others]


def _scatter(sums: Floats, text: Ints) -> float:
    """Half a 95 % interval of a total of independent chunks; infinite where they are too few."""
    groups = [sums[text == one] for one in np.unique(text)]
    freedom = len(sums) - len(groups)
    if freedom < 3 or min(map(len, groups)) < 2:
        return math.inf
    return student(freedom) * math.sqrt(sum(len(group) * float(group.var(ddof=1)) for group in groups))


def _slope(found: Sequence[_Probed], base: ProbeScore) -> Estimate | None:
    """p, from the probes with the least and the greatest error; the noise of both is paired."""
    if len(found) < 2:
        return None
    (low, low_errors), (high, high_errors) = found[0], found[-1]
    ratio = math.log(_strength(high_errors) / _strength(low_errors))
    if ratio < _APART:
        return None
    (a, _, text), plain_a = _paired(low, base)
    (b, _, _), plain_b = _paired(high, base)
    if len(a) != len(b):  # one was given more chunks
        return None
    first, second = a - plain_a, b - plain_b
    if first.sum() <= 0 or second.sum() <= 0:
        return None
    half = _scatter(second / second.sum() - first / first.sum(), text) / ratio
    value = math.log(second.sum() / first.sum()) / ratio
    return Estimate(value, value - half, value + half) if math.isfinite(half) else Estimate(value, None, None)


def _common(groups: Sequence[Group], slopes: Mapping[str, Estimate], role: str | None) -> float | None:
    """The p that groups of a role (None: all) share, if their probes say that it is not 1."""
    known = [slopes[one.name] for one in groups if one.name in slopes and role in (None, one.role)]
    sure = [one for one in known if one.low is not None and one.high is not None]
    if not sure:
        return None
    weights = [1.0 / max(one.value - (one.low or 0.0), 1e-3) ** 2 for one in sure]
    mean = sum(weight * one.value for weight, one in zip(weights, sure, strict=True)) / sum(weights)
    half = 1.0 / math.sqrt(sum(weights))
    if abs(mean - 1.0) <= half:
        return 1.0
    return min(max(median(one.value for one in sure), _EXPONENTS[0]), _EXPONENTS[1])


def _fit(found: Sequence[_Probed], base: ProbeScore, p: float) -> Estimate:
    """s, by the mean of the logarithms of what each probe says: neither a low nor a high type is favoured."""
    each = [difference(score, base).times(1.0 / _strength(errors, p)) for score, errors in found]
    values = [one.value for one in each]
    value = math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else sum(values) / len(values)
    if any(one.low is None for one in each):
        return Estimate(value, None, None)
    half = max((one.high or 0.0) - one.value for one in each)
    return Estimate(value, value - half, value + half)


def _pooled(
    each: Sequence[Sensitivity], found: Mapping[str, Sequence[_Probed]], base: ProbeScore
) -> tuple[Sensitivity, ...]:
    """Groups of one role of which noise hides the sensitivity get the same one: that of all of them together."""
    hidden: dict[str, list[Sensitivity]] = {}
    for one in each:
        if one.s.value <= 0 or (one.s.low is not None and one.s.low <= 0):
            hidden.setdefault(one.group.role, []).append(one)
    pooled: dict[str, Sensitivity] = {}
    for members in hidden.values():
        costs, scale, text = _together([(found[one.group.name], one.p) for one in members], base)
        half = _scatter(costs, text) / scale
        value = float(costs.sum()) / scale
        s = Estimate(_positive(value, half), None, None)
        if math.isfinite(half):
            s = Estimate(s.value, max(0.0, value - half), max(s.value, value + half))
        names = tuple(one.group.name for one in members)
        for one in members:
            others = tuple(name for name in names if name != one.group.name)
            pooled[one.group.name] = replace(one, s=s, pooled_with=others)
    return tuple(pooled.get(one.group.name, one) for one in each)


def _together(members: Sequence[tuple[Sequence[_Probed], float]], base: ProbeScore) -> tuple[Floats, float, Ints]:
    """Of the groups' probes with the greatest errors: what they cost in each chunk, what their sensitivity is
    multiplied with to give that, and the chunks' texts. A chunk that only some were scored on counts for those.
    """
    costs, scale = np.zeros(len(base.kld)), 0.0
    place = {chunk: at for at, chunk in enumerate(_chunks(base))}
    for found, p in members:
        score, errors = found[-1]
        (kld, n, _), plain = _paired(score, base)
        at = [place[chunk] for chunk in _chunks(score) if chunk in place]
        costs[at] += kld - plain
        scale += _strength(errors, p) * float(n.sum())
    return costs, scale, base.text


def _chunks(score: ProbeScore) -> list[tuple[int, int]]:
    """(text, number in it) of each chunk: those of a text come in order, from its first."""
    counted: dict[int, int] = {}
    found = []
    for text in score.text.tolist():
        counted[text] = number = counted.get(text, -1) + 1
        found.append((text, number))
    return found


def _positive(value: float, half: float) -> float:
    """What to expect of a quantity that cannot be negative and was measured as `value` +- `half` (95 %): the mean of
    the normal distribution above 0.
    """
    if not math.isfinite(half) or half <= 0:
        return max(value, 0.0)
    deviation = half / NORMAL
    at = value / deviation
    if at < -5:
        return deviation / -at
    return value + deviation * _NORMAL.pdf(at) / _NORMAL.cdf(at)


def _shown(one: Estimate) -> str:
    return f"{one.value:.2f}" + ("" if one.low is None or one.high is None else f" [{one.low:.2f}, {one.high:.2f}]")
