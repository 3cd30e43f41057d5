"""The GGUF header parser: what it reads, how fast, and that a damaged file raises only ModelInvalid."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from counted import counted
from shapes import QWEN_35B_A3B, TINY, write_header_only

from apex_build.errors import ModelInvalid, ModelMissing
from apex_build.gguf_model.header import ArrayValue, Header, read_header


def assert_same_as_gguf_py(path: Path) -> Header:
    header, reader = read_header(path), gguf.GGUFReader(path)
    assert [(t.name, t.shape, t.type, t.n_bytes, header.data_offset + t.offset) for t in header.tensors] == [
        (t.name, tuple(t.shape.tolist()), t.tensor_type.name, t.n_bytes, t.data_offset) for t in reader.tensors
    ]
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(header.metadata) == list(fields)
    for key, value in header.metadata.items():
        value = value.read() if isinstance(value, ArrayValue) else value
        assert (list(value) if isinstance(value, tuple) else value) == fields[key], key
    return header


def test_reads_what_gguf_py_reads(tmp_path: Path) -> None:
    path = tmp_path / "every type.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{name}")(f"a.{name}", 7)
    writer.add_float32("a.float32", 0.25)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "Grüße, 世界\nzweite Zeile")
    writer.add_array("a.numbers", [3, -1, 2])
    writer.add_array("a.strings", ["", "ä", "b" * 300])
    writer.add_array("a.flags", [True, False])
    writer.add_array("a.many numbers", [i / 4 for i in range(5000)])
    writer.add_array("a.many strings", [f"Ġ{i}" * (i % 5) for i in range(5000)])
    writer.add_custom_alignment(64)
    rng = np.random.default_rng(0)
    writer.add_tensor("one", rng.normal(size=5).astype(np.float32))
    writer.add_tensor("blk.0.two.weight", rng.normal(size=(3, 64)).astype(np.float16))
    for kind in ("Q4_K", "IQ2_XXS", "Q8_0"):
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        rows = np.zeros((2, 3, 512 // block * block_bytes), np.uint8)
        writer.add_tensor(f"of.{kind}", rows, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header = assert_same_as_gguf_py(path)
    assert header.alignment == 64
    assert header.version == 3
    assert header.metadata["a.numbers"] == (3, -1, 2)
    assert isinstance(header.metadata["a.many strings"], ArrayValue)
    assert len(header.metadata["a.many strings"]) == 5000


def test_reads_a_version_2_file(tiny: Path) -> None:
    data = bytearray(tiny.read_bytes())
    data[4] = 2
    tiny.write_bytes(data)
    assert read_header(tiny).version == 2


def test_the_testbed_reads_as_gguf_py_reads_it(testbed: Path) -> None:
    assert_same_as_gguf_py(testbed)


@pytest.mark.slow
def test_71_gb_with_248320_tokens_cost_no_more_than_the_header(large: Path) -> None:
    assert large.stat().st_size > 71e9
    assert large.stat().st_blocks * 512 < 50e6
    with counted() as work:
        header = read_header(large)
    assert work.lines < 4_000_000 and work.read < 1e6 and work.faults < 1000
    assert len(header.tensors) == 753
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert (tokens.type, tokens.count) == ("STRING", QWEN_35B_A3B.vocabulary)
    assert tokens.read()[-1] == "<|special_31|>"
    assert header.metadata["tokenizer.ggml.scores"].read()[:2] == (0.0, -1.0)
    last = header.tensors[-1]
    assert header.file_size - (header.data_offset + last.offset + last.n_bytes) in range(32)


# --- files that are something else ------------------------------------------------------------------------------------


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelMissing, match=r"no such file: .*absent\.gguf"):
        read_header(tmp_path / "absent.gguf")
    with pytest.raises(ModelMissing, match="is a folder"):
        read_header(tmp_path)
    with pytest.raises(ModelMissing, match="not a regular file"):
        read_header(Path("/dev/null"))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ModelMissing, match="not a regular file"):
        read_header(pipe)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"", "the file is empty"),
        (b"\0" * 5000, "header is all zeros: llama-quantize writes a zeroed header first"),
        (b"\0" * 3, "all zeros"),
        (b"GG", "truncated: 2 bytes"),
        (b"GGUF", "ends inside the version"),
        (struct.pack("<Q", 120) + b'{"__metadata__": {}}' + b"\0" * 200, "looks like safetensors"),
        (b"PK\x03\x04" + b"\0" * 90, "zip archive"),
        (b"lmgg\x01\0\0\0" + b"x" * 90, "before GGUF"),
        (b"tjgg\x03\0\0\0" + b"x" * 90, "before GGUF"),
        (b"version https://git-lfs.invalid/spec/v1\noid sha256:00\nsize 9\n", "git-lfs pointer"),
        (b"<!doctype html><html><body>404</body></html>", "an error page"),
        (b"\x1f\x8b\x08\0" + b"\1" * 90, "compressed with gzip"),
        (b"hello, world, this is text", r"it begins with 68 65 6c 6c 6f 2c 20 77 \('hello, w'\)"),
        (b"\x7fELF\x02\x01\x01\x1b[31m", r"7f 45 4c 46"),
    ],
)
def test_a_file_that_is_no_gguf_is_called_what_it_is(tmp_path: Path, start: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(start)
    with pytest.raises(ModelInvalid, match=message) as caught:
        read_header(path)
    assert str(path) in caught.value.message
    assert "\x1b" not in caught.value.message


def test_a_big_endian_file(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("a.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelInvalid, match="big-endian GGUF file") as caught:
        read_header(path)
    assert "gguf-convert-endian" in str(caught.value.hint)


def test_a_truncated_file_says_how_long_it_should_be(tiny: Path) -> None:
    whole = tiny.stat().st_size
    os.truncate(tiny, whole - 5000)
    with pytest.raises(
        ModelInvalid, match=rf"truncated: expected {whole} bytes, found {whole - 5000}; the data of blk\.4\."
    ):
        read_header(tiny)


def test_the_padding_of_the_last_tensor_may_be_missing(tmp_path: Path) -> None:
    path = write_header_only(tmp_path / "odd.gguf", TINY, extra={"blk.0.odd.weight": (3,)})
    os.truncate(path, path.stat().st_size - 26)  # 3 F16 numbers are 6 bytes of 32
    assert read_header(path).tensors[-1].n_bytes == 6


# --- headers that lie -------------------------------------------------------------------------------------------------

KEY = struct.pack("<Q", 3) + b"a.b"
U64_MAX = (1 << 64) - 1


def gguf_bytes(
    keys: bytes = b"", tensors: bytes = b"", *, n_keys: int = 0, n_tensors: int = 0, version: int = 3, rest: int = 256
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + keys + tensors + b"\0" * rest


def tensor(name: bytes = b"t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return (
        struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        + struct.pack("<IQ", kind, offset)
    )  # fmt: skip


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return KEY + struct.pack("<IIQ", 9, kind, count) + data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gguf_bytes(version=1), "version 1; versions 2 and 3"),
        (gguf_bytes(version=4), "version 4"),
        (gguf_bytes(n_tensors=U64_MAX), f"there are {U64_MAX} tensors"),
        (gguf_bytes(n_keys=1 << 40), "there are 1099511627776 keys"),
        (gguf_bytes(KEY + struct.pack("<I", 13), n_keys=1), "a.b: unknown value type 13"),
        (gguf_bytes(struct.pack("<Q", 0) + struct.pack("<IB", 0, 1), n_keys=1), "name of key 1 of 1 is empty"),
        (gguf_bytes(struct.pack("<Q", 3) + b"a\x1bb" + struct.pack("<IB", 0, 1), n_keys=1), "control characters"),
        (gguf_bytes(struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 0, 1), n_keys=1), "not UTF-8"),
        (gguf_bytes(2 * (KEY + struct.pack("<IB", 0, 1)), n_keys=2), "duplicate key a.b"),
        (
            gguf_bytes(KEY + struct.pack("<IQ", 8, U64_MAX), n_keys=1),
            f"string too long: expected at most {16 << 20} bytes, found {U64_MAX}",
        ),
        (gguf_bytes(KEY + struct.pack("<IQ", 8, 1 << 20), n_keys=1), "ends inside the key a.b: expected 1048576 bytes"),
        (gguf_bytes(array(4, U64_MAX), n_keys=1), "ends inside the key a.b"),
        (gguf_bytes(array(8, 1 << 60), n_keys=1), "ends inside the key a.b"),
        (gguf_bytes(array(8, 2000, struct.pack("<Q", U64_MAX) + b"\0" * 16000), n_keys=1), "string 1 of 2000"),
        (gguf_bytes(array(8, 2000, b"\0" * 15992 + struct.pack("<Q", 1 << 30)), n_keys=1), "its last string"),
        (gguf_bytes(array(9, 1, struct.pack("<IQ", 9, 1)), n_keys=1), "array of arrays"),
        (gguf_bytes(array(77, 1), n_keys=1), "unknown value type 77"),
        (
            gguf_bytes(struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 48), n_keys=1),
            "alignment is 48",
        ),
        (
            gguf_bytes(struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 0), n_keys=1),
            "alignment is 0",
        ),
        (
            gguf_bytes(struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<IQ", 10, 32), n_keys=1),
            r"32 \(UINT64\)",
        ),
        (gguf_bytes(tensors=tensor(b""), n_tensors=1), "tensor 1 of 1 is empty"),
        (gguf_bytes(tensors=tensor(b"a b"), n_tensors=1), "holds blanks"),
        (gguf_bytes(tensors=tensor(b"x" * 64), n_tensors=1), "expected at most 63 bytes, found 64"),
        (gguf_bytes(tensors=tensor() + tensor(offset=128), n_tensors=2), "tensor t is a duplicate"),
        (gguf_bytes(tensors=tensor(shape=(1, 1, 1, 1, 1)), n_tensors=1), "expected at most 4, found 5"),
        (gguf_bytes(tensors=tensor(shape=(32, 0)), n_tensors=1), r"shape \(32, 0\)"),
        (gguf_bytes(tensors=tensor(shape=(1 << 32, 1 << 32)), n_tensors=1), "fit 63 bits"),
        (gguf_bytes(tensors=tensor(shape=(U64_MAX, 1)), n_tensors=1), "fit 63 bits"),
        (gguf_bytes(tensors=tensor(shape=(1 << 40,)), n_tensors=1), "truncated: expected 4398046511"),
        (gguf_bytes(tensors=tensor(kind=4), n_tensors=1), "type number 4"),
        (gguf_bytes(tensors=tensor(kind=0xFFFFFFFF), n_tensors=1), "type number 4294967295"),
        (
            gguf_bytes(tensors=tensor(shape=(100, 2), kind=12), n_tensors=1),
            "rows of 100, not a multiple of its block of 256",
        ),
        (gguf_bytes(tensors=tensor(b"a") + tensor(b"b", offset=64), n_tensors=2), "b overlaps the tensor before it"),
        (gguf_bytes(tensors=tensor(b"a") + tensor(b"b", offset=160), n_tensors=2), "b leaves a gap"),
        (
            gguf_bytes(tensors=tensor(b"a", offset=U64_MAX - 3), n_tensors=1),
            "begins at byte 18446744073709551612, expected 0",
        ),
        (gguf_bytes(tensors=tensor(b"a"), n_tensors=2, rest=0), "ends inside tensor 2 of 2"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelInvalid, match=message) as caught:
        read_header(path)
    assert str(path) in caught.value.message


def test_a_hostile_header_of_a_huge_sparse_file_costs_little(tmp_path: Path) -> None:
    path = tmp_path / "hole.gguf"
    path.write_bytes(gguf_bytes(array(8, 1 << 32), n_keys=1))
    os.truncate(path, 1 << 40)
    with counted() as work, pytest.raises(ModelInvalid, match="implausibly long for a header"):
        read_header(path)
    assert work.lines < 10_000 and work.read < 1e6 and work.faults < 1000
    path.write_bytes(gguf_bytes(2000 * array(8, 1000), n_keys=2000))
    os.truncate(path, 1 << 40)
    with counted() as work, pytest.raises(ModelInvalid):
        read_header(path)
    assert work.lines < 10_000 and work.read < 1e6 and work.faults < 1000


def test_damage_anywhere_gives_a_valid_parse_or_model_invalid(tmp_path: Path) -> None:
    path = write_header_only(tmp_path / "tiny.gguf", TINY)
    header = read_header(path)
    whole = path.read_bytes()[: header.data_offset]
    size = header.file_size
    rng = random.Random(7)
    refused = 0
    for round_ in range(600):
        data = bytearray(whole)
        # the counts, the first keys, the vocabulary, the tensors: each is a region of its own
        first, last = rng.choice(((0, 24), (24, 1500), (1500, len(data)), (len(data) - 6000, len(data))))
        kind = round_ % 3
        if kind == 0:
            for _ in range(rng.choice((1, 1, 4))):
                data[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            at = rng.randrange(first, last - 8)
            data[at : at + 8] = struct.pack(
                "<Q", rng.choice((0, 1, 1 << 31, 1 << 40, (1 << 63) - 1, U64_MAX, rng.getrandbits(64)))
            )
        else:
            del data[rng.randrange(first, last) :]
        path.write_bytes(data)
        if kind != 2:
            os.truncate(path, size)
        try:
            read_header(path)
        except ModelInvalid as error:
            refused += 1
            assert str(path) in error.message
            assert error.message.isprintable() or "\n" not in error.message
    assert refused > 200


def test_many_small_arrays_cost_as_little_as_few(tmp_path: Path) -> None:
    """240 MB of string arrays, each shorter than the rest of the file."""
    strings = struct.pack("<Q", 0) * 1024
    path = tmp_path / "arrays.gguf"
    with path.open("wb") as file:
        file.write(gguf_bytes(n_keys=29_000, rest=0))
        for number in range(29_000):
            key = f"k{number}".encode()
            file.write(struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 8, 1024) + strings)
    with counted() as work, pytest.raises(ModelInvalid, match="no real file has as many"):
        read_header(path)
    assert work.lines < 4_000_000  # of some 60 million for all of it


def test_long_arrays_of_empty_strings_are_counted_too(tmp_path: Path) -> None:
    path = tmp_path / "strings.gguf"
    with path.open("wb") as file:
        file.write(gguf_bytes(n_keys=1, rest=0) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 1 << 23))
        file.write(b"\0" * (8 << 23))
    with counted() as work, pytest.raises(ModelInvalid, match="no real file has as many"):
        read_header(path)
    assert work.lines < 10_000
