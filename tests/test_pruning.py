"""`apex cache`: what it shows, what it removes, and what always stays."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from apex_runs import run_apex
from gates import ended_at_gate, gated

from apex_build import pruning
from apex_build.native.toolset import Toolset
from apex_build.places import in_use
from apex_build.storage.json_files import write_json
from apex_build.storage.locks import locked
from apex_build.storage.outputs import work_folder

BUILD, OTHER, CPU = "a" * 32, "b" * 32, "c" * 32


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one or two items of each kind, 1 to 9 MB, last used this many days ago."""
    root = tmp_path / "cache"
    monkeypatch.setenv("APEX_CACHE_DIR", str(root))
    for name, megabytes, days in (
        (f"builds/{BUILD}/manifest.json", 1, 90), (f"builds/{OTHER}/manifest.json", 2, 40),
        (f"builds/{CPU}/manifest.json", 1, 95),
        ("work/0123/build.ninja", 3, 10), ("toolchains/cuda-13/nvcc", 4, 50), ("envs/convert-1/pyvenv.cfg", 5, 60),
        ("evaluation/one/reference.logits", 9, 35), ("evaluation/two/draft-head.npz", 1, 2),
        ("downloads/ff/llama.tar.gz", 2, 20),
        ("sccache/a", 1, 3), ("locks/x.lock", 0, 99),
    ):  # fmt: skip
        file = root / name
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(megabytes * 1_000_000))
        when = time.time() - days * 86400
        for path in (file, file.parent):
            os.utime(path, (when, when))
    write_json(root / "builds" / "current-cuda.json", {"key": BUILD, "pin": "pr-22673", "at": 2})
    write_json(root / "builds" / "current-cpu.json", {"key": CPU, "pin": "pr-22673", "at": 1})
    return root


def prune(*options: object) -> dict[str, Any]:
    said = json.loads(run_apex("cache", "prune", *options, "--json").stdout)
    return {Path(item["path"]).name: item for item in said["removed"]} | {
        "kept": {Path(i["path"]).name: i for i in said["kept"]}
    }


def test_what_there_is(cache: Path) -> None:
    said = json.loads(run_apex("cache", "list", "--json").stdout)
    assert said["cache"] == str(cache)
    of = {Path(item["path"]).name: item for item in said["items"] if item["kind"] != "sources"}
    assert of.keys() == {BUILD, OTHER, CPU, "0123", "cuda-13", "convert-1", "one", "two", "ff", "sccache"}
    assert of["one"]["kind"] == "evaluations" and 9_000_000 <= of["one"]["n_bytes"] < 9_100_000
    assert abs(time.time() - of["one"]["used"] - 35 * 86400) < 3600
    assert of[BUILD]["kept"] == of[CPU]["kept"] == "the build in use" and not of[OTHER]["kept"]
    shown = run_apex("cache", "list").stdout
    assert re.search(r"evaluations .* 2 .* 10\.\d\d MB .* 2 days ago", shown)
    assert "the build in use" in run_apex("cache", "list", "--kind", "builds").stdout


def test_what_is_old_goes_and_the_build_in_use_stays(cache: Path) -> None:
    dry = prune("--older-than", 30, "--dry-run")
    assert (cache / "builds" / OTHER).exists()
    done = prune("--older-than", 30)
    assert done.keys() == dry.keys() == {OTHER, "cuda-13", "convert-1", "one", "kept"}
    assert done["kept"].keys() == {BUILD, CPU}
    for name in ("builds/" + OTHER, "toolchains/cuda-13", "envs/convert-1", "evaluation/one"):
        assert not (cache / name).exists()
    for name in ("builds/" + BUILD, "work/0123", "evaluation/two", "downloads/ff", "sccache", "locks/x.lock"):
        assert (cache / name).exists()


def test_by_size_and_kind(cache: Path) -> None:
    assert prune("--larger-than", "3.5MB", "--dry-run").keys() == {"cuda-13", "convert-1", "one", "kept"}
    assert prune("--kind", "evaluations", "--keep-size", "5 MB", "--dry-run").keys() == {"one", "kept"}
    assert prune("--kind", "work", "--kind", "downloads").keys() == {"0123", "ff", "kept"}
    whole = sum(item.n_bytes for item in pruning.items([kind for kind in pruning.KINDS if kind != "sources"]))
    assert prune("--keep-size", whole, "--dry-run").keys() == {"kept"}
    assert prune("--keep-size", whole - 1, "--dry-run").keys() == {"convert-1", "kept"}, (
        "the longest unused that may be removed"
    )
    assert "say what to remove" in run_apex("cache", "prune", code=2).stderr
    assert "is not a size" in run_apex("cache", "prune", "--larger-than", "much", code=2).stderr


def test_what_is_used_meanwhile_stays(cache: Path) -> None:
    program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)", f"--build={cache}/work/0123/x"])
    try:
        assert prune("--kind", "work")["kept"]["0123"]["kept"] == "in use by a running program"
    finally:
        program.kill()
        program.wait()
    with in_use(cache / "evaluation"):
        kept = prune("--kind", "evaluations", "--older-than", 30)["kept"]
        assert kept["one"]["kept"] == "in use by another run of apex" and (cache / "evaluation" / "one").exists()
    sweep = cache / "cluster" / "sweeps" / "0f"
    with in_use(sweep):
        assert prune("--kind", "cluster-sweeps")["kept"]["0f"]["kept"] == "in use by another run of apex"
    assert "0f" in prune("--kind", "cluster-sweeps") and not sweep.exists()
    (cache / "downloads" / "ff" / ".x.part").write_text("half")
    (cache / "downloads" / "ff" / "x.part").write_text("half")
    assert prune("--kind", "downloads")["kept"]["ff"]["kept"] == "being downloaded"
    with locked(cache / "envs" / "convert-1"):
        assert prune("--kind", "environments")["kept"]["convert-1"]["kept"] == "in use by another run of apex"
    assert "convert-1" in prune("--kind", "environments") and not list((cache / "envs").glob("*convert*"))


def test_calibrations_that_did_not_end(
    tools: Toolset, testbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APEX_TOOLS", str(tools.root))
    monkeypatch.setenv("APEX_CACHE_DIR", str(tmp_path / "cache"))
    out = tmp_path / "i.gguf"
    with gated(tools, tmp_path / "gate", "llama-imatrix", having="--save-frequency") as gate:
        ended_at_gate(gate, ["calibrate", testbed, "-o", out, "--threads", 1], signal.SIGKILL)
    (found,) = json.loads(run_apex("cache", "list", "--kind", "calibrations", "--json").stdout)["items"]
    assert found["path"] == str(work_folder(out)) and found["n_bytes"] > 10_000
    with locked(out):
        assert "in use by another run" in prune("--kind", "calibrations")["kept"][".i.gguf.work"]["kept"]
    assert ".i.gguf.work" in prune("--kind", "calibrations")
    assert not list(tmp_path.glob(".i*")) and not list((tmp_path / "cache" / "calibrations").iterdir())
    run_apex("calibrate", testbed, "-o", out, "--chunks", 2)
    assert not list((tmp_path / "cache" / "calibrations").iterdir())
