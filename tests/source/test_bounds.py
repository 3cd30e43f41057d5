"""Archives made to be expensive: rejected by name, with little work and memory, and never with a traceback."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from apex_runs import run_apex
from counted import counted

from apex_build.errors import ApexError, ArchiveUnsafe, DownloadFailed, HashMismatch
from apex_build.fetching.archive import members_of, open_tar
from apex_build.source.sdist import read_archive
from apex_build.toolchain.packed.unpacking import take_in


def pax(kind: bytes, payload: bytes) -> bytes:
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, len(payload)
    return info.tobuf(tarfile.USTAR_FORMAT) + payload + b"\0" * (-len(payload) % 512)


def member(name: str, content: bytes = b"") -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + b"\0" * (-len(content) % 512)


def record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    size = len(body)
    while size != len(body) + len(str(size)):
        size = len(body) + len(str(size))
    return str(size).encode() + body


GLOBAL, LOCAL = tarfile.XGLTYPE, tarfile.XHDTYPE
BAD: dict[str, Callable[[], bytes]] = {
    "many global headers": lambda: b"".join(
        pax(GLOBAL, record(f"k{number}", "v" * 400)) + member(f"f{number}") for number in range(3000)
    ),
    "one global header": lambda: (
        pax(GLOBAL, b"".join(record(f"k{n}", "v") for n in range(200_000))) + member("f") * 4000
    ),
    "extension headers": lambda: b"".join(pax(LOCAL, record("a", "v" * 100_000)) + member(f"f{n}") for n in range(400)),
    "digits": lambda: pax(LOCAL, b"9" * 2_000_000) + member("f"),  # hours of tarfile's own pattern
    "size of many digits": lambda: pax(LOCAL, record("size", "9" * 90)) + member("f"),
    "no number": lambda: pax(LOCAL, record("size", "x")) + member("f"),
    "infinite time": lambda: pax(LOCAL, record("mtime", "inf")) + member("f"),
    "a chain of headers": lambda: pax(LOCAL, record("a", "b")) * 4000 + member("f"),
    "a chain of global headers": lambda: pax(GLOBAL, record("a", "b")) * 4000 + member("f"),
    "sparse": lambda: pax(LOCAL, record("GNU.sparse.map", "0,1") + record("GNU.sparse.size", "5")) + member("f", b"x"),
    "sparse without numbers": lambda: (
        pax(LOCAL, record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0")) + member("f", b"x" * 512)
    ),
    "record lengths": lambda: pax(LOCAL, b"0 a=b\n") + member("f"),
    "octal": lambda: member("f")[:124] + b"zzzzzzzzzzz\0" + member("f")[136:],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("reader", ["source", "build"])
def test_refused_soon_and_by_an_error_of_ours(
    kind: str, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APEX_CACHE_DIR", str(tmp_path / "cache"))
    archive = tmp_path / "bad.tar.gz"
    archive.write_bytes(gzip.compress(BAD[kind]() + b"\0" * 1024, 1))
    with counted() as work, pytest.raises(ApexError) as caught:
        if reader == "source":
            list(read_archive(archive, "llama.cpp", "0" * 40))
        else:
            take_in(archive)
    assert work.lines < 8_000_000
    assert "bad.tar.gz" in caught.value.message
    assert isinstance(caught.value, (ArchiveUnsafe, HashMismatch)), caught.value


def test_global_headers_take_little_memory(tmp_path: Path) -> None:
    archive = tmp_path / "bad.tar"
    archive.write_bytes(BAD["many global headers"]())
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))\n"
        "from apex_build.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "build", "--import", str(archive)]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == ArchiveUnsafe.exit_code, ran.stderr


def test_an_xz_stream_may_not_ask_for_all_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APEX_CACHE_DIR", str(tmp_path / "cache"))
    archive = tmp_path / "bad.tar.xz"
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 512 << 20}]
    archive.write_bytes(lzma.compress(member("f", b"x") + b"\0" * 1024, filters=filters))
    with pytest.raises(DownloadFailed, match=r"bad\.tar\.xz is cut short or damaged: Memory usage limit"):
        list(read_archive(archive, "llama.cpp", "0" * 40))


@pytest.mark.parametrize("streams", [1, 3])
def test_an_xz_file_of_several_streams_is_read_whole(
    streams: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APEX_CACHE_DIR", str(tmp_path / "cache"))
    content = os.urandom(300_000)
    whole = member("f", content) + b"\0" * 1024
    size = -(-len(whole) // streams)
    archive = tmp_path / "good.tar.xz"
    archive.write_bytes(b"".join(lzma.compress(whole[at : at + size]) for at in range(0, len(whole), size)))
    with open_tar(archive) as tar:
        (found,) = members_of(archive, tar)
        file = tar.extractfile(found)
        assert file is not None and file.read() == content
    archive.write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(DownloadFailed), open_tar(archive) as tar:
        list(members_of(archive, tar))


def test_a_member_of_an_ordinary_archive_keeps_its_long_name(tmp_path: Path) -> None:
    archive, long = tmp_path / "good.tar", "a/" * 80 + "file"
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "f" * 40}) as tar:
        info = tarfile.TarInfo(long)
        info.size, info.mtime = 3, 1.5
        tar.addfile(info, io.BytesIO(b"abc"))
    with open_tar(archive) as tar:
        (found,) = members_of(archive, tar)
        assert found.name == long and tar.pax_headers["comment"] == "f" * 40
        file = tar.extractfile(found)
        assert file is not None and file.read() == b"abc"


def test_the_verb_shows_no_traceback(tmp_path: Path) -> None:
    archive = tmp_path / "bad.tar"
    archive.write_bytes(BAD["a chain of headers"]())
    said = run_apex("source", "fetch", "--archive", archive, "--force", code=HashMismatch.exit_code, env={
        "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path),
        "APEX_SOURCE_DIR": str(tmp_path / "s")
    }).stderr  # fmt: skip
    assert "bad.tar is not a tar archive that can be read" in said
