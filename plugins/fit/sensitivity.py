"""Part 2: how much each part of a model adds to the divergence, from probes of it and from the errors of its types.

The model of the loss: a group of tensors (one role in one layer) costs

    KLD = s * mean(e**p)        e: the relative error of the chosen type on each of its tensors

where `s` is the sensitivity of the group. p = 1 is the product law, which holds where errors propagate linearly; if a
router or another threshold follows, p is smaller (the testbed: 0.7 in the first layer, 1.0 in the last). Groups probed
with two types yield p, for themselves and for groups at a similar depth. A matrix outside the layers is probed with
every type that it can have, and its cost is used as measured: a mean error predicts it badly. The costs of groups add
up; probes of the whole model show how well (`Total`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from apex_build.plugin_api import BASELINE, NORMAL, Estimate, Model, Probe, ProbeScore, Tensor, clustered_ratio, student

from .errors import TYPES

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Errors = Mapping[tuple[str, str], float]  # (tensor, type in upper case) -> relative error; missing: not possible

# Types for a group's first and second probe; the first possible one of each is used. They are far apart, so that the
# types of a file lie between them: on the testbed Q3_K and Q5_K predict the loss of all layers at Q4_K, IQ3_S and
# IQ2_XS within 1 %; Q3_K and Q2_K are 5 to 33 % off.
_LOW = ("Q3_K", "IQ3_S", "IQ4_XS", "IQ4_NL", "Q4_0", "Q2_K", "Q4_K", "Q8_0")
_HIGH = ("Q5_K", "Q6_K", "Q5_0", "Q8_0", "Q4_K")
VERSION = 3  # raise it when a change of the code makes other probes, or draws other conclusions from them
_NOISY = 0.5  # half an interval, relative to the value: less certain probes get more chunks
_EXPONENTS = (0.5, 2.0)  # bounds of p: if two probes yield a value outside, one of them is noise
# standard deviations: of p around 1 without probes; of a group's p around the value from its own probes, and around the
# value from another group at a similar depth
_PRIOR, _OWN, _ANOTHER = 0.5, 0.05, 0.2
_OTHER_ROLE = 0.2  # weight of a group of another role, relative to one of the same role
_FAR = 10  # ratio of two errors: no type is chosen beside a smaller one with a tenth of its error
_APART = 0.2  # minimum logarithm of the ratio of two errors: closer ones do not tell p
_NORMAL = NormalDist()
_Probed = tuple[ProbeScore, tuple[float, ...]]  # with the errors of its tensors


@dataclass(frozen=True)
class Group:
    name: str
    role: str  # groups of the same role may be pooled: `routed.down`, `attention`
    layer: int | None
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Sensitivity:
    """`s`: with its 95 % interval. `pooled_with`: groups whose probes were combined with this one's, because each alone
    is lost in noise. `note`: whether the product law holds, if the probes tell.
    """

    group: Group
    s: Estimate
    p: float = 1.0
    pooled_with: tuple[str, ...] = ()
    note: str = ""
    measured: Mapping[str, float] = field(default_factory=dict, hash=False)  # type -> divergence, if probed itself

    def loss(self, errors: Mapping[str, float]) -> float:
        """The divergence of the group that the law predicts for these relative errors of its tensors."""
        return float(self.s.value * _strength([errors[name] for name in self.group.tensors], self.p))


@dataclass(frozen=True)
class Total:
    """How the groups add up: measured = factor * predicted**power, from probes of the whole model."""

    factor: float = 1.0
    power: float = 1.0

    def of(self, predicted: float) -> float:
        return float(self.factor * predicted**self.power)


def groups_of(model: Model, can_be: Sequence[str]) -> tuple[Group, ...]:
    """Group the tensors in `can_be`, which get a type. In a layer: by role, with the down matrices of feed-forward
    networks apart from gate and up. Each tensor outside the layers is a group.
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
    types: Sequence[str] = _LOW,
    second: Sequence[str] = _HIGH,
    *,
    second_every: int = 6,
) -> tuple[Probe, ...]:
    """Probe the model as it is; each group with the first of `types` that its tensors can have; and, of each role, at
    least three groups spread from its first layer to its last, with one of `second` too. A tensor outside the layers is
    probed with every type that it can have. A group with a tensor that can have none of the types is left out.
    """
    probes = [BASELINE]
    twice = {name for role in {group.role for group in groups} for name in _spread(groups, role, second_every)}
    for group in groups:
        if (low := _probe(group, errors, types)) is None:
            continue
        probes.append(low)
        if alone(group):
            each = [_probe(group, errors, [kind]) for name, kind in errors if name == group.tensors[0]]
            probes += [one for one in each if one is not None and one.key != low.key]
            continue
        other = _probe(group, errors, second) if group.name in twice else None
        if other is not None and other.key != low.key:
            probes.append(other)
    return tuple(probes)


def _spread(groups: Sequence[Group], role: str, every: int) -> list[str]:
    """Names of some groups of a role: the first, the last, and others evenly spaced between them."""
    names = [group.name for group in groups if group.role == role]
    many = min(len(names), max(3, -(-len(names) // every)))
    return [names[round(at * (len(names) - 1) / max(1, many - 1))] for at in range(many)]


def alone(group: Group) -> bool:
    """Whether the group is probed with every type that it can have."""
    return group.layer is None and len(group.tensors) == 1


def more_chunks(
    groups: Sequence[Group], scores: Sequence[ProbeScore], errors: Errors, budget: int
) -> tuple[Probe, ...]:
    """The baseline and the probes whose cost is lost in noise, the potentially most expensive first. Each is to get as
    many chunks again as it had, so there are only as many probes as `budget` extra chunks allow. Empty if more chunks
    would not help.
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
    """The cost of a probe: its divergence minus the baseline's, on the chunks that both have."""
    probed, plain = _paired(score, base)
    return clustered_ratio(probed[0] - plain, probed[1], probed[2])


def sensitivities(groups: Sequence[Group], scores: Sequence[ProbeScore], errors: Errors) -> tuple[Sensitivity, ...]:
    """The sensitivity of each group that was probed, in order."""
    base = _baseline(scores)
    found = {group.name: _of(group, scores, errors) for group in groups}
    slopes = {group.name: slope for group in groups if (slope := _slope(found[group.name], base)) is not None}
    each = []
    for group in groups:
        if not found[group.name]:
            continue
        p, note = _exponent(group, groups, slopes), ""
        own = slopes.get(group.name)
        if own is not None and own.low is not None and own.high is not None:
            holds = "holds" if own.low - _OWN <= 1.0 <= own.high + _OWN else "fails"
            note = f"the product law {holds}: KLD ~ E^{_shown(own)}"
        measured = _by_type(found[group.name], base) if alone(group) else {}
        each.append(Sensitivity(group, _fit(found[group.name], base, p), p, note=note, measured=measured))
    return _pooled(each, found, base)


def total_of(predicted: Sequence[float], measured: Sequence[float]) -> Total:
    """Fit `Total` to probes of the whole model: one gives the factor, several the power too (least squares of
    logarithms).
    """
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
    """A probe of the group, with each tensor at the first of the types that it can have: if possible one of an ordinary
    error, since the loss at a huge one does not tell the loss at small ones.
    """
    chosen: dict[str, str | None] = {}
    for name in group.tensors:
        can = [kind for kind in types if (name, kind) in errors]
        chosen[name] = next((kind for kind in can if not _huge(name, kind, errors)), can[0] if can else None)
    if None in chosen.values():
        return None
    named = {name: kind for name, kind in chosen.items() if kind is not None}
    return Probe(f"{group.name} {'+'.join(dict.fromkeys(named.values()))}", named)


def _huge(name: str, kind: str, errors: Errors) -> bool:
    """Whether a smaller type has a far smaller error. In a tensor where one column counts for nearly everything, a type
    can lose that column's largest weight: SmolLM2's blk.11.ffn_down has 0.80 at Q3_K, and 0.0085 at IQ3_S.
    """
    smaller = TYPES[: TYPES.index(kind)] if kind in TYPES else ()
    return any(errors[name, kind] > _FAR * errors.get((name, one), math.inf) for one in smaller)


def _baseline(scores: Sequence[ProbeScore]) -> ProbeScore:
    return next(score for score in scores if not score.probe.types)


def _of(group: Group, scores: Sequence[ProbeScore], errors: Errors) -> list[_Probed]:
    """The group's own probes, each with the errors of its tensors, smallest error first."""
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
    """(divergence, positions, text) of the chunks that both have, and the baseline's divergence on them. Both have the
    first chunks of each text.
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
    """Half a 95 % interval of a total over independent chunks; infinite for too few chunks."""
    groups = [sums[text == one] for one in np.unique(text)]
    freedom = len(sums) - len(groups)
    if freedom < 3 or min(map(len, groups)) < 2:
        return math.inf
    return student(freedom) * math.sqrt(sum(len(group) * float(group.var(ddof=1)) for group in groups))


def _slope(found: Sequence[_Probed], base: ProbeScore) -> Estimate | None:
    """p, from the probes with the smallest and the largest error; their noise is paired."""
    if len(found) < 2:
        return None
    (low, low_errors), (high, high_errors) = found[0], found[-1]
    ratio = math.log(_strength(high_errors) / _strength(low_errors))
    if ratio < _APART:
        return None
    (a, _, text), plain_a = _paired(low, base)
    (b, _, _), plain_b = _paired(high, base)
    if len(a) != len(b):  # only one of them got more chunks
        return None
    first, second = a - plain_a, b - plain_b
    if first.sum() <= 0 or second.sum() <= 0 or any((difference(one, base).low or 0.0) < 0 for one in (low, high)):
        return None  # noise has no slope
    half = _scatter(second / second.sum() - first / first.sum(), text) / ratio
    value = math.log(second.sum() / first.sum()) / ratio
    return Estimate(value, value - half, value + half) if math.isfinite(half) else Estimate(value, None, None)


def _exponent(group: Group, groups: Sequence[Group], slopes: Mapping[str, Estimate]) -> float:
    """The p of a group: a weighted mean of 1 and of the values from its own probes and those of other groups. A group
    at a similar depth and of the same role weighs more.
    """
    weight, total = 1 / _PRIOR**2, 1 / _PRIOR**2
    span = max(2.0, len({one.layer for one in groups if one.layer is not None}) / 6)
    for other in groups:
        slope = slopes.get(other.name)
        if slope is None or slope.low is None or slope.high is None:
            continue
        spread = ((slope.high - slope.low) / 2 / NORMAL) ** 2
        if other is group:
            trust = 1 / (spread + _OWN**2)
        elif group.layer is None or other.layer is None:
            continue
        else:
            near = math.exp(-abs(group.layer - other.layer) / span) * (1.0 if other.role == group.role else _OTHER_ROLE)
            trust = near / (spread + _ANOTHER**2)
        weight, total = weight + trust, total + trust * slope.value
    return min(max(total / weight, _EXPONENTS[0]), _EXPONENTS[1])


def _by_type(found: Sequence[_Probed], base: ProbeScore) -> dict[str, float]:
    """The cost of each type that was probed on a group of one tensor."""
    kinds = [next(iter(score.probe.types.values())).upper() for score, _ in found]
    return {kind: max(0.0, difference(score, base).value) for kind, (score, _) in zip(kinds, found, strict=True)}


def _fit(found: Sequence[_Probed], base: ProbeScore, p: float) -> Estimate:
    """s: the geometric mean over the probes, so that neither low nor high types dominate."""
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
    """Give groups of one role whose sensitivity is lost in noise the same one, measured on all of them together."""
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
    """Combine the groups' probes with the largest errors: their cost in each chunk, the factor between their
    sensitivity and the total cost, and the chunks' texts. A chunk that only some were scored on counts for those.
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
    """(text, number within the text) of each chunk; the chunks of a text are in order and start at its first."""
    counted: dict[int, int] = {}
    found = []
    for text in score.text.tolist():
        counted[text] = number = counted.get(text, -1) + 1
        found.append((text, number))
    return found


def _positive(value: float, half: float) -> float:
    """The expected value of a quantity that cannot be negative and was measured as `value` +- `half` (95 %): the mean
    of the normal distribution truncated at 0.
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
