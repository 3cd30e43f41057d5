"""`apex calibrate` with the real tool on the real model."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from apex_runs import run_apex
from children import alive
from gguf_edit import without_head
from snapshots import stopped_at

from apex_build.gguf_model.imatrix import read_imatrix
from apex_build.native.toolset import Toolset

pytestmark = pytest.mark.usefixtures("tools")  # every test here runs llama-imatrix


def test_the_whole_model_is_calibrated(calibrated: Path) -> None:
    found = read_imatrix(calibrated)
    assert found.head_tokens == 24 * 512 and found.datasets == ("default.txt",)
    manifest = json.loads(calibrated.with_name(calibrated.name + ".json").read_text())
    assert {part["domain"] for part in manifest["text"]["parts"]} == {"chat", "reasoning", "tool-calling", "code"}
    assert manifest["from"]["settings"]["head"] is True
    assert not list(calibrated.parent.glob(".*")), "nothing is left of the work"
    assert "llama-imatrix" in calibrated.with_name(calibrated.name + ".log").read_text()


def test_the_same_work_is_not_done_twice(calibrated: Path, testbed: Path) -> None:
    before = calibrated.stat().st_mtime_ns
    ran = run_apex("calibrate", testbed, "-o", calibrated, "--chunks", 24, "--json")
    assert json.loads(ran.stdout)["reused"] is True and calibrated.stat().st_mtime_ns == before


def test_another_work_does_not_replace_a_file(calibrated: Path, testbed: Path) -> None:
    before = calibrated.read_bytes()
    ran = run_apex("calibrate", testbed, "-o", calibrated, "--chunks", 23, code=71)
    assert "exists and was made from something else" in ran.stderr and "--force" in ran.stderr
    assert calibrated.read_bytes() == before


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_without_recounting(
    how: signal.Signals, tools: Toolset, calibrated: Path, testbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "größe mit leer.imatrix.gguf"
    work = tmp_path / f".{out.name}.work"
    with stopped_at(20, tools, out, "calibrate", testbed, "-o", out, "--chunks", 24, "--threads", 1) as (child, tool):
        assert alive(tool)
        child.send_signal(how)
        _, said = child.communicate(timeout=60)
        assert child.returncode in (130, 143, -signal.SIGTERM), said
        assert "Traceback" not in said
        assert not out.exists() and list(work.glob("*.at_10"))
        assert not alive(tool), "the tool ended with us"

    ran = run_apex("calibrate", testbed, "-o", out, "--chunks", 24, "--threads", 1, "--json")
    assert json.loads(ran.stdout)["resumed_at"] == 10
    resumed, whole = read_imatrix(out), read_imatrix(calibrated)
    assert resumed.chunk_count == whole.chunk_count == 24 and resumed.head_tokens == whole.head_tokens
    assert set(resumed.entries) == set(whole.entries)
    for name, entry in whole.entries.items():
        assert resumed.entries[name].counts == entry.counts
        assert np.allclose(resumed.entries[name].values(), entry.values(), rtol=1e-3, atol=1e-6 * entry.values().max())
    assert not work.exists()


def test_a_snapshot_cut_short_is_not_gone_on_from(tools: Toolset, testbed: Path, tmp_path: Path, heldout: Path) -> None:
    from apex_build.calibration.run import _snapshot

    (tmp_path / "total.json").write_text("40")
    run_apex("calibrate", testbed, "-o", tmp_path / "ten.gguf", "--chunks", 10, "--text", heldout / "chat.txt")
    whole = (tmp_path / "ten.gguf").read_bytes()
    (tmp_path / "imatrix.gguf.at_10").write_bytes(whole)
    (tmp_path / "imatrix.gguf.at_20").write_bytes(whole[: len(whole) // 2])
    assert _snapshot(tmp_path) == (tmp_path / "imatrix.gguf.at_10", 10)
    assert not (tmp_path / "imatrix.gguf.at_20").exists()


def test_a_text_that_is_too_short(testbed: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("only a few words")
    ran = run_apex("calibrate", testbed, "--text", tmp_path / "short.txt", "-o", tmp_path / "out.gguf", code=50)
    assert "16 bytes" in ran.stderr and "at least 2 chunks of 512 tokens" in ran.stderr
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("name", ["identity.json", "imatrix.gguf", "--foo"])
def test_a_text_may_have_any_name(name: str, testbed: Path, tmp_path: Path, heldout: Path) -> None:
    (tmp_path / name).write_bytes((heldout / "chat.txt").read_bytes())
    run_apex("calibrate", testbed, "-o", "out.gguf", "--chunks", 3, "--text", name, cwd=tmp_path)
    assert read_imatrix(tmp_path / "out.gguf").datasets == (name,)
    assert (tmp_path / name).read_bytes() == (heldout / "chat.txt").read_bytes()


def test_an_input_is_never_overwritten(testbed: Path, tmp_path: Path) -> None:
    model, text = tmp_path / "model.gguf", tmp_path / "notes.log"
    model.write_bytes(testbed.read_bytes())
    text.write_text("mine")
    for more in (["-o", model], ["-o", tmp_path / "notes", "--text", text], ["--write-text", model], ["-o", tmp_path]):
        run_apex("calibrate", model, "--force", *more, code=71)
    assert model.read_bytes() == testbed.read_bytes() and text.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "notes.log"}


def test_a_run_ended_between_its_last_steps_is_finished(
    tools: Toolset, testbed: Path, tmp_path: Path, heldout: Path
) -> None:
    """The manifest is written first: a file without one could only be replaced with --force."""
    out, work = tmp_path / "out.gguf", tmp_path / ".out.gguf.work"
    common = ["calibrate", testbed, "-o", out, "--chunks", 3, "--text", heldout / "chat.txt", "--json"]
    run_apex(*common)
    work.mkdir()
    assert json.loads(run_apex(*common).stdout)["reused"] is True and not work.exists()
    out.unlink()
    assert json.loads(run_apex(*common).stdout)["reused"] is False and out.exists()


def test_a_model_without_a_head(testbed: Path, tmp_path: Path, heldout: Path) -> None:
    model = without_head(testbed, tmp_path / "headless.gguf")
    ran = run_apex("calibrate", model, "-o", tmp_path / "out.gguf", "--chunks", 3, "--text", heldout / "chat.txt")
    assert "the model has no draft head" in ran.stderr
    assert read_imatrix(tmp_path / "out.gguf").head_tokens is None


def test_the_dry_run_writes_nothing(testbed: Path, tmp_path: Path) -> None:
    ran = run_apex("calibrate", testbed, "-o", tmp_path / "out.gguf", "--dry-run", "--json")
    planned = json.loads(ran.stdout)
    assert "--mtp" in planned["command"] and "--parse-special" in planned["command"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["gone.gguf"], 40, "gone.gguf"),
        (["{testbed}", "-o", "no/such/folder/x.gguf"], 71, "no such folder"),
        (["{testbed}", "--calibration-set", "nothing"], 50, "no calibration set 'nothing'"),
        (["{testbed}", "--text", "gone.txt"], 50, "gone.txt"),
        (["{testbed}", "--chunks", "1"], 2, "not in the range"),
        (["{testbed}", "--context", "1000"], 2, "not a multiple of 16"),
        (["{testbed}", "-o", "{tmp}/x.gguf", "--chunks", "3", "--tool-argument=--no-such-thing"], 30, "no-such-thing"),
    ],
)
def test_bad_input(arguments: list[str], code: int, said: str, testbed: Path, tmp_path: Path) -> None:
    filled = [part.format(testbed=testbed, tmp=tmp_path) for part in arguments]
    ran = run_apex("calibrate", *filled, code=code, cwd=tmp_path)
    assert said in ran.stderr
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(testbed: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "cannot be written" in run_apex("calibrate", testbed, "-o", tmp_path / "x.gguf", code=71).stderr
    finally:
        tmp_path.chmod(0o700)
