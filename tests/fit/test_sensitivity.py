"""The loss model of `fit`: what it makes of probes whose truth is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scoring import plugin_module

from apex_build.evaluation.intervals import Estimate
from apex_build.evaluation.probes import Probe, ProbeScore
from apex_build.gguf_model.model import read_model
from apex_build.plugins import load_plugins

CHUNKS, POSITIONS = 12, 255
TYPES = {"Q2_K": 0.06, "Q3_K": 0.016, "Q4_K": 0.004, "Q5_K": 0.001}  # relative errors, about


@pytest.fixture(scope="module")
def fit() -> ModuleType:
    return plugin_module("fit", "sensitivity")


@pytest.fixture
def groups(fit: ModuleType) -> list[object]:
    return [
        fit.Group(f"blk.{layer}.{role}", role, layer, tuple(f"blk.{layer}.{role}.{part}" for part in range(3)))
        for role in ("dense.down", "attention")
        for layer in range(8)
    ]


def errors_of(groups: list[object]) -> dict[tuple[str, str], float]:
    """Unlike for each tensor."""
    names = [name for group in groups for name in group.tensors]  # type: ignore[attr-defined]
    factor = np.random.default_rng(3).uniform(0.7, 1.4, len(names))
    return {(name, kind): error * f for name, f in zip(names, factor, strict=True) for kind, error in TYPES.items()}


def scored(
    fit: ModuleType,
    probes: tuple[Probe, ...],
    groups: list[object],
    truth: Callable[[str], tuple[float, float]],
    noise: float,
) -> list[ProbeScore]:
    """Chunks differ in how much they show of a loss, the same for all probes; `noise` is of each probe's own."""
    errors, random = errors_of(groups), np.random.default_rng(5)
    shown = random.lognormal(0, 0.4, CHUNKS)
    found = []
    for probe in probes:
        loss = 0.0
        for group in groups:
            if probe.types.keys() == set(group.tensors):  # type: ignore[attr-defined]
                s, p = truth(group.name)  # type: ignore[attr-defined]
                loss = s * float(np.mean([errors[name, kind] ** p for name, kind in probe.types.items()]))
        kld = POSITIONS * (loss * shown / shown.mean() + random.normal(0, noise, CHUNKS) + 2e-6)
        n = np.full(CHUNKS, POSITIONS)
        found.append(ProbeScore(probe, n, kld, n, np.arange(CHUNKS) % 2))
    return found


def by_name(found: tuple[object, ...]) -> Mapping[str, object]:
    return {one.group.name: one for one in found}  # type: ignore[attr-defined]


def test_sensitivities_are_found(fit: ModuleType, groups: list[object]) -> None:
    """The first layer is the most sensitive one; attention matters little."""

    def truth(name: str) -> tuple[float, float]:
        return (0.5 if "blk.0." in name else 0.05) * (0.2 if "attention" in name else 1.0), 1.0

    errors = errors_of(groups)
    probes = fit.first_probes(groups, errors)
    assert [probe.name for probe in probes[:4]] == [
        "the model as it is", "blk.0.dense.down Q3_K", "blk.0.dense.down Q5_K", "blk.1.dense.down Q3_K",
    ]  # fmt: skip
    assert len(probes) == 1 + 16 + 6
    assert [probe.name.split()[0] for probe in probes if "attention Q5_K" in probe.name] == [
        f"blk.{layer}.attention" for layer in (0, 4, 7)
    ]
    found = fit.sensitivities(groups, scored(fit, probes, groups, truth, 1e-6), errors)
    for one in found:
        s, _ = truth(one.group.name)
        assert one.p == pytest.approx(1.0, abs=0.05)
        types = dict.fromkeys(one.group.tensors, "Q4_K")
        real = s * np.mean([errors[name, kind] for name, kind in types.items()])
        assert one.loss({name: errors[name, kind] for name, kind in types.items()}) == pytest.approx(real, rel=0.05)
    noted = [one.note for one in found if one.note]
    assert len(noted) == 6 and all("the product law holds" in note for note in noted)


def test_where_the_product_law_fails_the_exponent_is_refined(fit: ModuleType, groups: list[object]) -> None:
    """For the groups of that role; those probed with one type take what others of the role near them show."""

    def truth(name: str) -> tuple[float, float]:
        return 0.1, 1.4 if "down" in name else 1.0

    errors = errors_of(groups)
    found = by_name(
        fit.sensitivities(groups, scored(fit, fit.first_probes(groups, errors), groups, truth, 2e-8), errors)
    )
    assert found["blk.0.dense.down"].p == pytest.approx(1.4, abs=0.05)  # type: ignore[attr-defined]
    assert "the product law fails: KLD ~ E^1.4" in found["blk.0.dense.down"].note  # type: ignore[attr-defined]
    assert found["blk.1.dense.down"].p == pytest.approx(1.4, abs=0.15)  # type: ignore[attr-defined]
    for name in ("blk.0.attention", "blk.1.attention"):
        assert found[name].p == pytest.approx(1.0, abs=0.1)  # type: ignore[attr-defined]
    own = {name: errors[name, "Q4_K"] for name in found["blk.3.dense.down"].group.tensors}  # type: ignore[attr-defined]
    real = 0.1 * np.mean([error**1.4 for error in own.values()])
    assert found["blk.3.dense.down"].loss(own) == pytest.approx(real, rel=0.2)  # type: ignore[attr-defined]


def test_the_exponent_goes_by_depth(fit: ModuleType, groups: list[object]) -> None:
    """As in a mixture of experts: small errors of the first layers are seen by every router after them."""

    def truth(name: str) -> tuple[float, float]:
        return 0.1, 0.7 + 0.04 * int(name.split(".")[1])

    errors = errors_of(groups)
    found = fit.sensitivities(groups, scored(fit, fit.first_probes(groups, errors), groups, truth, 1e-8), errors)
    for one in found:
        assert one.p == pytest.approx(truth(one.group.name)[1], abs=0.08), one.group.name


def test_a_matrix_outside_the_layers_is_taken_as_measured(fit: ModuleType) -> None:
    """Its errors say little of what its types cost."""
    output, other = (fit.Group(name, name, layer, (name,)) for name, layer in (("output", None), ("blk.0.dense.up", 0)))
    costs = {"Q3_K": 0.2, "Q2_K": 3.0, "Q4_K": 0.5, "Q5_K": 0.1}
    errors = {(name, kind): error for name in ("output", "blk.0.dense.up") for kind, error in TYPES.items()}
    probes = fit.first_probes([output, other], errors)
    assert [one.name for one in probes] == [
        "the model as it is", "output Q3_K", "output Q2_K", "output Q4_K", "output Q5_K", "blk.0.dense.up Q3_K",
        "blk.0.dense.up Q5_K",
    ]  # fmt: skip
    n = np.full(CHUNKS, POSITIONS)
    scores = [
        ProbeScore(one, n, np.full(CHUNKS, POSITIONS * costs.get(one.types.get("output", ""), 0.0)), n, n * 0)
        for one in probes
    ]
    found = fit.sensitivities([output, other], scores, errors)
    assert found[0].measured == pytest.approx(costs) and not found[1].measured


def test_a_type_that_breaks_a_tensor_is_not_what_it_is_probed_with(fit: ModuleType) -> None:
    """The loss at an error of 0.8 says nothing of the loss at 0.01; without another type it is better than nothing."""
    group = fit.Group("blk.0.dense.down", "dense.down", 0, ("a",))
    broken = {("a", "IQ3_S"): 0.0085, ("a", "Q3_K"): 0.8, ("a", "Q5_K"): 0.0001}
    ordinary = {**broken, ("a", "Q3_K"): 0.02}
    names = [[one.name for one in fit.first_probes([group], errors)][1] for errors in (broken, ordinary)]
    assert names == ["blk.0.dense.down IQ3_S", "blk.0.dense.down Q3_K"]
    alone = {("a", "Q2_K"): 0.06, ("a", "Q3_K"): 0.8}
    assert [one.name for one in fit.first_probes([group], alone, ["Q3_K"])][1] == "blk.0.dense.down Q3_K"


def test_what_noise_hides_is_pooled_or_given_more_chunks(fit: ModuleType, groups: list[object]) -> None:
    def truth(name: str) -> tuple[float, float]:
        return 0.002 if "attention" in name else 1.0, 1.0

    errors = errors_of(groups)
    probes = fit.first_probes(groups, errors)
    scores = scored(fit, probes, groups, truth, 1e-4)
    wanted = fit.more_chunks(groups, scores, errors, 6 * CHUNKS)
    assert len(wanted) == 6 and wanted[0].types == {} and all("attention" in probe.name for probe in wanted[1:])
    assert fit.more_chunks(groups, scores, errors, 2 * CHUNKS - 1) == ()
    assert fit.more_chunks(groups, scored(fit, probes, groups, truth, 1e-9), errors, 10**6) == ()
    found = fit.sensitivities(groups, scores, errors)
    hidden = [one for one in found if one.pooled_with]
    assert len(hidden) > 4 and {one.group.role for one in hidden} == {"attention"}
    assert len({one.s.value for one in hidden}) == 1
    assert all(0 <= one.s.low <= one.s.value <= one.s.high and one.s.low <= 0.002 <= one.s.high for one in hidden)
    assert hidden[0].s.value < 0.1, "not the sensitivity that the feed-forward groups have"


def test_more_chunks_for_some_are_taken_in(fit: ModuleType, groups: list[object]) -> None:
    errors = errors_of(groups)
    probes = fit.first_probes(groups, errors)
    scores = scored(fit, probes, groups, lambda _: (0.1, 1.0), 1e-6)
    longer = [
        score
        if at > 2
        else ProbeScore(
            score.probe,
            np.tile(score.n, 2),
            np.tile(score.kld, 2),
            np.tile(score.same_top, 2),
            np.tile(score.text, 2),
            np.tile(score.head, (2, 1, 1)),
        )
        for at, score in enumerate(scores)
    ]
    found = fit.sensitivities(groups, longer, errors)
    assert len(found) == 16 and all(one.s.value == pytest.approx(0.1, rel=0.1) for one in found)


def test_a_quantity_that_cannot_be_negative(fit: ModuleType) -> None:
    assert fit._positive(1.0, 0.1) == pytest.approx(1.0)
    assert fit._positive(0.0, 1.0) == pytest.approx(0.407, abs=1e-3)  # the mean of half a normal distribution
    assert 0 < fit._positive(-1.0, 1.0) < 0.407 and 0 < fit._positive(-9.0, 1.0) < 0.06
    assert fit._positive(-1.0, float("inf")) == 0.0


def test_the_total_of_all_groups(fit: ModuleType) -> None:
    assert fit.total_of([], []) == fit.Total(1.0, 1.0)
    assert fit.total_of([0.1], [0.12]).of(0.2) == pytest.approx(0.24)
    law = fit.total_of([0.01, 0.1, 1.0], [0.02 * 0.01**0.9, 0.02 * 0.1**0.9, 0.02])
    assert law.power == pytest.approx(0.9) and law.of(0.5) == pytest.approx(0.02 * 0.5**0.9)


def test_groups_of_a_model(fit: ModuleType, testbed: Path) -> None:
    model = read_model(testbed, load_plugins().role_of)
    wide = [tensor.name for tensor in model.tensors if len(tensor.shape) > 1 and tensor.type == "F16"]
    groups = fit.groups_of(model, wide)
    members = [name for group in groups for name in group.tensors]
    assert sorted(members) == sorted(wide), "each in one group"
    named = {group.name: group.tensors for group in groups}
    assert named["output"] == ("output.weight",) and named["token_embd"] == ("token_embd.weight",)
    assert named["blk.0.routed.down"] == ("blk.0.ffn_down_exps.weight",)
    assert set(named["blk.0.routed.up"]) == {"blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"}
    assert set(named["blk.3.attention"]) == {f"blk.3.attn_{part}.weight" for part in ("q", "k", "v", "output")}
    assert "blk.6.head.routed.down" in named and all("blk.6." not in name or ".head." in name for name in named)


def test_estimates_without_an_interval_do_not_stop_it(fit: ModuleType, groups: list[object]) -> None:
    """Fewer chunks than an interval needs."""
    errors = errors_of(groups)
    probes = fit.first_probes(groups, errors)
    few = [
        ProbeScore(score.probe, score.n[:2], score.kld[:2], score.same_top[:2], score.text[:2], score.head[:2])
        for score in scored(fit, probes, groups, lambda _: (0.1, 1.0), 1e-6)
    ]
    found = fit.sensitivities(groups, few, errors)
    assert len(found) == 16 and all(isinstance(one.s, Estimate) and one.s.low is None for one in found)
    assert len(fit.more_chunks(groups, few, errors, 100)) == 23
