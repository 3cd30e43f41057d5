"""`apex pin`: a release or a commit becomes a pin; a pin moves to another one only if that is green."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from source.tiny import FILES, IMATRIX, World, add, commit, folder, git, make_sdist
from workshop.conftest import MakeLater, Run

from apex_build.errors import (
    ArchiveUnsafe,
    DownloadFailed,
    HashMismatch,
    OutputUnwritable,
    PinUnknown,
    SeriesUnfit,
    TreeEdited,
)
from apex_build.source.fetch import fetch, further_files, verify
from apex_build.source.pins import load_pin
from apex_build.source.series import read_series, save_series
from apex_build.source.tree import tree_identity
from apex_build.workshop import results


def release(world: World, name: str = "llama_cpp_python-9.1.tar.gz", commit: str | None = None) -> Path:
    """A release of the package, in the folder that pip is configured to use."""
    top = name.removesuffix(".tar.gz")
    said = f"{commit or world.pin.commit}\n".encode()
    head = f"{top}/.git/modules/vendor/llama.cpp/HEAD"
    return make_sdist(world.sdist.with_name(name), FILES, lambda tar: None if commit == "" else add(tar, head, said))


def test_a_release(world: World, run: Run, tmp_path: Path) -> None:
    sdist = release(world)
    out = tmp_path / "next.toml"
    said = run("pin", "add", "next", "--pypi", "9.1", "-o", out, "--json")
    assert said.code == 0, said.err
    pin = load_pin(str(out))
    assert json.loads(said.out) == {
        "pin": "next",
        "file": str(out),
        "commit": pin.commit,
        "carrier": "llama-cpp-python==9.1",
        "tree_digest": pin.tree_digest,
    }
    assert (pin.name, pin.commit, pin.tree_digest) == ("next", world.pin.commit, world.pin.tree_digest)
    assert (pin.requirement, pin.file, pin.size) == ("llama-cpp-python==9.1", sdist.name, sdist.stat().st_size)
    assert pin.patches_folder == tmp_path / "next-patches"
    assert run("source", "fetch", "--pin", out).code == 0
    assert verify(pin)
    before = out.read_bytes()
    said = run("pin", "add", "next", "--pypi", "9.1", "-o", out)
    assert said.code == OutputUnwritable.exit_code and out.read_bytes() == before


@pytest.mark.slow
def test_a_release_that_does_not_say_its_commit(world: World, run: Run, tmp_path: Path) -> None:
    release(world, commit="")
    out = tmp_path / "next.toml"
    add = ("pin", "add", "next", "--pypi", "9.1", "-o", out)
    said = run(*add)
    assert said.code == DownloadFailed.exit_code and "does not name the commit" in said.err and not out.exists()
    assert run(*add, "--commit", "a" * 40).code == 0
    assert load_pin(str(out)).commit == "a" * 40
    release(world, "llama_cpp_python-9.2.tar.gz", commit="b" * 40)
    said = run("pin", "add", "other", "--pypi", "9.2", "--commit", "a" * 40, "-o", tmp_path / "other.toml")
    assert said.code == HashMismatch.exit_code and f"expected commit {'a' * 40}, found {'b' * 40}" in said.err
    said = run("pin", "add", "none", "--pypi", "9.9", "-o", tmp_path / "none.toml")
    assert said.code == DownloadFailed.exit_code and "offers llama_cpp_python-9.9.tar.gz" in said.err
    assert run("pin", "add", "none").code == 2


def test_a_commit_that_only_git_has(world: World, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "tip.toml"
    add = ("pin", "add", "tip", "-o", out, "--repository", world.upstream.as_uri())
    assert run(*add, "--git", "abc").code == PinUnknown.exit_code
    assert run(*add, "--git", "c" * 40).code == DownloadFailed.exit_code
    said = run(*add, "--git", world.pin.commit)
    assert said.code == 0, said.err
    pin = load_pin(str(out))
    assert pin == dataclasses.replace(
        world.pin,
        name="tip",
        requirement="",
        file="",
        sha256="",
        folder="",
        size=None,
        own_file=out,
        patches=tmp_path / "tip-patches",
    )
    assert run("source", "fetch", "--pin", out).code == 0, "from git without being told"
    assert verify(pin).tree_digest == world.pin.tree_digest
    assert dict(further_files(pin, lambda name: name == "README.md")) == {"README.md": b"# llama.cpp\n"}
    out.write_text(out.read_text().replace('"git"', '"elsewhere"'))
    with pytest.raises(PinUnknown, match="`origin` must be git, found 'elsewhere'"):
        load_pin(str(out))


def test_an_archive_that_is_unsafe_pins_nothing(world: World, run: Run, tmp_path: Path) -> None:
    make_sdist(world.sdist.with_name("llama_cpp_python-9.1.tar.gz"), FILES, lambda tar: add(tar, "../evil", b"x"))
    said = run("pin", "add", "next", "--pypi", "9.1", "--commit", "a" * 40, "-o", tmp_path / "next.toml")
    assert said.code == ArchiveUnsafe.exit_code and not (tmp_path / "next.toml").exists()


def test_list(run: Run) -> None:
    rows = json.loads(run("pin", "list", "--json").out)
    assert [row["pin"] for row in rows][:1] == ["pr-22673"] and rows[0]["patches"] >= 8 and rows[0]["fetched"] is False
    assert "llama-cpp-python==0.3.24" in run("pin", "list").out


def test_bump_only_to_what_is_green(series: World, make_later: MakeLater, run: Run) -> None:
    later = make_later({"LICENSE": b"MIT or any\n"})
    fetch(later.pin)
    commit(later.tree, {"ggml/src/new.c": b"new\n"}, "ggml: new")
    save_series(later.pin)
    assert run("source", "fetch", "--force", "--pin", series.toml).code == 0  # the tree as apex lays it out
    with series.toml.open("a") as file:
        file.write('[serves]\narchitectures = ["tiny"]\nheads = []\nheads_idle = []\n')
    toml, patches = series.toml.read_bytes(), folder(series.patches)
    bump = ("pin", "bump", series.toml, "--to", later.toml)
    said = run(*bump)
    assert said.code == SeriesUnfit.exit_code
    assert "later is not green: it was not built yet; llama.cpp's tests were not run yet" in said.err
    assert (series.toml.read_bytes(), folder(series.patches)) == (toml, patches)

    results.remember(tree_identity(later.tree), "builds", {"ok": True, "error": None})
    results.remember(
        tree_identity(later.tree), "tests", {"ran": 1, "runnable": 1, "passed": 1, "broken": [], "left_out": {}}
    )
    mine = commit(series.tree, {IMATRIX: b"mine\n"}, "my work")
    said = run(*bump)
    assert said.code == TreeEdited.exit_code and "'my work'" in said.err
    assert (series.toml.read_bytes(), folder(series.patches)) == (toml, patches)
    git(series.tree, "reset", "--quiet", "--hard", f"{mine}~1")

    said = run(*bump, "--json")
    assert said.code == 0, said.err
    names = [patch.name for patch in read_series(later.pin)]
    assert json.loads(said.out) == {
        "pin": "tiny",
        "from": series.pin.commit,
        "commit": later.pin.commit,
        "patches": names,
    }
    pin = load_pin(str(series.toml))
    assert pin.serves and pin.serves.architectures == {"tiny"}, "what it said it serves, it says still"
    assert pin == dataclasses.replace(
        later.pin, name="tiny", own_file=series.toml, patches=series.patches, serves=pin.serves
    )
    assert [patch.subject for patch in read_series(pin)] == ["ggml: new"]
    assert folder(series.patches) == folder(later.patches), "and that of the other stays"
    assert run("source", "fetch", "--pin", series.toml).code == 0
    assert verify(pin) and (series.tree / "LICENSE").read_bytes() == b"MIT or any\n"
    assert run("pin", "bump", series.toml, "--to", series.toml).code == PinUnknown.exit_code
