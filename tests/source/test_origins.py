"""Fetching: three origins, one digest; and every way in which what comes can be wrong."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from source.tiny import FILES, Apex, World, add, git, make_sdist, make_tarball, write_pin

from apex_build.errors import (
    ArchiveUnsafe,
    DownloadFailed,
    GitFailed,
    HashMismatch,
    OutputUnwritable,
    SourceMissing,
    TreeEdited,
)
from apex_build.identity import sha256_file
from apex_build.source import archive as archives
from apex_build.source.contents import digest_of, wanted
from apex_build.source.download import cached_sdist
from apex_build.source.fetch import fetch, verify
from apex_build.source.tree import require_tree, tree_path


def files_of(tree: Path) -> dict[str, bytes]:
    found = (path for path in tree.rglob("*") if path.is_file() and ".git" not in path.relative_to(tree).parts)
    return {path.relative_to(tree).as_posix(): path.read_bytes() for path in found}


def tarball_of(world: World, path: Path) -> Path:
    git(world.upstream, "archive", "--format=tar.gz", "--prefix=llama.cpp-tiny/", f"--output={path}", world.pin.commit)
    return path


def test_three_origins_one_tree(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tarball = tarball_of(world, tmp_path / "tree.tar.gz")
    flat = make_tarball(tmp_path / "flat.tar", FILES.items())
    ways = {
        "pypi": {},
        "git": {"origin": "git"},
        "clone": {"origin": "git", "repository": str(world.upstream)},
        "tarball": {"origin": "archive", "archive": tarball},
        "sdist": {"origin": "archive", "archive": world.sdist},
        "flat": {"origin": "archive", "archive": flat},
    }
    heads = set()
    for name, options in ways.items():
        monkeypatch.setenv("APEX_SOURCE_DIR", str(tmp_path / name))
        done = fetch(world.pin, **options)  # type: ignore[arg-type]
        assert done.laid_out
        assert files_of(done.path) == {path: content for path, content in FILES.items() if wanted(path)}
        assert verify(world.pin).tree_digest == world.pin.tree_digest
        heads.add(git(done.path, "rev-parse", "HEAD"))
    assert len(heads) == 1, "modes of the origin, its time and its other files do not count"


def test_layout(world: World, apex: Apex) -> None:
    said = apex("source", "fetch")
    assert said.code == 0
    assert f"tree digest {world.pin.tree_digest} as pinned" in said.out
    assert git(world.tree, "rev-list", "--count", "HEAD") == "1"
    assert git(world.tree, "rev-parse", "apex-base") == git(world.tree, "rev-parse", "apex")
    assert git(world.tree, "status", "--porcelain", "--ignored") == ""
    assert f"Upstream-commit: {world.pin.commit}" in git(world.tree, "log", "-1", "--format=%B")
    assert os.access(world.tree / "convert_hf_to_gguf.py", os.X_OK)
    assert not os.access(world.tree / "tools/imatrix/imatrix.cpp", os.X_OK), "upstream's mode, which an sdist loses, does not count"
    assert world.left_over() == []
    again = apex("source", "fetch")
    assert again.code == 0
    assert "already at" in again.out


def test_users_git_configuration_does_not_matter(world: World, apex: Apex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(world.pin)
    base = git(world.tree, "rev-parse", "HEAD")
    home = tmp_path / "home"
    (home / "hooks").mkdir(parents=True)
    hook = home / "hooks" / "post-checkout"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/hook-ran\n")
    hook.chmod(0o755)
    (home / ".gitconfig").write_text(
        f"[core]\nautocrlf = true\nhooksPath = {home}/hooks\nexcludesFile = {home}/ignore\n[commit]\ngpgSign = true\n"
        "[init]\ndefaultBranch = other\ndefaultObjectFormat = sha256\n[user]\nname = Somebody\n[i18n]\ncommitEncoding = latin1\n"
    )
    (home / "ignore").write_text("*.cpp\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_AUTHOR_DATE", "2001-01-01T00:00:00Z")
    monkeypatch.setenv("APEX_SOURCE_DIR", str(tmp_path / "second"))
    assert apex("source", "fetch").code == 0
    monkeypatch.delenv("GIT_DIR")
    assert git(tree_path(world.pin), "rev-parse", "HEAD") == base
    assert not (tmp_path / "hook-ran").exists()


def test_download_is_reused_only_while_its_hash_is_right(world: World, apex: Apex) -> None:
    assert apex("source", "fetch").code == 0
    kept = cached_sdist(world.pin)
    assert sha256_file(kept) == world.pin.sha256
    world.sdist.unlink()
    assert apex("source", "fetch", "--force").code == 0, "from the cache"
    kept.write_bytes(kept.read_bytes()[:-1])
    said = apex("source", "fetch", "--force")
    assert said.code == DownloadFailed.exit_code
    assert f"no package index that pip is configured with offers {world.sdist.name}" in said.err
    assert not kept.exists()
    assert verify(world.pin), "the tree that was there stays"


# --- what comes is wrong -------------------------------------------------------------------------------------------------
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
    refused(world, apex, HashMismatch.exit_code, world.sdist.name, f"its sha256 is {found}, expected {world.pin.sha256}")
    refused(
        world, apex, HashMismatch.exit_code, world.sdist.name, f"its sha256 is {found}", arguments=("--archive", str(world.sdist))
    )


def test_larger_than_pinned(world: World, apex: Apex) -> None:
    with world.sdist.open("ab") as file:
        file.write(b"\0" * 100)
    refused(world, apex, HashMismatch.exit_code, f"larger than the {world.pin.size} bytes")


def test_truncated(world: World, apex: Apex) -> None:
    os.truncate(world.sdist, 300)
    refused(world, apex, DownloadFailed.exit_code, "is cut short: 300 bytes came of")
    refused(world, apex, DownloadFailed.exit_code, "is cut short: it has 300 bytes", arguments=("--archive", str(world.sdist)))


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
    refused(world, apex, DownloadFailed.exit_code, f"there is no archive {absent}", arguments=("--archive", str(absent)))


def test_archive_of_something_else(world: World, apex: Apex, tmp_path: Path) -> None:
    other = make_tarball(tmp_path / "other.tar.gz", [("top/README.md", b"hello\n"), ("top/CMakeLists.txt", b"\n")])
    refused(world, apex, HashMismatch.exit_code, "holds no llama.cpp", arguments=("--archive", str(other)))


def test_changed_tarball(world: World, apex: Apex, tmp_path: Path) -> None:
    files = {f"top/{name}": content for name, content in (FILES | {"ggml/src/ggml.c": b"evil\n"}).items()}
    other = make_tarball(tmp_path / "tree.tar.gz", files.items())
    refused(world, apex, HashMismatch.exit_code, "its digest is", world.pin.tree_digest, arguments=("--archive", str(other)))


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
        "is a symbolic link to 'ggml.c'",
    ),
    "link as folder": (lambda tar: add(tar, "top/src", type=tarfile.SYMTYPE, linkname="docs"), "is a symbolic link to 'docs'"),
    "hard link": (lambda tar: add(tar, f"{SRC}/hard.c", type=tarfile.LNKTYPE, linkname=f"{SRC}/ggml.c"), "is a hard link"),
    "link to outside": (lambda tar: add(tar, "top/docs/x", type=tarfile.SYMTYPE, linkname="../../../etc/passwd"), "points outside"),
    "link to root": (lambda tar: add(tar, "top/docs/x", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "points outside"),
    "hard link to outside": (lambda tar: add(tar, "top/docs/x", type=tarfile.LNKTYPE, linkname="../passwd"), "points outside"),
    "device": (lambda tar: add(tar, "top/docs/null", type=tarfile.CHRTYPE), "is a device"),
    "pipe": (lambda tar: add(tar, f"{SRC}/pipe", type=tarfile.FIFOTYPE), "is a device, a pipe"),
    "twice": (lambda tar: add(tar, f"{SRC}/ggml.c", b"other\n"), "occurs twice"),
    "twice, other spelling": (lambda tar: add(tar, f"./{SRC}//./ggml.c", b"other\n"), "occurs twice"),
    "control characters": (lambda tar: add(tar, f"{SRC}/a\nM 100644 inline b", b"x"), "control characters"),
    "second tree": (
        lambda tar: [add(tar, f"two/{n}CMakeLists.txt", b"x") for n in ("", "ggml/")] and None,
        "more than one source tree",
    ),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_archive(world: World, apex: Apex, tmp_path: Path, name: str) -> None:
    extra, words = UNSAFE[name]
    path = make_tarball(tmp_path / "unsafe.tar.gz", [(f"top/{file}", content) for file, content in FILES.items()], extra)
    before = sorted(tmp_path.rglob("*"))
    refused(world, apex, ArchiveUnsafe.exit_code, "unsafe.tar.gz", words, arguments=("--archive", str(path)))
    written = {path for path in tmp_path.rglob("*") if ".locks" not in str(path)} - set(before) - {world.tree.parent}
    assert not written


@pytest.mark.parametrize("name", ["parent", "symbolic link", "hard link", "device"])
def test_unsafe_sdist(world: World, apex: Apex, name: str) -> None:
    """Also when the hash is as pinned."""

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


def test_harmless_link_outside_the_wanted_files(world: World, tmp_path: Path) -> None:
    def link(tar: tarfile.TarFile) -> None:
        add(tar, "top/docs/link.md", type=tarfile.SYMTYPE, linkname="../README.md")

    path = make_tarball(tmp_path / "tree.tar.gz", [(f"top/{file}", content) for file, content in FILES.items()], link)
    assert fetch(world.pin, origin="archive", archive=path).laid_out


def test_absurd_sizes(world: World, apex: Apex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_FILE", 2000)
    members = [(f"top/{file}", content) for file, content in FILES.items()]
    large = make_tarball(tmp_path / "large.tar.gz", members, lambda tar: add(tar, f"{SRC}/large.c", b"\0" * 4000))
    refused(world, apex, ArchiveUnsafe.exit_code, "'top/ggml/src/large.c' claims 4000 bytes", arguments=("--archive", str(large)))
    monkeypatch.setattr(archives, "MAX_TOTAL", 3000)
    refused(world, apex, ArchiveUnsafe.exit_code, "refused at 'top/ggml/src/large.c'", arguments=("--archive", str(large)))

    def header(tar: tarfile.TarFile) -> None:
        member = tarfile.TarInfo(f"{SRC}/small.c")
        member.pax_headers = {"comment": "x" * 5000}
        tar.addfile(member)

    monkeypatch.setattr(archives, "MAX_TOTAL", 1 << 30)
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
    refused(world, apex, DownloadFailed.exit_code, f"git could not fetch commit {'1' * 40}", arguments=("--from", "git"))


def test_upstream_with_other_content(world: World, apex: Apex) -> None:
    (world.upstream / "ggml/src/ggml.c").write_text("other\n")
    git(world.upstream, "commit", "--quiet", "-am", "other")
    world = write_pin(world, commit=git(world.upstream, "rev-parse", "HEAD"))
    refused(world, apex, HashMismatch.exit_code, "its digest is", arguments=("--from", "git"))


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
    refused(world, apex, GitFailed.exit_code, "git was not found", "apt-get install git")


def test_wrong_command_lines(world: World, apex: Apex) -> None:
    for arguments in (
        ("--from", "archive"),
        ("--from", "git", "--archive", "x.tar.gz"),
        ("--archive", "x", "--repository", "y"),
        ("--from", "svn"),
    ):
        assert apex("source", "fetch", *arguments).code == 2
    assert not world.tree.parent.exists()


def test_folder_cannot_be_made(world: World, apex: Apex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("APEX_SOURCE_DIR", str(tmp_path / "file" / "trees"))
    said = apex("source", "fetch")
    assert said.code == OutputUnwritable.exit_code
    assert "cannot be written" in said.err


def test_missing_tree(world: World, apex: Apex) -> None:
    with pytest.raises(SourceMissing, match="has not been fetched"):
        require_tree(world.pin)
    for verb in (("source", "verify"), ("patch", "status"), ("patch", "apply"), ("patch", "save")):
        said = apex(*verb)
        assert said.code == SourceMissing.exit_code
        assert "try:   apex source fetch --pin tiny" in said.err


def test_foreign_folder_is_left_alone(world: World, apex: Apex) -> None:
    world.tree.mkdir(parents=True)
    (world.tree / "mine.txt").write_text("mine")
    for arguments in ((), ("--force",)):
        said = apex("source", "fetch", *arguments)
        assert said.code == TreeEdited.exit_code
        assert "is not a tree that apex laid out" in said.err
    assert (world.tree / "mine.txt").read_text() == "mine"


def test_outdated_tree_is_replaced(world: World, apex: Apex) -> None:
    fetch(world.pin)
    make_sdist(world.sdist, FILES | {"ggml/src/ggml.c": b"newer\n"})
    (world.upstream / "ggml/src/ggml.c").write_bytes(b"newer\n")
    files = FILES | {"ggml/src/ggml.c": b"newer\n"}
    digest = digest_of((name, content) for name, content in files.items() if wanted(name))
    newer = write_pin(world, sha256=sha256_file(world.sdist), size=world.sdist.stat().st_size, tree_digest=digest)
    assert apex("source", "verify").code == HashMismatch.exit_code
    assert "laid out for another digest" in apex("source", "status").out
    (world.tree / "note.txt").write_text("mine")
    said = apex("source", "fetch")
    assert said.code == TreeEdited.exit_code
    assert "new: note.txt" in said.err
    (world.tree / "note.txt").unlink()
    assert apex("source", "fetch").code == 0
    assert (newer.tree / "ggml/src/ggml.c").read_bytes() == b"newer\n"
    assert apex("source", "verify").code == 0


def test_killed_run_is_mended(world: World, apex: Apex) -> None:
    """What kill -9 can leave: a half-made folder, or a replacement between its two renames."""
    fetch(world.pin)
    base = git(world.tree, "rev-parse", "HEAD")
    half = world.tree.with_name(".tiny.part")
    half.mkdir()
    (half / "x").write_text("half")
    world.tree.rename(world.tree.with_name(".tiny.old"))
    assert apex("source", "fetch").code == 0
    assert git(world.tree, "rev-parse", "HEAD") == base
    assert world.left_over() == []


def test_two_at_once(world: World) -> None:
    command = [sys.executable, "-m", "apex_build", "source", "fetch", "--pin", str(world.toml)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert sum("laid out" in text for text in said) == 1
    assert verify(world.pin)
    assert world.left_over() == []


def test_interrupt(world: World, tmp_path: Path) -> None:
    """Ctrl-C while git is at work: exit code 130, nothing half-made, and no child left behind."""
    slow = tmp_path / "bin" / "git"
    slow.parent.mkdir()
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *fast-import*) touch {tmp_path}/started; exec sleep 60;; esac\n'
        f'PATH={os.environ["PATH"]} exec git "$@"\n'
    )
    slow.chmod(0o755)
    command = [sys.executable, "-m", "apex_build", "source", "fetch", "--pin", str(world.toml)]
    environment = os.environ | {"PATH": f"{slow.parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert world.left_over() == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
