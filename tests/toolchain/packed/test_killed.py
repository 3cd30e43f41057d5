"""Kill pack and import before and after each system call: the old build remains, or the new one, with its manifest."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from kill_points import run_until, traceable
from packed_builds import Origin

from apex_build.native.toolset import Toolset, open_build
from apex_build.storage.manifest import PACKED, read_manifest
from apex_build.storage.outputs import MANIFEST, beside
from apex_build.toolchain.build import cache as build_cache
from apex_build.toolchain.packed.packing import pack
from apex_build.toolchain.packed.unpacking import take_in

EACH = 7  # every seventh stop, from another one each time: test_artifacts.py kills the mechanism itself at every one

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not traceable(), reason="the system does not let a process trace its child"),
]


@pytest.fixture
def toolset(origin: Origin) -> Toolset:
    (root,) = (path for path in (origin.cache / "builds").iterdir())
    return open_build(root)


@pytest.mark.parametrize("old", [False, True], ids=["nothing before", "an old one before"])
def test_export(old: bool, toolset: Toolset, origin: Origin, tmp_path: Path) -> None:
    out, at = tmp_path / "x.tar.zst", beside(tmp_path / "x.tar.zst", MANIFEST)
    stop, killed = 0, 0
    while True:
        for path in tmp_path.glob("*x.tar.zst*"):
            path.unlink()
        if old:  # packed before exports had manifests
            shutil.copy(origin.archive, out)
            with out.open("ab") as file:
                file.write(b"\0")
        if run_until(lambda: pack(toolset, origin.source, out), stop) is None:
            break
        killed += 1
        found = read_manifest(at)
        whole = out.exists() and found is not None and found.describes(out)
        assert whole or (out.stat().st_size == origin.archive.stat().st_size + 1 if old else not out.exists()), stop
        pack(toolset, origin.source, out)
        found = read_manifest(at)
        assert found is not None and found.kind == PACKED and found.describes(out)
        assert sorted(path.name for path in tmp_path.glob("*x.tar.zst*")) == [out.name, at.name]
        stop += EACH
    print(f"export: killed {killed} times")
    assert killed > 10


def test_import(origin: Origin, tmp_path: Path, cache: Path) -> None:
    key, stop, killed = next((origin.cache / "builds").iterdir()).name, 0, 0
    while True:
        shutil.rmtree(cache, ignore_errors=True)
        if run_until(lambda: take_in(origin.archive), stop) is None:
            break
        killed += 1
        there = build_cache.look_up(key)
        assert build_cache.damage(key) == "" and (there is None or build_cache.verify(there) == 5)
        assert build_cache.verify(take_in(origin.archive).toolset) == 5
        assert [path.name for path in (cache / "builds").iterdir()] == [key]
        stop += 3 * EACH
    print(f"import: killed {killed} times")
    assert killed > 10
