"""Packed builds that are not what they claim, or not for this machine: each is rejected and leaves nothing behind."""

from __future__ import annotations

import ctypes
import hashlib
import json
import platform
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard
from packed_builds import Edit, Files, contents, edited, manifested, write

from apex_build.errors import ApexError, ArchiveUnsafe, BuildForeign, DiskTooSmall, DownloadFailed, HashMismatch
from apex_build.fetching import archive as source_archive
from apex_build.native.run import run_tool
from apex_build.toolchain.packed.packing import MANIFEST, SUMS
from apex_build.toolchain.packed.unpacking import take_in


def refused(archive: Path, error: type[ApexError], says: str, elsewhere: Path) -> None:
    with pytest.raises(error, match=says):
        take_in(archive)
    left = [path for path in elsewhere.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == []
    assert not list((elsewhere / "builds").glob("*"))


@pytest.mark.parametrize("name", ["bin/tool", "bin/libpart.so.1", "licenses/llama.cpp/LICENSE"])
def test_a_changed_byte(name: str, packed: Path, elsewhere: Path) -> None:
    def flip(files: Files, _: list[tarfile.TarInfo]) -> None:
        files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])

    refused(
        edited(packed, flip, sums=False),
        HashMismatch,
        f"{name} has the sha256 [0-9a-f]{{64}}, its lists say",
        elsewhere,
    )


def drop(name: str) -> Edit:
    return lambda files, _: files.pop(name) and None


def add(name: str) -> Edit:
    return lambda files, _: files.update({name: b"x"})


def member(kind: bytes, name: str = "top/bin/more", link: str = "") -> Edit:
    def edit(_: Files, more: list[tarfile.TarInfo]) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        more.append(info)

    return edit


def double(_: Files, more: list[tarfile.TarInfo]) -> None:
    more.append(tarfile.TarInfo("top/bin/tool"))


def unlisted(files: Files, _: list[tarfile.TarInfo]) -> None:
    manifest = json.loads(files[MANIFEST])
    del manifest["files"]["bin/tool"]
    files[MANIFEST] = json.dumps(manifest).encode()


def shorter(files: Files, _: list[tarfile.TarInfo]) -> None:
    files["bin/tool"] = files["bin/tool"][:-1]


def moved(to: str) -> Edit:
    """A file of the build under another name, properly listed."""

    def edit(files: Files, _: list[tarfile.TarInfo]) -> None:
        manifest = json.loads(files[MANIFEST])
        manifest["files"][to] = manifest["files"].pop("bin/libpart.so")
        files[MANIFEST] = json.dumps(manifest).encode()
        files[to] = files.pop("bin/libpart.so")

    return edit


@pytest.mark.parametrize(
    ("edit", "sums", "error", "says"),
    [
        (add("bin/more"), True, HashMismatch, "its lists and its contents differ: bin/more"),
        (drop("bin/tool"), True, HashMismatch, "its lists and its contents differ: bin/tool"),
        (shorter, False, HashMismatch, "its lists and its contents differ: bin/tool"),
        (drop(SUMS), False, HashMismatch, "is not a packed build: expected SHA256SUMS and manifest.json in one folder"),
        (drop(MANIFEST), False, HashMismatch, "is not a packed build"),
        (unlisted, True, HashMismatch, "its lists and its contents differ: bin/tool"),
        (manifested(seconds=0), False, HashMismatch, "manifest.json is not the one that its SHA256SUMS lists"),
        (
            manifested(source="0" * 64),
            True,
            HashMismatch,
            "its manifest.json was changed: it gives the key '[0-9a-f]{32}', its contents make",
        ),
        (manifested(key="../../x"), True, HashMismatch, r"was changed: it gives the key '\.\./\.\./x'"),
        (
            member(tarfile.SYMTYPE, link="tool"),
            False,
            ArchiveUnsafe,
            "'top/bin/more' is a link to 'tool'; a packed build has none",
        ),
        (member(tarfile.LNKTYPE, link="top/bin/tool"), False, ArchiveUnsafe, "is a link to 'top/bin/tool'"),
        (member(tarfile.SYMTYPE, link="/etc/passwd"), False, ArchiveUnsafe, "points outside the archive"),
        (member(tarfile.FIFOTYPE), False, ArchiveUnsafe, "a device, a pipe or of an unknown kind"),
        (member(tarfile.CHRTYPE), False, ArchiveUnsafe, "a device, a pipe or of an unknown kind"),
        (member(tarfile.REGTYPE, "top/../../more"), False, ArchiveUnsafe, "leaves the folder it is extracted to"),
        (member(tarfile.REGTYPE, "/more"), False, ArchiveUnsafe, "has an absolute path"),
        (member(tarfile.REGTYPE, "second/more"), False, HashMismatch, "is not a packed build"),
        (double, False, ArchiveUnsafe, "occurs twice"),
        (moved("bin/sub/libpart.so"), True, ArchiveUnsafe, "names 'bin/sub/libpart.so', where no build has a file"),
        (moved("elsewhere"), True, ArchiveUnsafe, "names 'elsewhere'"),
        (moved("licenses/../../x"), True, ArchiveUnsafe, "leaves the folder"),
        (moved("bin/lib\x1bpart.so"), True, HashMismatch, "control characters"),
        (manifested(backend="../../x"), True, HashMismatch, r"not one of a build: the backend '\.\./\.\./x'"),
        (manifested(seconds="x"), True, HashMismatch, "'seconds' is missing, or of another kind"),
        (manifested(ggml_type_count="x"), True, HashMismatch, "not one of a build: ggml_type_count is 'x'"),
        (manifested(ggml_type_count=10**9), True, HashMismatch, "not one of a build: ggml_type_count is 1000000000"),
        (manifested(pin=3), True, HashMismatch, "'pin' is missing, or of another kind"),
        (manifested(pin={"name": 3}), True, HashMismatch, "not one of a build: the pin"),
        (manifested(compiler={}), True, HashMismatch, "not one of a build: the compiler"),
        (manifested(cuda={"gpus": 3}), True, HashMismatch, "what it says of CUDA: gpus"),
        (manifested(cuda={"architectures": [3]}), True, HashMismatch, "what it says of CUDA: architectures"),
        (manifested(targets=[]), True, HashMismatch, "is not a string"),
        (manifested(targets=[["tool"]]), True, HashMismatch, "is not a string"),
        (manifested(files={"bin/tool": 3}), True, HashMismatch, "what it says of 'bin/tool'"),
        (manifested(files={"bin/tool": {"sha256": "x", "size": True}}), True, HashMismatch, "what it says of|differ"),
        (manifested(built="\x1b[2J"), True, HashMismatch, "control characters"),
        (
            manifested(host="sparc64"),
            True,
            BuildForeign,
            f"was built for sparc64, this machine is {platform.machine()}",
        ),
        (
            manifested(cpu_flags=["avx9000"]),
            True,
            BuildForeign,
            "was built for a CPU with avx9000, which this machine's CPU lacks",
        ),
        (manifested(recipe=99), True, BuildForeign, "another version of apex-build: its recipe is 99"),
        (lambda files, _: files.update({MANIFEST: b"[]"}), True, HashMismatch, "it is not an object"),
        (lambda files, _: files.update({MANIFEST: b"{}"}), True, HashMismatch, "'backend' is missing"),
        (
            lambda files, _: files.update({MANIFEST: b"\xff\0"}),
            False,
            HashMismatch,
            "is not the one that its SHA256SUMS lists",
        ),
    ],
)
def test_tampered(edit: Edit, sums: bool, error: type[ApexError], says: str, packed: Path, elsewhere: Path) -> None:
    refused(edited(packed, edit, sums=sums), error, says, elsewhere)


def test_a_manifest_that_is_no_json(packed: Path, elsewhere: Path) -> None:
    files = contents(packed)
    for text in (b"{", b"\xff", b"[" * 100_000):
        files[MANIFEST] = text
        files[SUMS] = f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode()
        refused(write(packed.with_name("edited.tar.zst"), files, []), HashMismatch, "is not one of a build", elsewhere)


def test_a_tool_that_does_not_start(packed: Path, elsewhere: Path) -> None:
    """Like one linked with a newer C library than this machine has."""

    def replace(files: Files, _: list[tarfile.TarInfo]) -> None:
        files["bin/tool"] = b"#!/bin/sh\necho 'tool: /lib/libc.so.6: version GLIBC_2.99 not found' >&2\nexit 127\n"

    refused(
        edited(packed, replace),
        BuildForeign,
        "(?s)tool does not run on this machine: it ended with 127.*GLIBC_2.99",
        elsewhere,
    )


def trap(folder: Path) -> tuple[bytes, Path]:
    """A library that leaves a mark when any program loads it."""
    mark, code = folder / "mark", folder / "trap.c"
    code.write_text(
        f'#include <stdio.h>\n__attribute__((constructor)) void go(void) {{ fclose(fopen("{mark}", "w")); }}\n'
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "trap.so", code], check=True)
    ctypes.CDLL(str(folder / "trap.so"))
    assert mark.exists(), "it works"
    mark.unlink()
    return (folder / "trap.so").read_bytes(), mark


@pytest.mark.parametrize(
    "name", ["bin/libpart.so.1", "bin/libpart.so.1.2", "bin/libggml-blas.so", "bin/libc.so.6", "libpart.so.1"]
)
def test_a_library_that_runs_when_it_is_loaded(name: str, packed: Path, elsewhere: Path, tmp_path: Path) -> None:
    """No program runs beside a library that the lists lack or describe differently."""
    code, mark = trap(tmp_path)
    refused(
        edited(packed, lambda files, _: files.update({name: code}), sums=False),
        HashMismatch,
        "differ|sha256",
        elsewhere,
    )
    assert not mark.exists()


def test_libraries_beside_the_archive_and_in_the_current_folder(
    packed: Path, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, mark = trap(tmp_path)
    for folder in (packed.parent, here := tmp_path / "here"):
        folder.mkdir(exist_ok=True)
        for name in ("libpart.so.1", "libggml-blas.so", "libggml-cpu.so", "libc.so.6"):
            (folder / name).write_bytes(code)
    monkeypatch.chdir(here)
    assert run_tool([take_in(packed).toolset.tool("tool")]).lines == ("42",)
    assert not mark.exists()


def test_cut_short_or_something_else(packed: Path, elsewhere: Path, tmp_path: Path) -> None:
    whole = packed.read_bytes()
    for length in (len(whole) // 2, len(whole) - 400):
        packed.write_bytes(whole[:length])
        refused(packed, DownloadFailed, "is cut short", elsewhere)
    packed.write_bytes(whole[:1000] + bytes(100) + whole[1100:])
    refused(packed, DownloadFailed, "is cut short or damaged", elsewhere)
    packed.write_bytes(b"GGUF" + bytes(5000))
    refused(packed, HashMismatch, "is not a tar archive", elsewhere)
    refused(tmp_path / "nothing.tar.zst", DownloadFailed, "there is no archive", elsewhere)
    refused(write(packed, {"CMakeLists.txt": b"x"}, []), HashMismatch, "is not a packed build", elsewhere)


def test_a_decompression_bomb(packed: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_archive, "MAX_TOTAL", 8 << 20)
    bomb = packed.with_name("bomb.tar.zst")
    bomb.write_bytes(zstandard.ZstdCompressor().compress(bytes(64 << 20)))
    assert bomb.stat().st_size < 10_000
    refused(bomb, ArchiveUnsafe, f"refused: decompressed it has more than {8 << 20} bytes", elsewhere)


def test_a_window_that_would_take_all_memory(packed: Path, elsewhere: Path) -> None:
    settings = zstandard.ZstdCompressionParameters(window_log=30, write_content_size=0)
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    packed.write_bytes(stream.compress(bytes(1 << 20)) + stream.flush())
    refused(packed, DownloadFailed, "damaged: .*requires too much memory", elsewhere)


def test_no_room_for_it(packed: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(packed.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(packed, DiskTooSmall, "the unpacked build takes", elsewhere)
