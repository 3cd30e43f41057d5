"""How long work will take: remembered by kind, and by what it ran on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apex_build.evaluation import pace
from apex_build.native.devices import gpus_used
from apex_build.native.toolset import Toolset

WORK = 3e12  # tokens times parameters


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("APEX_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_nothing_is_known_at_first() -> None:
    here, there = pace.expect("probes", WORK), pace.expect("probes", WORK, gpu="NVIDIA H200")
    assert not here.measured and not there.measured and there.seconds < here.seconds


def test_a_gpu_and_the_cpu_do_not_predict_each_other() -> None:
    pace.remember("probes", WORK, 600.0)
    assert pace.expect("probes", WORK).seconds == pytest.approx(600)
    assert not pace.expect("probes", WORK, gpu="NVIDIA H200").measured
    pace.remember("probes", WORK, 30.0, gpu="NVIDIA H200")
    assert pace.expect("probes", 2 * WORK, gpu="NVIDIA H200").seconds == pytest.approx(60)
    assert pace.expect("probes", WORK).seconds == pytest.approx(600)
    assert not pace.expect("probes", WORK, gpu="2 x NVIDIA H200").measured


def test_a_spoilt_record_is_a_missing_one(empty_cache: Path) -> None:
    for content in ("", "[1]", "{", json.dumps({"probes": "fast"})):
        (empty_cache / "pace.json").write_text(content)
        assert not pace.expect("probes", WORK).measured


def test_a_cpu_build_uses_no_gpu(tools: Toolset) -> None:
    if tools.manifest["backend"] == "cpu":
        assert gpus_used(tools) == ""
    assert gpus_used(tools, layers=0) == ""
