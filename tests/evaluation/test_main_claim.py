"""What this project is for, on a reduced set (docs/results/draft-head.md has the whole): calibrated, the head goes to a quarter of
Q8_0's bytes and keeps its agreement with the trunk; without data its mixture is refused, and a k-quant of that size is worse.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from apex_runs import run_apex

from apex_build.errors import DataMissing
from apex_build.native.toolset import Toolset

CHUNKS = 16  # of each of the four texts: 16,320 positions
QUARTER = ("--set", "draft_head.routed=IQ2_XXS", "--set", "draft_head.other=Q4_K")


@pytest.fixture(scope="module")
def loss(
    tools: Toolset, testbed: Path, heldout: Path, calibrated: Path, headless_imatrix: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[float, float, float]]:
    """Points of agreement at depth 1 against the head at Q8_0: value and 95 % interval. The trunk is Q8_0 in all."""
    folder = tmp_path_factory.mktemp("claim")
    q8_0, quarter, blind = (folder / f"{name}.gguf" for name in ("q8_0", "quarter", "blind"))
    quantize = ("quantize", testbed, "--policy", "draft-head-only")
    run_apex(*quantize, "--set", "draft_head=Q8_0", "--imatrix", calibrated, "-o", q8_0)
    run_apex(*quantize, *QUARTER, "--imatrix", calibrated, "-o", quarter)
    run_apex(*quantize, "--set", "draft_head=Q2_K", "--imatrix", headless_imatrix, "--allow-uncalibrated", "-o", blind)
    texts = [word for path in sorted(heldout.glob("*.txt")) for word in ("--text", path)]
    ran = run_apex(
        "evaluate", quarter, blind, "--reference", q8_0, "--only", "draft-head", *texts, "--set", "draft-head.depth=1",
        "--set", f"draft-head.chunks={CHUNKS}", "--threads", 1, "--results", folder / "results.jsonl", "--json",
    )  # fmt: skip
    found = {}
    for row in json.loads(ran.stdout):
        (figure,) = (f for f in row["figures"] if f["name"] == "depth1.agreement.difference" and not f["domain"])
        assert figure["n"] == 4 * CHUNKS * 255
        found[row["file"]] = (figure["value"], figure["low"], figure["high"])
    return found


def test_a_quarter_of_the_bytes_keeps_the_agreement(loss: dict[str, tuple[float, float, float]]) -> None:
    value, low, _ = loss["quarter.gguf"]
    assert value > -0.8 and low > -1.2, "over the whole held-out text: -0.22 [-0.37, -0.08]"


def test_a_k_quant_without_data_is_worse(loss: dict[str, tuple[float, float, float]]) -> None:
    assert loss["blind.gguf"][2] < -0.3, "over the whole held-out text: -1.16 [-1.37, -0.95]"
    assert loss["quarter.gguf"][0] - loss["blind.gguf"][0] > 0.4


def test_without_the_heads_data_the_mixture_is_refused(
    tools: Toolset, testbed: Path, headless_imatrix: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    command = ("quantize", testbed, "--policy", "draft-head-only", *QUARTER, "--imatrix", headless_imatrix, "-o", out)
    ran = run_apex(*command, "--allow-uncalibrated", code=DataMissing.exit_code)
    assert "of the draft head -> IQ2_XXS" in ran.stderr and not out.exists()
