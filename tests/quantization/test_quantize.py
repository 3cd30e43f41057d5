"""`apex quantize` with the real tool on the real model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from apex_runs import SMALL, run_apex
from gates import ended_at_gate, gated, started

from apex_build.gguf_model.header import read_header
from apex_build.native.toolset import Toolset


def on_tmpfs(folder: Path, options: str, *arguments: object, code: int) -> subprocess.CompletedProcess[str]:
    """Run `apex` with a small file system mounted on `folder`, in a separate mount namespace."""
    mount = f'mount -t tmpfs -o {options} tmpfs "$0" && exec "$@"'
    prefix = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(folder)]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces on this machine")
    command = [*prefix, sys.executable, "-m", "apex_build", *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert "Traceback" not in ran.stderr and ran.returncode == code, ran.stderr[-2000:]
    return ran


@pytest.fixture(scope="module")
def nano(testbed: Path, calibrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """i-nano with the draft head at IQ2_XXS, at a path with a space and non-ASCII letters."""
    out = tmp_path_factory.mktemp("ein Ordner") / "größe head.gguf"
    run_apex(
        "quantize",
        testbed,
        "--policy",
        "i-nano",
        *SMALL,
        "--set",
        "draft_head=IQ2_XXS",
        "--imatrix",
        calibrated,
        "-o",
        out,
    )
    return out


def test_the_file_is_what_was_planned(nano: Path, testbed: Path, calibrated: Path) -> None:
    planned = json.loads(
        run_apex(
            "plan",
            testbed,
            "--policy",
            "i-nano",
            *SMALL,
            "--set",
            "draft_head=IQ2_XXS",
            "--imatrix",
            calibrated,
            "--json",
        ).stdout
    )
    header = read_header(nano)
    assert {t.name: (t.type, t.n_bytes) for t in header.tensors} == {
        t["name"]: (t["type"], t["n_bytes"]) for t in planned["tensors"]
    }
    assert sum(tensor.n_bytes for tensor in header.tensors) == planned["bytes"]
    assert {t.type for t in header.tensors if t.name.startswith("blk.6.") and t.type != "F32"} == {"IQ2_XXS"}


def test_the_size_is_known_before(nano: Path, testbed: Path, calibrated: Path, tmp_path: Path) -> None:
    same = [
        *SMALL,
        "--set",
        "draft_head=IQ2_XXS",
        "--imatrix",
        calibrated,
        "-o",
        tmp_path / "x.gguf",
        "--dry-run",
        "--json",
    ]
    (job,) = json.loads(run_apex("quantize", testbed, "--policy", "i-nano", *same).stdout)
    assert job["bytes"] == nano.stat().st_size
    assert list(tmp_path.iterdir()) == []


def test_the_file_tells_how_it_was_made(nano: Path, calibrated: Path) -> None:
    metadata = read_header(nano).metadata
    assert metadata["apex.policy"] == "i-nano"
    assert "draft_head=IQ2_XXS" in metadata["apex.parameters"] and "edge=1" in metadata["apex.parameters"]
    assert metadata["quantize.imatrix.file"] == calibrated.name, "a name, not where it lay"
    manifest = json.loads(nano.with_name(nano.name + ".json").read_text())
    assert manifest["from"]["apex.plan"] == metadata["apex.plan"] and len(manifest["tensors"]) == len(
        read_header(nano).tensors
    )


def test_the_same_file_is_not_made_twice_and_another_is_not_replaced(
    nano: Path, testbed: Path, calibrated: Path
) -> None:
    common = [testbed, "--policy", "i-nano", *SMALL, "--imatrix", calibrated, "-o", nano]
    before = nano.stat().st_mtime_ns
    (again,) = json.loads(run_apex("quantize", *common, "--set", "draft_head=IQ2_XXS", "--json").stdout)
    assert again["reused"] is True
    ran = run_apex("quantize", *common, "--set", "draft_head=Q4_K", code=71)
    assert "exists" in ran.stderr and nano.stat().st_mtime_ns == before


def test_several_policies_in_one_call(tools: Toolset, testbed: Path, tmp_path: Path) -> None:
    run_apex("quantize", testbed, "--policy", "quality", "--policy", "compact", *SMALL, "-o", tmp_path)
    names = sorted(re.sub(r"X[A-Z]{4}\.gguf$", "", path.name) for path in tmp_path.glob("*.gguf"))
    assert len(names) == 2 and names[0].endswith("_COMPACT") and names[1].endswith("_QUALITY"), names
    assert not list(tmp_path.glob(".*"))


def test_a_low_bit_head_without_head_data_is_refused(
    testbed: Path, headless_imatrix: Path, tmp_path: Path, tools: Toolset
) -> None:
    common = [testbed, "--policy", "i-nano", *SMALL, "--imatrix", headless_imatrix, "-o", tmp_path / "x.gguf"]
    ran = run_apex("quantize", *common, "--set", "draft_head=IQ2_XXS", code=72)
    assert "blk.6." in ran.stderr and "IQ2_XXS" in ran.stderr and f"apex calibrate {testbed}" in ran.stderr
    ran = run_apex("quantize", *common, code=72)
    assert "would silently be quantized without data" in ran.stderr, "k-quants too: llama-quantize says nothing"
    ran = run_apex("quantize", *common, "--allow-uncalibrated")
    assert "quantized without calibration data" in ran.stderr
    run_apex("quantize", *common[:-1], tmp_path / "y.gguf", "--set", "draft_head=Q8_0")
    assert {path.name for path in tmp_path.glob("*.gguf")} == {"x.gguf", "y.gguf"}


def test_the_stock_tool_refuses_what_we_make(
    headless_imatrix: Path, testbed: Path, tmp_path: Path, tools: Toolset
) -> None:
    """The reason for this project: without data for the head, llama-quantize fails half-way (the stock tool also leaves
    a file with a zeroed header).
    """
    (tmp_path / "rules.txt").write_text(r"^blk\.6\.(nextn\.eh_proj|attn_.|attn_output|ffn_.*)\.weight$=iq2_xxs" + "\n")
    command = [
        tools.tool("llama-quantize"),
        "--imatrix",
        headless_imatrix,
        "--tensor-type-file",
        tmp_path / "rules.txt",
    ]
    command += [testbed, tmp_path / "broken.gguf", "Q4_K_M"]
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert ran.returncode != 0 and "Missing importance matrix for tensor blk.6." in ran.stdout + ran.stderr
    assert not list(tmp_path.glob("broken*"))
    (tmp_path / "broken.gguf").write_bytes(bytes(1 << 20))
    assert "zero" in run_apex("inspect", tmp_path / "broken.gguf", code=41).stderr


def test_an_imatrix_of_another_model(nano: Path, tmp_path: Path, testbed: Path, calibrated: Path) -> None:
    import gguf
    import numpy as np

    other = tmp_path / "other.imatrix.gguf"
    writer = gguf.GGUFWriter(other, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["x"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for layer in range(7):
        for name in ("attn_q", "attn_output", "ffn_gate_shexp"):
            writer.add_tensor(f"blk.{layer}.{name}.weight.in_sum2", np.ones((1, 512), np.float32))
            writer.add_tensor(f"blk.{layer}.{name}.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ran = run_apex("quantize", testbed, "--policy", "i-nano", "--imatrix", other, "-o", tmp_path / "x.gguf", code=43)
    assert "belongs to another model" in ran.stderr and "apex calibrate" in ran.stderr
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        (lambda data: b"", 41, "empty"),
        (lambda data: data[: len(data) // 2], 41, "truncated"),
        (lambda data: bytes(4096) + data[4096:], 41, "zero"),
        (lambda data: b"PK\x03\x04" + data[4:], 41, "not"),
    ],
    ids=["empty", "truncated", "zero header", "not GGUF"],
)
def test_a_damaged_model(
    damage: Callable[[bytes], bytes], code: int, said: str, testbed: Path, tmp_path: Path, tools: Toolset
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(damage(testbed.read_bytes()))
    for verb in (
        ["quantize", broken, "--policy", "compact", "-o", tmp_path / "x.gguf"],
        ["plan", broken, "--policy", "compact"],
    ):
        ran = run_apex(*verb, code=code)
        assert said in ran.stderr and "broken.gguf" in ran.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"broken.gguf"}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["{testbed}", "--policy", "i-nanno"], 60, "i-nano"),
        (["{testbed}", "--policy", "compact", "--set", "draft_hed=Q4_K"], 61, "draft_head"),
        (["{testbed}", "--policy", "compact", "--set", "draft_head=Q4_KK"], 62, "Q4_K"),
        (["{testbed}", "--policy", "i-nano"], 72, "no imatrix was given"),
        (["{testbed}", "--policy", "i-nano", "--imatrix", "gone.gguf"], 42, "gone.gguf"),
        (["gone.gguf", "--policy", "compact"], 40, "gone.gguf"),
        (["{testbed}", "--policy", "compact", "-o", "no/such/folder/x.gguf"], 71, "no such folder"),
        (["{testbed}", "--policy", "compact", "-o", "{testbed}", "--force"], 71, "is the input itself"),
        (["{testbed}", "--policy", "compact", "--policy", "quality", "-o", "one.gguf"], 71, "a folder"),
    ],
)
def test_bad_input(arguments: list[str], code: int, said: str, testbed: Path, tmp_path: Path, tools: Toolset) -> None:
    filled = [part.format(testbed=testbed) for part in arguments]
    size = testbed.stat().st_size
    assert said in run_apex("quantize", *filled, code=code, cwd=tmp_path).stderr
    assert not list(tmp_path.iterdir()) and testbed.stat().st_size == size


def test_a_file_that_is_quantized_already(nano: Path, tmp_path: Path) -> None:
    ran = run_apex("quantize", nano, "--policy", "compact", "-o", tmp_path / "x.gguf", code=74)
    assert "already quantized" in ran.stderr and "--allow-requantize" in ran.stderr
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small(testbed: Path, tmp_path: Path, tools: Toolset) -> None:
    ran = on_tmpfs(tmp_path, "size=4m", "quantize", testbed, "--policy", "compact", "-o", tmp_path / "x.gguf", code=70)
    assert "MB free, expected" in ran.stderr


def test_a_disk_that_fills_up(testbed: Path, tmp_path: Path, tools: Toolset) -> None:
    """The check beforehand knows neither quotas nor concurrent writes: then the run fails and leaves nothing."""
    (tmp_path / "disk").mkdir()
    script = tmp_path / "no_check.py"
    script.write_text(
        "import collections, shutil, sys, os\n"
        "usage = collections.namedtuple('usage', 'total used free')\n"
        "shutil.disk_usage = lambda path: usage(1 << 40, 0, 1 << 40)\n"
        "from apex_build.cli import main\n"
        "try:\n    main(sys.argv[2:])\nfinally:\n    print(os.listdir(sys.argv[1]))\n"
    )
    mount = 'mount -t tmpfs -o size=4m tmpfs "$0" && exec "$@"'
    prefix = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(tmp_path / "disk")]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces on this machine")
    command = [*prefix, sys.executable, script, tmp_path / "disk", "quantize", testbed, "--policy", "compact", "-o"]
    ran = subprocess.run(
        [str(p) for p in [*command, tmp_path / "disk" / "x.gguf"]], capture_output=True, text=True, timeout=3000
    )
    assert ran.returncode in (30, 31, 75), ran.stderr
    assert "Traceback" not in ran.stderr and "x.gguf'" not in ran.stdout and ".part" not in ran.stdout


def test_a_read_only_folder(testbed: Path, tmp_path: Path, tools: Toolset) -> None:
    ran = on_tmpfs(
        tmp_path, "size=64m,ro", "quantize", testbed, "--policy", "compact", "-o", tmp_path / "x.gguf", code=71
    )
    assert "cannot be written" in ran.stderr


@pytest.mark.parametrize("how", ["tool killed", "Ctrl-C"])
def test_a_run_that_is_ended_leaves_what_was_there(how: str, testbed: Path, tmp_path: Path, tools: Toolset) -> None:
    out = tmp_path / "x.gguf"
    out.write_bytes(b"the good old file")
    command = ["quantize", testbed, "--policy", "quality", "-o", out, "--force", "--threads", "1"]
    with gated(tools, tmp_path / "gate", "llama-quantize", having="--override-kv") as gate:
        if how == "Ctrl-C":
            ended_at_gate(gate, command, signal.SIGINT)
        else:
            with started(gate, command) as child:
                (tool,) = gate.next(child, after=0)
                os.kill(tool, signal.SIGKILL)
                _, said = child.communicate(timeout=60)
            assert child.returncode == 31 and "Traceback" not in said, said
    assert out.read_bytes() == b"the good old file"
    assert not list(tmp_path.glob(".*"))


def test_the_memory_that_llama_quantize_may_take(
    testbed: Path, calibrated: Path, tmp_path: Path, tools: Toolset
) -> None:
    """Looked at several times a second: IQ1_M takes many seconds."""
    wanted = ("quantize", testbed, "--policy", "uniform", "--set", "type=IQ1_M", "--imatrix", calibrated)
    more = ("--threads", 1, "-o", tmp_path / "x.gguf", "--no-load-check", "--memory", 0.001)
    said = run_apex(*wanted, *more, code=31).stderr
    assert "llama-quantize took 0." in said and "and was ended" in said and "try:   --memory 1" in said
    assert not (tmp_path / "x.gguf").exists()
