"""The small stand-in for llama.cpp from tests/source, and a second pin: a later release of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from source.conftest import apex, series, world
from source.tiny import FILES, Said, World, git, make_sdist, write, write_pin

from apex_build.cli import main
from apex_build.source.tree_digest import digest_of, wanted
from apex_build.storage.digests import sha256_file

__all__ = ["apex", "make_later", "run", "series", "world"]
Run = Callable[..., Said]
MakeLater = Callable[[dict[str, bytes | None]], World]


@pytest.fixture
def run(world: World, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process, without adding a pin."""

    def run(*arguments: str | Path) -> Said:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return Said(int(ended.value.code or 0), said.out, said.err)

    return run


@pytest.fixture
def make_later(world: World, tmp_path: Path) -> MakeLater:
    """A second pin, `later`, whose source differs in these files; None removes a file."""

    def make(changed: dict[str, bytes | None]) -> World:
        files = {name: content for name, content in {**FILES, **changed}.items() if content is not None}
        sdist = make_sdist(tmp_path / "links" / "tiny_llama-2.0.tar.gz", files)
        git(world.upstream, "rm", "--quiet", "-r", ".")
        write(world.upstream, files)
        git(world.upstream, "add", "--all", "--force")
        git(world.upstream, "commit", "--quiet", "-m", "release 2.0")
        pin = dataclasses.replace(
            world.pin,
            name="later",
            commit=git(world.upstream, "rev-parse", "HEAD"),
            requirement="tiny-llama==2.0",
            file=sdist.name,
            sha256=sha256_file(sdist),
            tree_digest=digest_of((name, content) for name, content in files.items() if wanted(name)),
            size=sdist.stat().st_size,
        )
        later = World(
            pin,
            tmp_path / "later.toml",
            sdist,
            world.upstream,
            tmp_path / "patches of later",
            tmp_path / "trees" / "later",
            world.cache,
        )
        return write_pin(later)

    return make
