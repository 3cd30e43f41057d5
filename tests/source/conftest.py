"""Fixtures for the tests of sources: a small stand-in for llama.cpp, and the command line to run on it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from source.tiny import FILES, IMATRIX, Apex, Said, World, commit, edited, git, make_sdist, write, write_pin

from apex_build.cli import main
from apex_build.source.fetch import fetch
from apex_build.source.pins import Pin
from apex_build.source.series import save_series
from apex_build.source.tree_digest import digest_of, wanted
from apex_build.storage.digests import sha256_file

MESSAGE = "imatrix: record the draft head\n\nWhy: it is never run.\n\nSigned-off-by: Dev <dev@example.org>"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    links = tmp_path / "links"
    links.mkdir()
    sdist = make_sdist(links / "tiny_llama-1.0.tar.gz", FILES)
    upstream = tmp_path / "upstream"
    upstream.mkdir()
    write(upstream, FILES)
    git(upstream, "init", "--quiet")
    git(upstream, "add", "--all", "--force")
    git(upstream, "update-index", "--chmod=+x", "tools/imatrix/imatrix.cpp")
    git(upstream, "commit", "--quiet", "-m", "upstream")
    commit = git(upstream, "rev-parse", "HEAD")
    (upstream / "later.txt").write_text("a later commit\n")
    git(upstream, "add", "--all")
    git(upstream, "commit", "--quiet", "-m", "later")

    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for key, value in {
        "APEX_SOURCE_DIR": tmp_path / "trees",
        "APEX_CACHE_DIR": tmp_path / "cache",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_RETRIES": "0",
        "PIP_FIND_LINKS": links,
    }.items():
        monkeypatch.setenv(key, str(value))
    pin = Pin(
        name="tiny",
        commit=commit,
        repository=upstream.as_uri(),
        requirement="tiny-llama==1.0",
        file=sdist.name,
        sha256=sha256_file(sdist),
        folder="vendor/llama.cpp",
        tree_digest=digest_of((name, content) for name, content in FILES.items() if wanted(name)),
        size=sdist.stat().st_size,
    )
    patches = tmp_path / "patches"
    return write_pin(
        World(pin, tmp_path / "tiny.toml", sdist, upstream, patches, tmp_path / "trees" / "tiny", tmp_path / "cache")
    )


@pytest.fixture
def apex(world: World, capsys: pytest.CaptureFixture[str]) -> Apex:
    """Run the command line in this process: `apex("source", "fetch")`. Adds the test pin."""

    def run(*arguments: str, pin: str | None = None) -> Said:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--pin", pin or str(world.toml)])
        said = capsys.readouterr()
        return Said(int(ended.value.code or 0), said.out, said.err)

    return run


@pytest.fixture
def series(world: World) -> World:
    """A world with a fetched tree and a series of two patches, applied."""
    fetch(world.pin)
    commit(
        world.tree,
        {IMATRIX: edited(10, "ten")},
        MESSAGE,
    )
    commit(
        world.tree,
        {"ggml/src/windows.c": b"one\r\ntwo and a half\r\nthree\r\n", "ggml/src/new.c": b"new\n"},
        "ggml: ändern",
    )
    save_series(world.pin)
    return world
