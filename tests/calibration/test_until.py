"""`apex calibrate --until-experts`: text drawn until every expert has seen enough of it."""

from __future__ import annotations

import json
import random
import runpy
from pathlib import Path

import numpy as np
import pytest
from apex_runs import SMALL, run_apex

from apex_build.calibration import choose as choosing
from apex_build.calibration.choose import Measured, Piece, choose, cut, features_of
from apex_build.gguf_model.imatrix import least_tokens, read_imatrix
from apex_build.native.toolset import Toolset

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture(scope="module")
def skewed(testbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 64 experts of which some are hardly ever chosen."""
    out = tmp_path_factory.mktemp("skewed") / "skewed.gguf"
    runpy.run_path(str(RESULTS / "skewed_model.py"))["write"](testbed, out)
    return out


def test_documents_that_reach_the_starving_are_drawn_first() -> None:
    """Two experts: the second sees tokens of one subject alone, a tenth of the documents, of which the domain says
    nothing.
    """
    dice = random.Random(1)
    common = [f"w{number}" for number in range(300)]
    rare = [f"q{number}" for number in range(40)]
    subjects = [number % 10 == 9 for number in range(200)]
    pieces = [Piece("all", " ".join(dice.choices(rare if rarely else common, k=100)).encode()) for rarely in subjects]
    features = [features_of([(piece, piece.text)], ["all"]) for piece in pieces]
    measured = Measured()
    for number in range(20):
        measured.add(features[number], 100, np.array([100.0, 30.0 if subjects[number] else 0.0]))
    left = range(20, 200)
    chosen = choose(measured, 300, pieces, features, [100.0] * 200, left, 500, 1500)
    assert sum(subjects[number] for number in chosen) >= 0.6 * len(chosen), "blindly it would be a tenth"
    assert len(chosen) < 15, "no more than are expected to be enough"
    assert set(chosen) <= set(left) and len(set(chosen)) == len(chosen)
    assert choose(measured, 300, pieces, features, [100.0] * 200, left, 500, 1500) == chosen, "the same again"
    measured.add(features[20], 100, np.array([400.0, 400.0]))
    enough = choose(measured, 300, pieces, features, [100.0] * 200, left, 200, 1500)
    assert enough == [20, 21], "nobody starves: in their own order, as few as can be run"


def test_the_right_documents_of_a_few() -> None:
    """Expert 0 has enough; 1 gets its tokens from b, 2 from c, and is three times as rare."""
    texts = [b"a a a a", b"b b b b", b"c c c a", b"a a a a", b"b b b a", b"c c c c", b"b b b b", b"a a a a", b"c c c c"]
    counts = [[100, 0, 0], [0, 60, 0], [40, 0, 20]]
    pieces = [Piece("all", text) for text in texts]
    features = [features_of([(piece, piece.text)], ["all"]) for piece in pieces]
    measured = Measured()
    for number, of in enumerate(counts):
        measured.add(features[number], 100, np.array(of, dtype=float))

    def chosen(goal: float, budget: float) -> list[int]:
        return choose(measured, goal, pieces, features, [100.0] * 9, range(3, 9), 100, budget)

    assert chosen(70, 200) == [5, 8], "2 needs 50 tokens, which c gives"
    assert sorted(chosen(200, 400)) == [4, 5, 6, 8], "both starve: b and c"
    assert chosen(20, 500) == [3], "nobody starves: the least, in their own order"


def test_the_next_document_is_always_the_one_that_gives_most() -> None:
    """What is computed lazily is what computing all of it each time finds."""
    dice = np.random.default_rng(3)
    rates = dice.gamma(0.3, size=(40, 30))  # words x experts
    uses = [dice.multinomial(80, dice.dirichlet(np.full(40, 0.2))) for _ in range(60)]
    texts = [" ".join(f"w{word}" for word in np.repeat(np.arange(40), use)).encode() for use in uses]
    pieces = [Piece("all", text) for text in texts]
    features = [features_of([(piece, piece.text)], ["all"]) for piece in pieces]
    measured, left, goal = Measured(), range(12, 60), 400.0
    for number in range(12):
        measured.add(features[number], 80, dice.poisson(uses[number] @ rates).astype(float))
    found = choose(measured, goal, pieces, features, [80.0] * 60, left, 80, 1200)
    total = measured.total
    starving = np.flatnonzero(total < goal)
    expected = choosing._rates(measured, starving, np.stack([features[number] for number in left])) * 80
    missing, mean, taken = goal - total[starving], (total[starving] + 0.5) / (12 * 80), list[int]()
    while len(taken) < 15:
        gains = (np.minimum(expected, missing) / mean).sum(axis=1)
        gains[[number - 12 for number in taken]] = -1
        taken.append(int(np.argmax(gains)) + 12)
        missing = np.maximum(missing - expected[taken[-1] - 12], 0)
    assert found == taken


def test_long_documents_are_cut_at_paragraphs_and_nothing_is_lost() -> None:
    text = b"".join(b"line %d of a paragraph\n" % number + b"\n" * (number % 7 == 0) for number in range(500))
    pieces = cut([("a", text), ("b", b"short"), ("c", b"x" * 9000)], 1000)
    assert b"".join(piece.text for piece in pieces if piece.domain == "a") == text
    assert all(len(piece.text) <= 1500 for piece in pieces if piece.domain == "a")
    assert all(piece.text.endswith(b"\n\n") for piece in pieces[:3])
    assert [len(piece.text) for piece in pieces if piece.domain != "a"] == [5, 9000], "no line ends there"


def test_the_goal_is_reached(tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    command = ["calibrate", testbed, "-o", out, "--until-experts", 64, "--text", heldout / "chat.txt", "--json"]
    done = json.loads(run_apex(*command).stdout)
    goal, found = done["goal"], read_imatrix(out)
    assert goal["reached"] and goal["starved"] == [] and goal["experts"] == 7 * 8
    least = min(min(entry.counts) for name, entry in found.entries.items() if "_exps." in name)
    assert goal["fewest"] == least >= 64
    assert found.head_tokens == goal["tokens"] == (found.chunk_count or 0) * 512
    assert least_tokens(found).goal == 64
    again = json.loads(run_apex(*command).stdout)
    assert again["reused"] and again["goal"] == goal


def test_the_budget_ends_before(tools: Toolset, skewed: Path, testbed: Path, tmp_path: Path) -> None:
    """What stays starved is listed, and the plan says what becomes of it."""
    out = tmp_path / "out.gguf"
    common = ["calibrate", skewed, "-o", out, "--until-experts", 64, "--max-tokens", 16384, "--no-rows-check"]
    ran = run_apex(*common)
    assert "routed experts saw fewer than 64 tokens" in ran.stdout and "experts (tokens)" in ran.stdout
    goal = json.loads(out.with_name("out.gguf.json").read_text())["goal"]
    assert not goal["reached"] and 0.9 * 16384 < goal["tokens"] <= 16384 and goal["rounds"] > 1
    found = read_imatrix(out)
    for layer in goal["starved"]:
        counts = found.entries[f"blk.{layer['layer']}.ffn_down_exps.weight"].counts
        assert layer["count"] == sum(count < 64 for count in counts)
        assert all(counts[expert] == tokens for expert, tokens in layer["experts"])
    assert abs(sum(one["tokens"] for one in goal["domains"]) - goal["tokens"]) < 0.05 * goal["tokens"]


def test_a_plan_raises_what_starves(calibrated: Path, tools: Toolset, testbed: Path) -> None:
    """The least seen expert of the testbed's layer 5 saw fewer than 900 of 12288 tokens, the others more."""
    least = least_tokens(read_imatrix(calibrated)).by_name
    starving = {name for name, tokens in least.items() if "_exps." in name and tokens < 900}
    assert starving == {f"blk.5.ffn_{part}_exps.weight" for part in ("gate", "up", "down")}
    plan = ["plan", testbed, "--policy", "i-nano", *SMALL, "--imatrix", calibrated, "--json"]
    plain = json.loads(run_apex(*plan).stdout)
    raised = json.loads(run_apex(*plan, "--set", "starved=Q4_K", "--set", "starved_tokens=900").stdout)
    types = [{one["name"]: one["type"] for one in found["tensors"]} for found in (plain, raised)]
    assert {name for name in types[0] if types[0][name] != types[1][name]} == starving
    assert {types[1][name] for name in starving} == {"Q4_K"}
    assert any("saw fewer than 900 tokens" in line and "Q4_K" in line for line in raised["warnings"])
    assert not any("saw fewer" in line for line in plain["warnings"])
    higher = ["plan", testbed, "--policy", "i-quality", *SMALL, "--imatrix", calibrated, "--json"]
    assert (
        json.loads(run_apex(*higher, "--set", "starved=Q2_K").stdout)["bytes"]
        == json.loads(run_apex(*higher).stdout)["bytes"]
    ), "never lowered"


def test_bad_input(tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path) -> None:
    dense = testbed.with_name("testbed-dense-f16.gguf")
    out = tmp_path / "x.gguf"
    common = ["--text", heldout / "chat.txt", "-o", out, "--no-rows-check"]
    ran = run_apex("calibrate", dense, *common, "--until-experts", 64, code=50)
    assert "has no routed experts" in ran.stderr
    run_apex("calibrate", testbed, *common, "--max-tokens", 9999, code=2)
    run_apex("calibrate", testbed, *common, "--until-experts", 64, "--chunks", 9, code=2)
    ran = run_apex("calibrate", testbed, *common, "--until-experts", 64, "--max-tokens", 600, code=50)
    assert "600 tokens are too few to run" in ran.stderr
    assert not out.exists()
