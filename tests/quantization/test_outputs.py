"""Where a quantized file goes: existing files, concurrent runs, and files that must not be touched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from apex_runs import SMALL, ended_at, run_apex

from apex_build.errors import DiskTooSmall, OutputUnwritable
from apex_build.gguf_model.header import read_header
from apex_build.gguf_model.model import read_model
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins
from apex_build.quantization.run import check_outputs, prepare
from apex_build.storage.locks import locked
from apex_build.storage.outputs import check_apart, check_place, with_manifest_and_log


def compact(testbed: Path, out: Path, *more: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    return run_apex("quantize", testbed, "--policy", "compact", *SMALL, "-o", out, *more, code=code)


def test_an_output_that_was_deleted_or_damaged_is_made_again(testbed: Path, tmp_path: Path, tools: Toolset) -> None:
    out = tmp_path / "x.gguf"
    compact(testbed, out)
    whole = out.read_bytes()
    out.unlink()
    compact(testbed, out)
    assert out.read_bytes() == whole
    out.write_bytes(whole[: len(whole) // 2])
    assert "exists" in compact(testbed, out, code=71).stderr
    compact(testbed, out, "--force")
    assert out.read_bytes() == whole


def test_an_input_is_never_overwritten(testbed: Path, calibrated: Path, tmp_path: Path, tools: Toolset) -> None:
    imatrix = tmp_path / "imatrix.gguf"
    imatrix.write_bytes(calibrated.read_bytes())
    ran = run_apex("quantize", testbed, "--policy", "i-nano", "--imatrix", imatrix, "-o", imatrix, "--force", code=71)
    assert "is the input itself" in ran.stderr and imatrix.read_bytes() == calibrated.read_bytes()


def test_places_that_cannot_be_written_in_the_end(tmp_path: Path) -> None:
    (tmp_path / "x.log").write_text("the user's")
    for out, said in (
        (tmp_path, "is a folder"),
        (tmp_path / "gone" / "x", "no such folder"),
        (tmp_path / ("a" * 240), "name is too long"),
        (Path(os.devnull), "not a regular file"),
    ):
        with pytest.raises(OutputUnwritable, match=said):
            check_place(out)
    with pytest.raises(OutputUnwritable, match=r"x\.log is the input itself"):
        check_apart(with_manifest_and_log(tmp_path / "x"), [tmp_path / "x.log"])


def test_what_the_last_of_several_files_would_meet_is_said_before_the_first(
    testbed: Path, tmp_path: Path, tools: Toolset, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = run_apex("quantize", testbed, "--policy", "compact", *SMALL, "-o", tmp_path, "--dry-run", "--json")
    (name,) = [Path(job["path"]).name for job in json.loads(planned.stdout)]
    (tmp_path / name).write_text("another")
    for more in ([], ["--dry-run"]):
        ran = run_apex(
            "quantize", testbed, "--policy", "quality", "--policy", "compact", *SMALL, "-o", tmp_path, *more, code=71
        )
        assert f"{name} exists" in ran.stderr
    assert len(list(tmp_path.iterdir())) == 1

    plugins = load_plugins()
    model = read_model(testbed, plugins.role_of)
    jobs = [
        prepare(model, plugins.policy(name), {"edge": 1, "near": 1, "attention_edge": 1}, tools, tmp_path / name)
        for name in ("quality", "compact")
    ]
    room = jobs[0].n_bytes + (64 << 20) + 1000
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: type("Usage", (), {"free": room}))
    check_outputs(jobs[:1])
    with pytest.raises(DiskTooSmall, match=r"compact takes .* after .* of other files"):
        check_outputs(jobs)


def test_another_run_at_work_on_the_same_output(testbed: Path, tmp_path: Path, tools: Toolset) -> None:
    with locked(tmp_path / "x.gguf"):
        assert "is being written by another run" in compact(testbed, tmp_path / "x.gguf", code=71).stderr
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_not_written_through(testbed: Path, tmp_path: Path, tools: Toolset) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".x.gguf.part").symlink_to(tmp_path / "precious")
    compact(testbed, tmp_path / "x.gguf")
    assert (tmp_path / "precious").read_text() == "mine" and not (tmp_path / "x.gguf").is_symlink()


def test_a_part_that_a_killed_run_left_is_removed_and_nothing_else(
    testbed: Path, tmp_path: Path, tools: Toolset
) -> None:
    """It may have many GB. A part file of another output belongs to another run."""
    for name in (".x.gguf.abcd_123.part", ".y.gguf.abcd_123.part", ".x.gguf.mine.part", ".x.gguf.more.abcd_123.part"):
        (tmp_path / name).write_text("half")
    compact(testbed, tmp_path / "x.gguf")
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert left == {".y.gguf.abcd_123.part", ".x.gguf.mine.part", ".x.gguf.more.abcd_123.part"}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_run_ended_while_the_file_is_verified_leaves_nothing(
    how: signal.Signals, testbed: Path, tmp_path: Path, tools: Toolset
) -> None:
    verifying = ("apex_build.quantization.verify", "validator")
    ended_at(verifying, 1, how, "quantize", testbed, "--policy", "compact", *SMALL, "-o", tmp_path / "x.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"x.gguf.log"}


def test_a_split_model(testbed: Path, tmp_path: Path, tools: Toolset) -> None:
    split = [tools.tool("llama-gguf-split"), "--split", "--split-max-tensors", "60", testbed, tmp_path / "model"]
    subprocess.run([str(part) for part in split], check=True, capture_output=True)
    run_apex("quantize", tmp_path / "model-00002-of-00003.gguf", "--policy", "compact", *SMALL)
    compact(testbed, tmp_path / "whole.gguf")
    (by_default,) = tmp_path.glob("model-*COMPACT*.gguf")
    written, whole = read_header(by_default), read_header(tmp_path / "whole.gguf")
    assert {(t.name, t.type) for t in written.tensors} == {(t.name, t.type) for t in whole.tensors}
    before = (tmp_path / "model-00003-of-00003.gguf").read_bytes()
    compact(tmp_path / "model-00001-of-00003.gguf", tmp_path / "model-00003-of-00003.gguf", "--force", code=71)
    assert (tmp_path / "model-00003-of-00003.gguf").read_bytes() == before


def test_experts_without_tokens_are_told_in_one_line(
    testbed: Path, calibrated: Path, tmp_path: Path, tools: Toolset
) -> None:
    partial = tmp_path / "partial.gguf"
    partial.write_bytes(calibrated.read_bytes())
    header = read_header(partial)
    for tensor in header.tensors:
        if "ffn_up_exps" in tensor.name:
            row = tensor.n_bytes // 4 // 8
            at = header.data_offset + tensor.offset
            np.memmap(partial, dtype="<f4", mode="r+", offset=at, shape=(8, row))[2:4] = 0
    ran = run_apex(
        "quantize",
        testbed,
        "--policy",
        "i-nano",
        *SMALL,
        "--imatrix",
        partial,
        "-o",
        tmp_path / "x.gguf",
        "--dry-run",
        "--json",
    )
    ((disagreeing, warning),) = [job["warnings"] for job in json.loads(ran.stdout)]
    assert "tokens, other weights of its layer 12288" in disagreeing
    assert warning.startswith(
        "7 tensors have experts that saw no calibration token: blk.0.ffn_up_exps.weight has most, 2 of 8"
    )


def test_an_imatrix_of_the_old_format(testbed: Path, heldout: Path, tmp_path: Path, tools: Toolset) -> None:
    command = [
        tools.tool("llama-imatrix"),
        "--model",
        testbed,
        "--file",
        heldout / "chat.txt",
        "--output-format",
        "dat",
        "--mtp",
    ]
    command += ["--output", tmp_path / "old.dat", "--chunks", "8", "--ctx-size", "512", "--batch-size", "512"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    out = tmp_path / "x.gguf"
    common = ["quantize", testbed, "--policy", "i-nano", *SMALL, "--imatrix", tmp_path / "old.dat", "-o", out]
    ran = run_apex(*common, "--set", "draft_head=IQ2_XXS", code=45)  # it cannot tell of which hidden rows its data is
    assert "old.dat: the data of the draft head (blk.6.nextn.eh_proj.weight -> IQ2_XXS) does not name" in ran.stderr
    run_apex(*common, "--set", "draft_head=Q8_0")
    assert read_header(out).metadata["quantize.imatrix.file"] == "old.dat"


def test_what_the_machine_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import errno

    from apex_build import cli

    def refuse(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "the-file")

    monkeypatch.setattr(cli.apex, "main", refuse)
    with pytest.raises(SystemExit) as ended:
        cli.main(["quantize"])
    assert ended.value.code == 70 and capsys.readouterr().err == "error: the-file: No space left on device\n"
    with pytest.raises(SystemExit) as ended:
        cli.main(["quantize", os.fsdecode(b"bad\xff.gguf")])
    assert ended.value.code == 2 and "not UTF-8" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from apex_build import places

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("APEX_CACHE_DIR", "cache")
    assert places.cache_root() == tmp_path / "cache", "tools run in other folders"
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OutputUnwritable, match="the cache cannot be written") as caught:
        places.cache_folder("evaluation")
    assert "APEX_CACHE_DIR" in str(caught.value.hint)
