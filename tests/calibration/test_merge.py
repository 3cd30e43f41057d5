"""`apex imatrix merge` and `convert`, compared with llama-imatrix."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
from apex_runs import SMALL, run_apex

from apex_build.gguf_model.imatrix import read_imatrix
from apex_build.native.toolset import Toolset


@pytest.fixture(scope="module")
def halves(tools: Toolset, testbed: Path, heldout: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Imatrices of two texts, both with the draft head."""
    folder = tmp_path_factory.mktemp("halves")
    made = []
    for name in ("chat", "code"):
        made.append(folder / f"{name}.imatrix.gguf")
        run_apex("calibrate", testbed, "--text", heldout / f"{name}.txt", "--chunks", 4, "-o", made[-1])
    return made


def native(tools: Toolset, *arguments: object) -> None:
    """Run llama-imatrix on imatrix files only: it needs the name of a model, but does not open it."""
    command = [str(tools.tool("llama-imatrix")), "--model", "none", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


def test_counts_and_sums_are_added_exactly(halves: list[Path], testbed: Path, tools: Toolset, tmp_path: Path) -> None:
    out, theirs = tmp_path / "both.imatrix.gguf", tmp_path / "native.gguf"
    ran = run_apex("imatrix", "merge", *halves, "-o", out)
    merged, parts = read_imatrix(out), [read_imatrix(path) for path in halves]
    native(tools, "--in-file", f"{halves[0]},{halves[1]}", "-o", theirs, "-c", 512)
    by_tool = read_imatrix(theirs)
    assert set(merged.entries) == set(by_tool.entries)
    for name, entry in merged.entries.items():
        assert entry.counts == tuple(map(sum, zip(*(part.entries[name].counts for part in parts), strict=True)))
        exact = np.sum([part.entries[name].values().astype(np.float64) for part in parts], axis=0)
        assert np.array_equal(entry.values(), exact.astype(np.float32))
        assert entry.counts == by_tool.entries[name].counts
        np.testing.assert_allclose(entry.values(), by_tool.entries[name].values(), rtol=2e-7)
    assert merged.head_tokens == sum(part.head_tokens or 0 for part in parts) and merged.head_tokens
    assert (merged.chunk_count, merged.chunk_size, merged.datasets) == (8, 512, ("chat.txt", "code.txt"))
    assert f"over {merged.head_tokens}" in ran.stdout and "chat.txt, code.txt" in ran.stdout
    assert json.loads((tmp_path / "both.imatrix.gguf.json").read_text())["head_tokens"] == merged.head_tokens
    assert "calibrated over" in run_apex("inspect", out, "--model", testbed).stdout
    quantized = ["quantize", testbed, "--policy", "i-nano", *SMALL, "--set", "draft_head=IQ2_XXS", "--imatrix", out]
    run_apex(*quantized, "-o", tmp_path / "x.gguf")


def test_to_the_older_format_and_back(halves: list[Path], testbed: Path, tools: Toolset, tmp_path: Path) -> None:
    dat, theirs, back = tmp_path / "x.dat", tmp_path / "native.dat", tmp_path / "back.gguf"
    ran = run_apex("imatrix", "convert", halves[0], "-o", dat)
    assert "does not keep each expert's own count" in ran.stderr and "the draft head was run over" in ran.stderr
    native(tools, "--in-file", halves[0], "--output-format", "dat", "-o", theirs, "-c", 512)
    assert dat.read_bytes() == theirs.read_bytes(), "as llama-imatrix writes it"
    run_apex("imatrix", "convert", dat, "-o", back)
    native(tools, "--in-file", dat, "-o", tmp_path / "native-back.gguf", "-c", 512)
    ours, by_tool = read_imatrix(back), read_imatrix(tmp_path / "native-back.gguf")
    assert ours.chunk_count == by_tool.chunk_count
    for name, entry in ours.entries.items():
        assert entry.counts == by_tool.entries[name].counts
        assert np.array_equal(entry.values(), by_tool.entries[name].values())
    head = ["--set", "draft_head=Q8_0"]  # of which rows the head's data is, the format does not keep
    run_apex(
        "quantize",
        testbed,
        "--policy",
        "i-nano",
        *SMALL,
        *head,
        "--imatrix",
        back,
        "-o",
        tmp_path / "x.gguf",
        "--dry-run",
    )
    run_apex("imatrix", "merge", dat, theirs, "-o", tmp_path / "two.gguf")
    assert read_imatrix(tmp_path / "two.gguf").chunk_count == 2 * (ours.chunk_count or 0)


def edited(path: Path, out: Path, rename: str = "", **keys: str) -> Path:
    """A copy with renamed tensors and additional keys."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["x"])
    for name in ("imatrix.chunk_count", "imatrix.chunk_size"):
        writer.add_uint32(name, reader.fields[name].contents())
    writer.add_uint64("imatrix.mtp_token_count", reader.fields["imatrix.mtp_token_count"].contents())
    for key, value in keys.items():
        writer.add_string(f"imatrix.{key}", value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name.replace("blk.", rename or "blk."), np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_what_does_not_belong_together(halves: list[Path], tools: Toolset, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    other = edited(halves[0], tmp_path / "other.gguf", rename="blk.1")
    assert "belongs to another model" in run_apex("imatrix", "merge", halves[0], other, "-o", out, code=43).stderr
    pre, post = (edited(halves[0], tmp_path / f"{rows}.gguf", mtp_hidden=rows) for rows in ("pre_norm", "post_norm"))
    ran = run_apex("imatrix", "merge", pre, post, "-o", out, code=43)
    assert "imatrix.mtp_hidden" in ran.stderr and "pre_norm" in ran.stderr and "post_norm" in ran.stderr
    run_apex("imatrix", "convert", halves[0], "-o", tmp_path / "x.dat")
    ran = run_apex("imatrix", "merge", halves[1], tmp_path / "x.dat", "-o", out, code=43)
    assert "does not tell experts apart" in ran.stderr
    run_apex("imatrix", "convert", halves[1], "-o", tmp_path / "y.dat")
    ran = run_apex("imatrix", "merge", tmp_path / "x.dat", tmp_path / "y.dat", "-o", tmp_path / "both.gguf")
    assert (
        f"note: {tmp_path / 'y.dat'} has data of a draft head: the older format does not say over which hidden rows"
        in ran.stderr
    )
    copy = tmp_path / "copy.imatrix.gguf"
    shutil.copy(halves[0], copy)
    manifest = json.loads(halves[0].with_name(halves[0].name + ".json").read_text())
    manifest["from"]["model"] = "0" * 64
    copy.with_name(copy.name + ".json").write_text(json.dumps(manifest))
    assert "made from different models" in run_apex("imatrix", "merge", halves[1], copy, "-o", out, code=43).stderr
    assert not out.exists()


def test_a_head_in_one_file_alone(
    halves: list[Path], testbed: Path, heldout: Path, tools: Toolset, tmp_path: Path
) -> None:
    trunk, out = tmp_path / "trunk.gguf", tmp_path / "out.gguf"
    run_apex("calibrate", testbed, "--text", heldout / "code.txt", "--chunks", 2, "--no-mtp", "-o", trunk)
    ran = run_apex("imatrix", "merge", halves[0], trunk, "-o", out, code=43)
    assert f"{trunk} was made without the draft head, {halves[0]} with it" in ran.stderr and not out.exists()


def test_values_that_are_no_numbers(halves: list[Path], tools: Toolset, tmp_path: Path) -> None:
    damaged, out = tmp_path / "nan.gguf", tmp_path / "out.gguf"
    entry = next(iter(read_imatrix(halves[1]).entries.values()))
    data = bytearray(halves[1].read_bytes())
    data[entry.offset : entry.offset + 4] = np.float32(np.nan).tobytes()
    damaged.write_bytes(data)
    for verb in (["merge", "-o", out], ["diff"]):
        ran = run_apex("imatrix", verb[0], halves[0], damaged, *verb[1:], code=42)
        assert f"values of {entry.name} are not sums of squares" in ran.stderr and "is nan" in ran.stderr
    assert not out.exists()


def test_how_far_two_are_apart(halves: list[Path], testbed: Path, tools: Toolset, tmp_path: Path) -> None:
    same = json.loads(run_apex("imatrix", "diff", halves[0], halves[0], "--model", testbed, "--json").stdout)
    assert same["equal"] and {role["mean"] for role in same["roles"]} == {0}
    apart = json.loads(run_apex("imatrix", "diff", *halves, "--model", testbed, "--json").stdout)
    assert not apart["equal"] and {role["draft_head"] for role in apart["roles"]} == {True, False}
    one, two = (read_imatrix(path).entries["blk.2.ffn_gate_exps.weight"] for path in halves)
    shares = [
        np.divide(*(f(entry.values()[3].astype(np.float64)) for f in (np.asarray, np.sum))) for entry in (one, two)
    ]
    routed = next(role for role in apart["roles"] if role["role"] == "routed" and not role["draft_head"])
    assert routed["matrices"] + sum(routed["only"].values()) == 6 * 3 * 8
    assert 0 < routed["mean"] <= routed["worst"]["distance"] <= 1
    assert np.abs(shares[0] - shares[1]).sum() / 2 <= routed["worst"]["distance"]
    ran = run_apex("imatrix", "diff", *halves)
    assert "routed" in ran.stdout and "over 2048 and 2048 tokens" in ran.stdout
    other = edited(halves[0], tmp_path / "other.gguf", rename="blk.1")
    assert "belongs to another model" in run_apex("imatrix", "diff", halves[0], other, code=43).stderr


def test_bad_input(halves: list[Path], tools: Toolset, testbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    run_apex("imatrix", "merge", halves[0], "-o", out, code=2)
    run_apex("imatrix", "merge", halves[0], halves[0], "-o", out, code=2)
    run_apex("imatrix", "merge", halves[0], testbed, "-o", out, code=42)
    run_apex("imatrix", "convert", tmp_path / "gone", "-o", out, code=42)
    before = halves[0].read_bytes()
    assert "is the input itself" in run_apex("imatrix", "merge", *halves, "-o", halves[0], "--force", code=71).stderr
    assert halves[0].read_bytes() == before and not list(tmp_path.iterdir())
    out.write_text("mine")
    run_apex("imatrix", "merge", *halves, "-o", out, code=71)
    assert out.read_text() == "mine"


def test_same_rows_stay_told(halves: list[Path], tools: Toolset, tmp_path: Path) -> None:
    one, two = (edited(half, tmp_path / f"{half.stem}.gguf", mtp_hidden="post_norm") for half in halves)
    run_apex("imatrix", "merge", one, two, "-o", tmp_path / "out.gguf")
    assert read_imatrix(tmp_path / "out.gguf").metadata["imatrix.mtp_hidden"] == "post_norm"
