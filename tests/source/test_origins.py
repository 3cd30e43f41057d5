"""Fetch from three origins, with one digest and one layout; kept or replaced as a whole, whatever interrupts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from source.tiny import FILES, Apex, World, git, make_sdist, make_tarball, tarball_of, write_pin
from waiting import until

from apex_build.errors import (
    DownloadFailed,
    HashMismatch,
    OutputUnwritable,
    SourceMissing,
    TreeEdited,
)
from apex_build.places import cache_root
from apex_build.source.fetch import fetch, verify
from apex_build.source.tree import require_tree, tree_path
from apex_build.source.tree_digest import digest_of, wanted
from apex_build.storage.digests import sha256_file

pytestmark = pytest.mark.slow  # fetches whole trees, with several processes


def files_of(tree: Path) -> dict[str, bytes]:
    found = (path for path in tree.rglob("*") if path.is_file() and ".git" not in path.relative_to(tree).parts)
    return {path.relative_to(tree).as_posix(): path.read_bytes() for path in found}


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
    assert f"tree digest {world.pin.tree_digest} matches the pin" in said.out
    assert git(world.tree, "rev-list", "--count", "HEAD") == "1"
    assert git(world.tree, "rev-parse", "apex-base") == git(world.tree, "rev-parse", "apex")
    assert git(world.tree, "status", "--porcelain", "--ignored") == ""
    assert f"Upstream-commit: {world.pin.commit}" in git(world.tree, "log", "-1", "--format=%B")
    assert os.access(world.tree / "convert_hf_to_gguf.py", os.X_OK)
    assert not os.access(world.tree / "tools/imatrix/imatrix.cpp", os.X_OK), (
        "upstream's mode, which an sdist loses, does not count"
    )
    assert world.left_over() == []
    again = apex("source", "fetch")
    assert again.code == 0
    assert "already at" in again.out


def test_users_git_configuration_does_not_matter(
    world: World, apex: Apex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(world.pin)
    base = git(world.tree, "rev-parse", "HEAD")
    home = tmp_path / "home"
    (home / "hooks").mkdir(parents=True)
    hook = home / "hooks" / "post-checkout"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/hook-ran\n")
    hook.chmod(0o755)
    (home / ".gitconfig").write_text(
        f"[core]\nautocrlf = true\nhooksPath = {home}/hooks\nexcludesFile = {home}/ignore\n[commit]\ngpgSign = true\n"
        "[init]\ndefaultBranch = other\ndefaultObjectFormat = sha256\n[user]\nname = Somebody\n[i18n]\ncommitEncoding "
        "= latin1\n"
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
    (kept,) = (cache_root() / "downloads" / world.pin.sha256).iterdir()
    assert sha256_file(kept) == world.pin.sha256
    world.sdist.unlink()
    assert apex("source", "fetch", "--force").code == 0, "from the cache"
    kept.write_bytes(kept.read_bytes()[:-1])
    said = apex("source", "fetch", "--force")
    assert said.code == DownloadFailed.exit_code
    assert f"no package index that pip is configured with offers {world.sdist.name}" in said.err
    assert not kept.exists()
    assert verify(world.pin), "the tree that was there stays"


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
        assert f"try:   apex source fetch --pin {world.toml}" in said.err


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
    assert "differs from the pin's digest" in apex("source", "status").out
    (world.tree / "note.txt").write_text("mine")
    said = apex("source", "fetch")
    assert said.code == TreeEdited.exit_code
    assert "new: note.txt" in said.err
    (world.tree / "note.txt").unlink()
    assert apex("source", "fetch").code == 0
    assert (newer.tree / "ggml/src/ggml.c").read_bytes() == b"newer\n"
    assert apex("source", "verify").code == 0


def test_killed_run_is_mended(world: World, apex: Apex) -> None:
    """What kill -9 can leave: an incomplete folder, or a replacement between its two renames."""
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
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert sum("laid out" in text for text in said) == 1
    assert verify(world.pin)
    assert world.left_over() == []


def group_exists(group: int) -> bool:
    """A child that was killed with its parent is there until the system has taken note."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_interrupt(world: World, tmp_path: Path) -> None:
    """Ctrl-C while git runs: exit code 130, nothing incomplete, and no child process left."""
    slow = tmp_path / "bin" / "git"
    slow.parent.mkdir()
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *fast-import*) touch {tmp_path}/started; exec sleep 3600;; esac\n'
        f'PATH={os.environ["PATH"]} exec git "$@"\n'
    )
    slow.chmod(0o755)
    command = [sys.executable, "-m", "apex_build", "source", "fetch", "--pin", str(world.toml)]
    environment = os.environ | {"PATH": f"{slow.parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until((tmp_path / "started").exists, process)
    process.send_signal(signal.SIGINT)
    _out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert world.left_over() == []
    until(lambda: not group_exists(process.pid))
