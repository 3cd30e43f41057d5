"""The purpose of this project, tested on a reduced set (docs/results/draft-head.md has the full one). With calibration
data, the head's experts can have 3 bits and it keeps its agreement; without, that is refused, and a k-quant head is
ruined, unlike a calibrated one.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from apex_runs import run_apex

from apex_build.errors import DataMissing
from apex_build.native.toolset import Toolset

CHUNKS = 16  # of each of the four texts: 16,320 positions
MIXTURE = ("--set", "draft_head=IQ3_XXS+Q5_K")


@pytest.fixture(scope="module")
def loss(
    tools: Toolset,
    testbed: Path,
    heldout: Path,
    calibrated: Path,
    headless_imatrix: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[float, float, float]]:
    """Points of agreement at depth 1 relative to the head at Q8_0: value and 95 % interval. The trunk stays Q8_0."""
    folder = tmp_path_factory.mktemp("claim")
    q8_0, mixture, blind, seeing = (folder / f"{name}.gguf" for name in ("q8_0", "mixture", "blind", "seeing"))
    quantize = ("quantize", testbed, "--policy", "draft-head-only")
    run_apex(*quantize, "--set", "draft_head=Q8_0", "--imatrix", calibrated, "-o", q8_0)
    run_apex(*quantize, *MIXTURE, "--imatrix", calibrated, "-o", mixture)
    run_apex(*quantize, "--set", "draft_head=Q2_K", "--imatrix", calibrated, "-o", seeing)
    run_apex(*quantize, "--set", "draft_head=Q2_K", "--imatrix", headless_imatrix, "--allow-uncalibrated", "-o", blind)
    texts = [word for path in sorted(heldout.glob("*.txt")) for word in ("--text", path)]
    ran = run_apex(
        "evaluate", mixture, blind, seeing, "--reference", q8_0, "--only", "draft-head", *texts,
        "--set", "draft-head.depth=1",
        "--set", f"draft-head.chunks={CHUNKS}", "--threads", 1, "--results", folder / "results.jsonl", "--json",
    )  # fmt: skip
    found = {}
    for row in json.loads(ran.stdout):
        (figure,) = (f for f in row["figures"] if f["name"] == "depth1.agreement.difference" and not f["domain"])
        assert figure["n"] == 4 * CHUNKS * 255
        found[row["file"]] = (figure["value"], figure["low"], figure["high"])
    return found


def test_experts_of_three_bits_keep_the_agreement(loss: dict[str, tuple[float, float, float]]) -> None:
    value, low, _ = loss["mixture.gguf"]
    assert value > -1.5 and low > -2.5


def test_a_k_quant_without_data_is_ruined_and_one_with_data_is_not(loss: dict[str, tuple[float, float, float]]) -> None:
    """On more text: -17.5 [-18.6, -16.3] without, -5.6 [-6.2, -4.9] with data."""
    assert loss["blind.gguf"][2] < -10
    assert loss["seeing.gguf"][1] > loss["blind.gguf"][2] + 5


def test_without_the_heads_data_the_mixture_is_refused(
    tools: Toolset, testbed: Path, headless_imatrix: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    command = ("quantize", testbed, "--policy", "draft-head-only", *MIXTURE, "--imatrix", headless_imatrix, "-o", out)
    ran = run_apex(*command, "--allow-uncalibrated", code=DataMissing.exit_code)
    assert "of the draft head -> IQ3_XXS" in ran.stderr and not out.exists()
