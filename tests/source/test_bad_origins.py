"""Every way for a fetched source to be wrong: rejected and named, with nothing left behind."""

from __future__ import annotations

import errno
import io
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from source.tiny import FILES, Apex, World, add, git, make_sdist, make_tarball, tarball_of, write_pin

from apex_build.errors import (
    ApexError,
    ArchiveUnsafe,
    DiskTooSmall,
    DownloadFailed,
    GitFailed,
    HashMismatch,
    OutputUnwritable,
)
from apex_build.fetching import archive as archives
from apex_build.source import sdist
from apex_build.source.fetch import fetch
from apex_build.storage.digests import sha256_file
from apex_build.storage.disk import writing


def refused(world: World, apex: Apex, code: int, *words: str, arguments: tuple[str, ...] = ()) -> None:
    said = apex("source", "fetch", *arguments)
    assert said.code == code, said.err
    for word in words:
        assert word in said.err
    assert "Traceback" not in said.err
    assert not world.tree.exists()
    assert world.left_over() == []


def test_wrong_hash(world: World, apex: Apex) -> None:
    make_sdist(world.sdist, FILES | {"LICENSE": b"GPL\n" * 9000})
    world = write_pin(world, size=world.sdist.stat().st_size)
    found = sha256_file(world.sdist)
    refused(
        world, apex, HashMismatch.exit_code, world.sdist.name, f"its sha256 is {found}, expected {world.pin.sha256}"
    )
    refused(
        world,
        apex,
        HashMismatch.exit_code,
        world.sdist.name,
        f"its sha256 is {found}",
        arguments=("--archive", str(world.sdist)),
    )


def test_larger_than_pinned(world: World, apex: Apex) -> None:
    with world.sdist.open("ab") as file:
        file.write(b"\0" * 100)
    refused(world, apex, HashMismatch.exit_code, f"larger than the {world.pin.size} bytes")


def test_truncated(world: World, apex: Apex) -> None:
    os.truncate(world.sdist, 300)
    refused(world, apex, DownloadFailed.exit_code, "is cut short: received 300 bytes of")
    refused(
        world,
        apex,
        DownloadFailed.exit_code,
        "is cut short: it has 300 bytes",
        arguments=("--archive", str(world.sdist)),
    )


def test_truncated_tarball(world: World, apex: Apex, tmp_path: Path) -> None:
    tarball = tarball_of(world, tmp_path / "tree.tar.gz")
    os.truncate(tarball, tarball.stat().st_size // 2)
    refused(world, apex, DownloadFailed.exit_code, "tree.tar.gz is cut short", arguments=("--archive", str(tarball)))


def test_truncated_plain_tar(world: World, apex: Apex, tmp_path: Path) -> None:
    plain = tmp_path / "tree.tar"
    with tarfile.open(plain, "w") as tar:
        for name, content in FILES.items():
            add(tar, f"top/{name}", content * 50)
    os.truncate(plain, plain.stat().st_size // 2 + 100)
    refused(world, apex, DownloadFailed.exit_code, "tree.tar is cut short", arguments=("--archive", str(plain)))


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"PK\3\4 this is a zip" * 99, HashMismatch.exit_code, "is not a tar archive"),
        (b"", DownloadFailed.exit_code, "cut short"),
        (b"\x1f\x8b garbage", DownloadFailed.exit_code, "damaged"),
    ],
)
def test_not_an_archive(world: World, apex: Apex, tmp_path: Path, content: bytes, code: int, words: str) -> None:
    (tmp_path / "foreign.tar.gz").write_bytes(content)
    said = apex("source", "fetch", "--archive", str(tmp_path / "foreign.tar.gz"))
    assert said.code == code
    assert words in said.err
    assert "foreign.tar.gz" in said.err
    assert "Traceback" not in said.err
    assert not world.tree.exists()


def test_missing_archive(world: World, apex: Apex, tmp_path: Path) -> None:
    absent = tmp_path / "absent.tar.gz"
    refused(
        world, apex, DownloadFailed.exit_code, f"there is no archive {absent}", arguments=("--archive", str(absent))
    )


def test_archive_of_something_else(world: World, apex: Apex, tmp_path: Path) -> None:
    other = make_tarball(tmp_path / "other.tar.gz", [("top/README.md", b"hello\n"), ("top/CMakeLists.txt", b"\n")])
    refused(world, apex, HashMismatch.exit_code, "does not contain llama.cpp", arguments=("--archive", str(other)))


def test_changed_tarball(world: World, apex: Apex, tmp_path: Path) -> None:
    files = {f"top/{name}": content for name, content in (FILES | {"ggml/src/ggml.c": b"evil\n"}).items()}
    other = make_tarball(tmp_path / "tree.tar.gz", files.items())
    refused(
        world,
        apex,
        HashMismatch.exit_code,
        f"expected digest {world.pin.tree_digest}, found",
        arguments=("--archive", str(other)),
    )


def test_tarball_of_another_commit(world: World, apex: Apex, tmp_path: Path) -> None:
    tarball = tmp_path / "tree.tar.gz"
    git(world.upstream, "archive", "--format=tar.gz", "--prefix=top/", f"--output={tarball}", "HEAD")
    later = git(world.upstream, "rev-parse", "HEAD")
    refused(world, apex, HashMismatch.exit_code, later, world.pin.commit, arguments=("--archive", str(tarball)))


def second_tree(tar: tarfile.TarFile) -> None:
    add(tar, "two/CMakeLists.txt", b"x")
    add(tar, "two/ggml/CMakeLists.txt", b"x")


Extra = Callable[[tarfile.TarFile], None]
SRC = "top/ggml/src"
UNSAFE: dict[str, tuple[Extra, str]] = {
    "parent": (lambda tar: add(tar, f"{SRC}/../../../../evil", b"x"), "leaves the folder"),
    "parent, not wanted": (lambda tar: add(tar, "top/docs/../../evil", b"x"), "leaves the folder"),
    "backslashes": (lambda tar: add(tar, "top\\..\\..\\evil", b"x"), "leaves the folder"),
    "absolute": (lambda tar: add(tar, "/etc/evil", b"x"), "absolute path"),
    "drive": (lambda tar: add(tar, "C:/evil", b"x"), "absolute path"),
    "symbolic link": (
        lambda tar: add(tar, f"{SRC}/link.c", type=tarfile.SYMTYPE, linkname="ggml.c"),
        "expected a file, found a symbolic link to 'ggml.c'",
    ),
    "link as folder": (
        lambda tar: add(tar, "top/src", type=tarfile.SYMTYPE, linkname="docs"),
        "expected a file, found a symbolic link to 'docs'",
    ),
    "hard link": (
        lambda tar: add(tar, f"{SRC}/hard.c", type=tarfile.LNKTYPE, linkname=f"{SRC}/ggml.c"),
        "expected a file, found a hard link",
    ),
    "link to outside": (
        lambda tar: add(tar, "top/docs/x", type=tarfile.SYMTYPE, linkname="../../../etc/passwd"),
        "points outside",
    ),
    "link to root": (
        lambda tar: add(tar, "top/docs/x", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "points outside",
    ),
    "hard link to outside": (
        lambda tar: add(tar, "top/docs/x", type=tarfile.LNKTYPE, linkname="../passwd"),
        "points outside",
    ),
    "device": (lambda tar: add(tar, "top/docs/null", type=tarfile.CHRTYPE), "is a device"),
    "pipe": (lambda tar: add(tar, f"{SRC}/pipe", type=tarfile.FIFOTYPE), "is a device, a pipe"),
    "twice": (lambda tar: add(tar, f"{SRC}/ggml.c", b"other\n"), "occurs twice"),
    "twice, other spelling": (lambda tar: add(tar, f"./{SRC}//./ggml.c", b"other\n"), "occurs twice"),
    "control characters": (lambda tar: add(tar, f"{SRC}/a\nM 100644 inline b", b"x"), "control characters"),
    "second tree": (second_tree, "more than one source tree"),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_archive(world: World, apex: Apex, tmp_path: Path, name: str) -> None:
    extra, words = UNSAFE[name]
    path = make_tarball(
        tmp_path / "unsafe.tar.gz", [(f"top/{file}", content) for file, content in FILES.items()], extra
    )
    before = sorted(tmp_path.rglob("*"))
    refused(world, apex, ArchiveUnsafe.exit_code, "unsafe.tar.gz", words, arguments=("--archive", str(path)))
    written = set(tmp_path.rglob("*")) - set(before) - {world.tree.parent}
    assert not written


@pytest.mark.parametrize("name", ["parent", "symbolic link", "hard link", "device"])
def test_unsafe_sdist(world: World, apex: Apex, name: str) -> None:
    """Even if the hash matches the pin."""

    def moved(member: tarfile.TarInfo) -> tarfile.TarInfo:
        return member.replace(name=member.name.replace("top/", "tiny_llama-1.0/vendor/llama.cpp/"))

    def extra(tar: tarfile.TarFile) -> None:
        with tarfile.open(fileobj=io.BytesIO(), mode="w") as there:
            UNSAFE[name][0](there)
            for member in there.getmembers():
                tar.addfile(moved(member), io.BytesIO(b"\0" * member.size))

    make_sdist(world.sdist, FILES, extra)
    world = write_pin(world, sha256=sha256_file(world.sdist), size=world.sdist.stat().st_size)
    said = apex("source", "fetch")
    assert said.code == ArchiveUnsafe.exit_code
    assert UNSAFE[name][1] in said.err
    assert not world.tree.exists()
    assert world.left_over() == []


@pytest.mark.parametrize("name", ["parent", "symbolic link", "hard link", "device", "link to outside"])
def test_unsafe_archive_without_the_librarys_filter(
    world: World, apex: Apex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Python 3.10.0 to 3.10.11 and 3.11.0 to 3.11.3 have no extraction filters."""
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    test_unsafe_archive(world, apex, tmp_path, name)


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, DiskTooSmall), (errno.EROFS, OutputUnwritable)])
def test_what_the_system_says(tmp_path: Path, number: int, kind: type[ApexError]) -> None:
    with pytest.raises(kind, match=re.escape(str(tmp_path / "x"))), writing(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "x"))


def test_harmless_link_outside_the_wanted_files(world: World, tmp_path: Path) -> None:
    def link(tar: tarfile.TarFile) -> None:
        add(tar, "top/docs/link.md", type=tarfile.SYMTYPE, linkname="../README.md")

    path = make_tarball(tmp_path / "tree.tar.gz", [(f"top/{file}", content) for file, content in FILES.items()], link)
    assert fetch(world.pin, origin="archive", archive=path).laid_out


def test_absurd_sizes(world: World, apex: Apex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def limit(**limits: int) -> None:
        for name, value in limits.items():
            for module in (archives, sdist):
                monkeypatch.setattr(module, name, value)

    limit(MAX_FILE=2000)
    members = [(f"top/{file}", content) for file, content in FILES.items()]
    large = make_tarball(tmp_path / "large.tar.gz", members, lambda tar: add(tar, f"{SRC}/large.c", b"\0" * 4000))
    refused(
        world,
        apex,
        ArchiveUnsafe.exit_code,
        "'top/ggml/src/large.c' is too large: expected at most 2000 bytes, found 4000",
        arguments=("--archive", str(large)),
    )
    limit(MAX_TOTAL=3000)
    refused(
        world, apex, ArchiveUnsafe.exit_code, "refused at 'top/ggml/src/large.c'", arguments=("--archive", str(large))
    )

    def header(tar: tarfile.TarFile) -> None:
        member = tarfile.TarInfo(f"{SRC}/small.c")
        member.pax_headers = {"comment": "x" * 5000}
        tar.addfile(member)

    limit(MAX_TOTAL=1 << 30)
    pax = make_tarball(tmp_path / "pax.tar.gz", members, header)
    refused(world, apex, HashMismatch.exit_code, "a header that claims", arguments=("--archive", str(pax)))


def test_link_in_upstream(world: World, apex: Apex) -> None:
    (world.upstream / "ggml/src/link.c").symlink_to("ggml.c")
    git(world.upstream, "add", "--all")
    git(world.upstream, "commit", "--quiet", "-m", "a link")
    world = write_pin(world, commit=git(world.upstream, "rev-parse", "HEAD"))
    refused(world, apex, ArchiveUnsafe.exit_code, "ggml/src/link.c is a symbolic link", arguments=("--from", "git"))


def test_upstream_without_the_commit(world: World, apex: Apex) -> None:
    world = write_pin(world, commit="1" * 40)
    refused(
        world, apex, DownloadFailed.exit_code, f"git could not fetch commit {'1' * 40}", arguments=("--from", "git")
    )


def test_upstream_with_other_content(world: World, apex: Apex) -> None:
    (world.upstream / "ggml/src/ggml.c").write_text("other\n")
    git(world.upstream, "commit", "--quiet", "-am", "other")
    world = write_pin(world, commit=git(world.upstream, "rev-parse", "HEAD"))
    refused(world, apex, HashMismatch.exit_code, "expected digest", arguments=("--from", "git"))


def test_upstream_missing(world: World, apex: Apex, tmp_path: Path) -> None:
    said = apex("source", "fetch", "--repository", f"file://user:secret@localhost{tmp_path}/absent")
    assert said.code == DownloadFailed.exit_code
    assert "secret" not in said.err
    assert world.left_over() == []


def test_nothing_offers_the_file(world: World, apex: Apex, monkeypatch: pytest.MonkeyPatch) -> None:
    world.sdist.rename(world.sdist.with_name("tiny_llama-1.1.tar.gz"))
    monkeypatch.setenv("PIP_FIND_LINKS", f"{world.sdist.parent} {world.sdist.parent}/absent")
    refused(world, apex, DownloadFailed.exit_code, world.sdist.name, "absent, which does not exist", "--from git")


def test_no_git(world: World, apex: Apex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(world, apex, GitFailed.exit_code, "git not found", "apt-get install git")
