"""Imatrix files of both formats, and damaged ones."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from counted import counted
from gguf_model.files import Entries, run_imatrix, write_imatrix, write_legacy

from apex_build.errors import ImatrixInvalid
from apex_build.gguf_model.imatrix import check_values, looks_legacy, read_imatrix
from apex_build.native.toolset import Toolset

Change = Callable[[gguf.GGUFWriter], None]
ENTRIES: Entries = {"blk.0.attn_q.weight": (256, [1024]), "blk.0.ffn_up_exps.weight": (256, [300.0, 0.0, 700.0, 24.0])}


def test_gguf(tmp_path: Path) -> None:
    imatrix = read_imatrix(write_imatrix(tmp_path / "imatrix.gguf", ENTRIES, head_tokens=1000))
    assert (imatrix.format, imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size) == (
        "gguf",
        ("chat.txt", "code.txt"),
        4,
        256,
    )
    assert imatrix.head_tokens == 1000
    experts = imatrix.entries["blk.0.ffn_up_exps.weight"]
    assert (experts.row_length, experts.n_values, experts.counts) == (256, 1024, (300, 0, 700, 24))
    assert experts.values().shape == (4, 256)
    assert experts.values()[1, 2] == 259
    check_values(imatrix)
    assert read_imatrix(write_imatrix(tmp_path / "stock.gguf", ENTRIES)).head_tokens is None


def test_legacy(tmp_path: Path) -> None:
    path = write_legacy(
        tmp_path / "i.dat", {"blk.0.attn_q.weight": (3, range(256)), "blk.0.x": (2, [0.5])}, dataset="wörter".encode()
    )
    assert looks_legacy(path)
    imatrix = read_imatrix(path)
    assert (imatrix.format, imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size) == (
        "legacy",
        ("wörter",),
        7,
        None,
    )
    entry = imatrix.entries["blk.0.attn_q.weight"]
    assert (entry.row_length, entry.counts) == (256, (3,))
    assert entry.values().tolist() == [list(range(256))]
    check_values(imatrix)
    oldest = read_imatrix(write_legacy(tmp_path / "2023.dat", {"blk.0.x": (2, [0.5])}, dataset=None))
    assert (oldest.datasets, oldest.chunk_count) == ((), None)


@pytest.mark.parametrize("name", ["imatrix.gguf", "imatrix.dat"])
def test_what_llama_imatrix_writes(tools: Toolset, testbed: Path, tmp_path: Path, name: str) -> None:
    imatrix = run_imatrix(tools, testbed, tmp_path / name)
    check_values(imatrix)
    assert imatrix.format == ("gguf" if name.endswith("gguf") else "legacy")
    assert [Path(dataset).name for dataset in imatrix.datasets] == ["text.txt"]
    assert imatrix.chunk_count == 2
    entry = imatrix.entries["blk.0.ffn_down_exps.weight"]
    if imatrix.format == "gguf":
        reader = gguf.GGUFReader(imatrix.path)
        data = {tensor.name: tensor.data for tensor in reader.tensors}
        assert len(imatrix.entries) * 2 == len(data)
        assert np.array_equal(entry.values(), data["blk.0.ffn_down_exps.weight.in_sum2"])
        assert entry.counts == tuple(data["blk.0.ffn_down_exps.weight.counts"].ravel().tolist())
    else:
        assert len(entry.counts) == 1


def test_a_large_imatrix_opens_without_reading_its_values(tmp_path: Path) -> None:
    """For the 35B-A3B the values take 190 MB; here they are a hole in the file."""
    path = tmp_path / "large.gguf"
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    f32 = np.dtype(np.float32)
    for layer in range(41):
        for name in ("gate", "up", "down"):
            writer.add_tensor_info(f"blk.{layer}.ffn_{name}_exps.weight.in_sum2", (256, 2048), f32, 256 * 2048 * 4)
            writer.add_tensor_info(f"blk.{layer}.ffn_{name}_exps.weight.counts", (256, 1), f32, 1024)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + 41 * 3 * (256 * 2048 * 4 + 1024) + 32)
    with counted() as work:
        imatrix = read_imatrix(path)
    assert work.lines < 100_000 and work.read < 1e6 and work.faults < 1000
    assert len(imatrix.entries) == 123


# --- damage -----------------------------------------------------------------------------------------------------------


def add(**arrays: Any) -> Change:
    """Add the tensors b.in_sum2 and b.counts, or only one of them."""

    def change(writer: gguf.GGUFWriter) -> None:
        for name, array in arrays.items():
            writer.add_tensor(f"blk.1.bad.{name}", array)

    return change


def without(key: str) -> Change:
    def change(writer: gguf.GGUFWriter) -> None:
        del writer.kv_data[0][key]

    return change


ONES = np.ones((4, 256), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add(in_sum2=ONES), r"blk\.1\.bad has \.in_sum2 but not its counterpart"),
        (add(counts=ONES), r"blk\.1\.bad has \.counts but not its counterpart"),
        (add(in_sum2=ONES, counts=ONES[:3, :1]), r"sums of shape \(256, 4\) but 3 counts"),
        (add(in_sum2=ONES, counts=-ONES[:, :1]), r"counts of blk\.1\.bad are not numbers of tokens"),
        (add(in_sum2=ONES, counts=ONES[:, :1] * np.nan), r"counts of blk\.1\.bad are not numbers of tokens"),
        (add(in_sum2=ONES.astype(np.float16), counts=ONES[:, :1]), "of type F16/F32"),
        (without("imatrix.datasets"), "imatrix.datasets is missing"),
        (without("imatrix.chunk_count"), "imatrix.chunk_count is missing"),
        (without("imatrix.chunk_size"), "imatrix.chunk_size is missing"),
        (lambda w: w.add_string("imatrix.mtp_token_count", "many"), "imatrix.mtp.token_count is 'many'"),
    ],
)
def test_a_gguf_imatrix_that_does_not_add_up(tmp_path: Path, change: Change, message: str) -> None:
    path = write_imatrix(tmp_path / "imatrix.gguf", ENTRIES, change=change)
    with pytest.raises(ImatrixInvalid, match=message) as caught:
        read_imatrix(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -1.0])
def test_values_that_are_no_sums_of_squares(tmp_path: Path, value: float) -> None:
    sums = ONES.copy()
    sums[2, 17] = value
    imatrix = read_imatrix(
        write_imatrix(tmp_path / "imatrix.gguf", ENTRIES, change=add(in_sum2=sums, counts=ONES[:, :1]))
    )
    with pytest.raises(ImatrixInvalid, match=rf"1 of the 1024 values of blk\.1\.bad .* matrix 2, column 17 is {value}"):
        check_values(imatrix)


def test_no_entries(tmp_path: Path) -> None:
    with pytest.raises(ImatrixInvalid, match="has no entries"):
        read_imatrix(write_imatrix(tmp_path / "imatrix.gguf", {}))


def test_files_that_are_no_imatrix(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(ImatrixInvalid, match="no such file"):
        read_imatrix(tmp_path / "absent.gguf")
    with pytest.raises(ImatrixInvalid, match="not an imatrix: a GGUF file of kind 'model'"):
        read_imatrix(tiny)
    other = tmp_path / "text"
    for data in (
        b"",
        b"text that is not an imatrix",
        b"\0" * 100,
        struct.pack("<ii", 3, 300) + b"a" * 300,
        struct.pack("<ii", 3, 3) + b"a\nb" * 9,
    ):
        other.write_bytes(data)
        with pytest.raises(ImatrixInvalid, match="not an imatrix: neither GGUF nor"):
            read_imatrix(other)


def test_truncation_at_any_byte_is_seen(tmp_path: Path) -> None:
    new = write_imatrix(tmp_path / "i.gguf", {"blk.0.a": (4, [2]), "blk.0.b": (2, [1, 2])})
    old = write_legacy(tmp_path / "i.dat", {"blk.0.a": (2, [1, 2]), "blk.0.b": (1, [3.5] * 5)})
    # an old file may end before the last call and the data set's name
    valid = {old.stat().st_size - 8 - len(b"wiki.txt")}
    for path, allowed in ((new, set()), (old, valid)):
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            if length in allowed:
                read_imatrix(path)
                continue
            with pytest.raises(ImatrixInvalid):
                read_imatrix(path)


def test_bytes_after_the_end_of_a_legacy_file(tmp_path: Path) -> None:
    path = write_legacy(tmp_path / "i.dat", {"blk.0.a": (2, [1, 2])})
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(ImatrixInvalid, match="4 bytes follow where the imatrix should end"):
        read_imatrix(path)


def test_damage_anywhere_gives_a_valid_parse_or_imatrix_invalid(tmp_path: Path) -> None:
    rng = random.Random(11)
    new = write_imatrix(tmp_path / "i.gguf", {f"blk.{n}.ffn_up_exps.weight": (8, [1, 2, 3]) for n in range(4)})
    old = write_legacy(tmp_path / "i.dat", {f"blk.{n}.ffn_up_exps.weight": (2, [1, 2, 3]) for n in range(4)})
    for path in (new, old):
        whole = path.read_bytes()
        refused = 0
        for _ in range(400):
            data = bytearray(whole)
            at = rng.randrange(len(data) - 4)
            data[at : at + 4] = rng.choice((rng.randbytes(4), b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff"))
            path.write_bytes(data)
            try:
                check_values(read_imatrix(path))
            except ImatrixInvalid:
                refused += 1
        assert refused > 100
