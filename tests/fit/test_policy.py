"""The policy with a hand-made measurement: bytes, settings, errors, and the stages that use it."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from apex_runs import run_apex

from apex_build import api
from apex_build.errors import ApexError, BudgetUnfit, MeasurementUnfit, ParameterUnknown, TypeUnknown
from apex_build.gguf_model.catalogue import Model
from apex_build.stages.compare import compare
from apex_build.stages.quantize import QuantizeOptions, plan_files

sys.path.insert(0, str(Path(__file__).parents[2] / "plugins"))
measurement: Any = importlib.import_module("fit.measurement")
budget: Any = importlib.import_module("fit.budget")

pytestmark = pytest.mark.usefixtures("tools")


def planned(model: Model, measured: Path, **settings: Any) -> api.Planned:
    return api.plan(model, api.PlanOptions("fit", {"measurement": str(measured), **settings}))


def types(model: Model, measured: Path, **settings: Any) -> dict[str, str]:
    return {entry.name: entry.type for entry in planned(model, measured, **settings).plan.entries}


@pytest.mark.parametrize("bits", [2.3, 2.8, 3.5, 4.3, 5.0, 6.0])
def test_the_file_has_the_bytes_that_it_may(
    model: Model, measured: Path, calibrated: Path, tmp_path: Path, bits: float
) -> None:
    """Header and metadata count: at most 0.2 % of the bytes stay unused."""
    target = int(bits * sum(tensor.n_elements for tensor in model.tensors) / 8) + 300_000
    parameters = {"measurement": str(measured), "target_size": str(target)}
    options = QuantizeOptions(("fit",), parameters, calibrated)
    (one,) = plan_files(model, tmp_path / "out.gguf", options, place=api.workplace())
    assert 0.998 * target <= one.job.n_bytes <= target
    (again,) = plan_files(model, tmp_path / "out.gguf", options, place=api.workplace())
    assert one.job.plan.identity == again.job.plan.identity


def test_what_is_sensitive_gets_more(model: Model, measured: Path) -> None:
    found = types(model, measured, target_bpw=3.5)
    assert found["output.weight"] in ("Q6_K", "Q8_0") and found["blk.3.ffn_up_exps.weight"] in ("Q3_K", "IQ3_XXS")


def test_what_is_predicted_is_between_the_anchors(model: Model, measured: Path) -> None:
    figures = [planned(model, measured, target_bpw=bits).plan.predicted["kld.mean"] for bits in (2.3, 3.0, 4.0, 6.0)]
    assert figures == sorted(figures, reverse=True)


def test_settings(model: Model, measured: Path) -> None:
    found = types(model, measured, target_bpw=4.0, keep="blk.0.attn=Q5_K,output.weight=keep")
    assert found["output.weight"] == "F16" and found["blk.0.attn_gate.weight"] == "Q5_K"
    found = types(model, measured, target_bpw=4.0, types="Q4_K,Q3_K,Q8_0")
    assert set(found.values()) <= {"Q4_K", "Q3_K", "Q8_0", "F16", "F32"}
    found = types(model, measured, target_bpw=4.0, types="-IQ3_XXS,-IQ2_S,-IQ2_XXS,-IQ4_XS")
    assert not any(kind.startswith("IQ") for kind in found.values())
    found = types(model, measured, target_bpw=4.0, min="attention=Q6_K,draft_head=Q8_0")
    assert found["blk.3.attn_k.weight"] in ("Q6_K", "Q8_0", "F16") and found["blk.6.ffn_up_exps.weight"] == "Q8_0"


def test_the_head_has_the_fewest_bytes_that_its_bound_allows(model: Model, measured: Path) -> None:
    plans = {loss: planned(model, measured, target_bpw=4.0, draft_loss=loss).plan for loss in (0.1, 0.5, 2.0)}
    sizes = [plan.bytes_by_role["draft head"] for plan in plans.values()]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.3 * sizes[2]
    for loss, plan in plans.items():
        assert -loss <= plan.predicted["depth1.agreement.difference"] <= -0.7 * loss


def test_a_head_that_was_not_scored_gets_a_cautious_mixture(model: Model, by_hand: Any, tmp_path: Path) -> None:
    path = tmp_path / "headless.json"
    measurement.write(replace(by_hand, head=()), path)
    plan = planned(model, path, target_bpw=4.0).plan
    found = {entry.name: entry.type for entry in plan.entries if entry.draft_head}
    assert found["blk.6.ffn_up_exps.weight"] == "Q4_K" and found["blk.6.attn_q.weight"] == "Q5_K"
    assert any("not scored" in warning for warning in plan.warnings)


def refused(kind: type[ApexError], model: Model, measured: Path, **settings: Any) -> ApexError:
    with pytest.raises(kind) as caught:
        planned(model, measured, **settings)
    return caught.value


def test_sizes_that_cannot_be(model: Model, measured: Path) -> None:
    small = refused(BudgetUnfit, model, measured, target_size="1MiB")
    smallest = int(small.message.split("the smallest has ")[1].split()[0])
    assert planned(model, measured, target_size=str(smallest)).plan.n_bytes <= smallest
    assert "the largest has" in refused(BudgetUnfit, model, measured, target_size="1GiB").message
    assert "either" in refused(ParameterUnknown, model, measured).message
    assert "either" in refused(ParameterUnknown, model, measured, target_size="9MB", target_bpw=3).message
    assert "not a size" in refused(ParameterUnknown, model, measured, target_size="much").message


def test_settings_that_mean_nothing(model: Model, measured: Path) -> None:
    at = {"target_bpw": 4.0}
    assert "matches no tensor" in refused(ParameterUnknown, model, measured, keep="nothing=Q4_K", **at).message
    assert "regular expression" in refused(ParameterUnknown, model, measured, keep="(=Q4_K", **at).message
    assert "no tensor has the role 'ears'" in refused(ParameterUnknown, model, measured, min="ears=Q4_K", **at).message
    refused(TypeUnknown, model, measured, types="Q4_Z", **at)
    refused(TypeUnknown, model, measured, keep="output=Q4_Z", **at)


def test_a_measurement_of_something_else(model: Model, other: Any, measured: Path, tmp_path: Path) -> None:
    at = {"target_bpw": 4.0}
    fine = planned(model, other(model="0" * 64), **at).plan
    assert any("another model with the same tensor shapes, another-F16.gguf" in text for text in fine.warnings)
    assert "its tensors differ from those of" in refused(MeasurementUnfit, model, other(shapes="0" * 64), **at).message
    assert "another build" in refused(MeasurementUnfit, model, other(tools="0" * 32), **at).message
    text = measured.read_text("utf-8")
    for wrong, says in ((text[: len(text) // 2], "cut short"), ("{}", "not a measurement"), ("[1", "cut short")):
        measured.write_text(wrong, "utf-8")
        assert says in refused(MeasurementUnfit, model, measured, **at).message
    value = json.loads(text)
    for key, wrong_value in (("tensors", []), ("anchors", [{"total": "x"}]), ("schema", 99), ("from", 3)):
        measured.write_text(json.dumps({**value, key: wrong_value}), "utf-8")
        refused(MeasurementUnfit, model, measured, **at)
    assert "no such file" in refused(ParameterUnknown, model, tmp_path / "none.json", **at).message


def test_the_file_reads_as_it_was_written(by_hand: Any, measured: Path) -> None:
    assert replace(measurement.read(measured), file=None) == by_hand
    value = json.loads(measured.read_text("utf-8"))
    measured.write_text(json.dumps({**value, "of_the_future": 1}), "utf-8")
    assert replace(measurement.read(measured), file=None) == by_hand


def test_plans_side_by_side(model: Model, measured: Path) -> None:
    small = {"edge": "1", "near": "1", "attention_edge": "1"}
    settings = {"measurement": str(measured), "target_size": "9000000", **small}
    found = compare(model, ["fit", "i-mini", "i-nano"], settings)
    assert [one.plan.policy for one in found.plans] == ["fit", "i-mini", "i-nano"]
    assert found.plans[0].predicted["kld.mean"] < found.plans[1].predicted["kld.mean"]
    assert found.plans[1].predicted["kld.mean"] < found.plans[2].predicted["kld.mean"]
    assert "output.weight" in {one.name for one in found.differences}
    with pytest.raises(ParameterUnknown, match=r"none of the policies has a parameter 'edgy'.*edge"):
        compare(model, ["i-mini", "i-nano"], {"edgy": "1"})


def test_the_verb_compares(testbed: Path, measured: Path) -> None:
    given = ("--compare", "i-mini,i-nano", "--set", "edge=1", "--set", f"measurement={measured}")
    shown = run_apex("plan", testbed, *given).stdout
    assert "tensors differ" in shown and "kld.mean predicted" in shown and "draft head" in shown
    found = json.loads(run_apex("plan", testbed, *given, "--json").stdout)
    assert [one["policy"] for one in found["plans"]] == ["i-mini", "i-nano"] and found["different"]
    plain = json.loads(run_apex("plan", testbed, "--compare", "i-mini,i-nano", "--json").stdout)
    assert plain["plans"][0]["predicted"] == {}
    run_apex("plan", testbed, "--compare", "i-mini,i-nano", "--policy", "i-nano", code=2)


def test_a_sweep_over_sizes(testbed: Path, measured: Path, calibrated: Path, heldout: Path, tmp_path: Path) -> None:
    swept = run_apex(
        "sweep", testbed, "--policy", "fit", "--set", f"measurement={measured}", "--over",
        "target_size=6000000,9000000", "--imatrix", calibrated, "--only", "kld", "--reference", testbed, "--text",
        heldout / "chat.txt", "-o", tmp_path / "sweep", "--dry-run",
    ).stdout  # fmt: skip
    assert "6000000" in swept and "9000000" in swept


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("12.5GiB", 13421772800), ("800MB", 800000000), ("1k", 1000), ("5 MiB", 5 << 20), ("77", 77)]
)
def test_sizes(text: str, n_bytes: int) -> None:
    assert budget.size_of(text) == n_bytes
