"""apex fit on the testbed, end to end: interrupted in each part, resumed, and its check."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path

import pytest
from apex_runs import ended_at, run_apex
from gates import gated, make_endless, started
from waiting import until

from apex_build.gguf_model.model import read_model
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins

pytestmark = [pytest.mark.usefixtures("tools"), pytest.mark.slow]


def scored(cache: Path, count: int) -> bool:
    """Whether so many scores are kept, without those of `make_endless`."""
    texts = [path.read_text() for path in cache.glob("evaluation/*/probes-*.tsv")]
    found = [line for text in texts for line in text.splitlines(keepends=True)[1:] if line.endswith("\n")]
    return sum(not line.startswith("more-") for line in found) == count


@pytest.fixture
def arguments(testbed: Path, calibrated: Path, heldout: Path) -> list[str]:
    few = ["--types", "Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,Q8_0", "--chunks", "2", "--check-chunks", "8", "--sample", "131072"]
    return [
        "fit",
        str(testbed),
        "--imatrix",
        str(calibrated),
        "--text",
        str(heldout / "chat.txt"),
        *few,
        "--threads",
        "1",
    ]


def test_it_is_resumed_in_each_part_and_says_what_it_gave(
    arguments: list[str], tools: Toolset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"  # in which nothing is measured
    monkeypatch.setenv("APEX_TOOLS", str(tools.root))
    monkeypatch.setenv("APEX_CACHE_DIR", str(cache))
    out = tmp_path / "fit.gguf"
    wanted = [*arguments, "--target-size", "8MiB", "-o", str(out)]
    kept = 0
    for how in (signal.SIGINT, signal.SIGKILL):
        ended_at(("apex_build.native.tensor_data", "Codec.encode"), 40, how, *wanted)
        (errors,) = cache.glob("fit/*/errors.jsonl")
        before, kept = kept, errors.stat().st_size
        assert kept > before
        assert json.loads(run_apex(*wanted, "--dry-run", "--json").stdout)["errors"], "ended before all was measured"
    with gated(tools, tmp_path / "gate", "llama-perplexity", having="--kl-divergence-probes") as gate:
        for number, how in enumerate((signal.SIGKILL, signal.SIGINT), 1):
            with started(gate, wanted) as child:
                make_endless(until(gate.waiting, child)[0], first=2)
                gate.let(1)
                until(partial(scored, cache, 4 * number), child)  # 2 probes of 2 chunks
                child.send_signal(how)
                child.communicate(timeout=60)
            assert child.returncode == (130 if how == signal.SIGINT else -how)
    assert errors.stat().st_size >= kept and not out.exists()
    planned = json.loads(run_apex(*wanted, "--dry-run", "--json").stdout)
    assert planned["errors"] == "" and planned["targets"] == [8 << 20] and planned["smallest"] < 8 << 20
    assert planned["probing"]
    found = json.loads(run_apex(*wanted, "--json").stdout)
    (row,), (tier,) = found["rows"], found["tiers"]
    assert 0.998 * (8 << 20) <= row["n_bytes"] == out.stat().st_size <= 8 << 20
    assert 0.4 < row["predicted"] / row["measured"] < 2.5 and row["low"] < row["measured"] < row["high"]
    assert tier["measured"] > row["measured"]
    assert any("its weights alone: KLD 0.0" in line for line in found["file"]["lines"])
    assert any("points of agreement, predicted" in line for line in found["file"]["lines"])
    assert read_model(out, load_plugins().role_of).metadata["apex.policy"] == "fit"
    again = json.loads(run_apex(*wanted, "--json").stdout)
    assert again["file"]["reused"] and again["rows"] == found["rows"]
    measurement = found["measurement"]
    shown = run_apex(
        "plan", arguments[1], "--policy", "fit", "--set", f"measurement={measurement}", "--set", "target_bpw=3"
    )
    assert "predicted: kld.mean" in shown.stdout


def test_what_is_refused_before_anything_is_measured(
    arguments: list[str], testbed: Path, calibrated: Path, tmp_path: Path
) -> None:
    out = ["-o", tmp_path / "x.gguf"]
    assert "the smallest has" in run_apex(*arguments, "--target-size", "1MiB", *out, code=68).stderr
    assert "the largest has" in run_apex(*arguments, "--target-bpw", "40", *out, code=68).stderr
    short = tmp_path / "short.txt"
    short.write_text("a few words\n" * 20, "utf-8")
    given = ["fit", testbed, "--imatrix", calibrated, "--target-bpw", "4", *out]
    assert "text too short for the probes" in run_apex(*given, "--text", short, code=50).stderr
    assert "cannot hold" in run_apex(*arguments, "--gpu", "rtx5060", "--context", "90000000", *out, code=68).stderr
    assert "there is no GPU" in run_apex(*arguments, "--gpu", "rtx0", *out, code=25).stderr
    run_apex(*arguments, *out, code=2)
    run_apex(*arguments, "--target-size", "8MiB", "--target-bpw", "3", *out, code=2)
    (tmp_path / "bad.json").write_text('{"schema": 1, "kind": "fit-meas', "utf-8")
    bad = ["--measurement", tmp_path / "bad.json"]
    assert "cut short" in run_apex(*arguments, "--target-bpw", "4", *bad, *out, code=67).stderr
    assert list(tmp_path.glob("*.gguf*")) == []


def test_what_fits_a_gpu_is_said(arguments: list[str]) -> None:
    ran = run_apex(*arguments, "--gpu", "rtx3080", "--context", "4096", "--dry-run")
    assert "KV cache" in ran.stderr and "compute buffers" in ran.stderr and "left for the file" in ran.stderr
    found = json.loads(run_apex(*arguments, "--gpu", "rtx3080", "--dry-run", "--json").stdout)
    assert found["targets"] == [found["largest"]]  # all of so small a model fits


def test_models_of_other_kinds(calibrated: Path, headless_imatrix: Path, testbed: Path, heldout: Path) -> None:
    """An imatrix without the head leaves the head one type; a dense model has no experts; both are planned."""
    text = ("--text", heldout / "chat.txt", "--dry-run", "--json")
    given = ("--imatrix", headless_imatrix, "--target-bpw", "5")
    headless = json.loads(run_apex("fit", testbed, *given, *text).stdout)
    whole = json.loads(run_apex("fit", testbed, "--imatrix", calibrated, "--target-bpw", "5", *text).stdout)
    assert headless["smallest"] > whole["smallest"]
    dense = testbed.with_name("testbed-dense-f16.gguf")
    found = run_apex("fit", dense, "--imatrix", calibrated, "--target-bpw", "5", *text, code=43)
    assert "belongs to another model" in found.stderr
