"""Every test of the build has a separate cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from packed_builds import Origin
from tiny_project import TINY, Gate, make_source

from apex_build.errors import DownloadFailed, ToolkitUnusable
from apex_build.toolchain.build.run import build, plan_build
from apex_build.toolchain.cuda.toolkit import CudaToolkit
from apex_build.toolchain.cuda.wheels import install
from apex_build.toolchain.packed.packing import pack


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "the cache, größer"
    monkeypatch.setenv("APEX_CACHE_DIR", str(folder))
    monkeypatch.delenv("APEX_TOOLS", raising=False)
    monkeypatch.setattr(
        "apex_build.toolchain.build.launcher._READY_WITHIN", 120.0
    )  # sccache is there, or the test fails
    for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "a source")


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gate:
    path = tmp_path / "gate"
    path.touch()
    monkeypatch.setenv("APEX_TEST_GATE", str(path))
    return Gate(path)


@pytest.fixture(scope="session")
def real_toolkit() -> CudaToolkit:
    """In the user's cache, since more than these tests need it."""
    try:
        return install()
    except (DownloadFailed, ToolkitUnusable) as error:
        pytest.skip(f"no CUDA toolkit from the package index here: {error.message}")


@pytest.fixture
def toolkit(real_toolkit: CudaToolkit, cache: Path) -> CudaToolkit:
    (cache / "toolchains").mkdir(parents=True)
    (cache / "toolchains" / real_toolkit.root.name).symlink_to(real_toolkit.root)
    return install()  # which finds it there


@pytest.fixture(scope="session")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Origin:
    folder = tmp_path_factory.mktemp("origin")
    source = make_source(folder / "a source")
    (source / "LICENSE").write_text("Do as you please.\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APEX_CACHE_DIR", str(folder / "cache"))
        toolset = build(plan_build(source, TINY, native=False)).toolset
        pack(toolset, source, folder / "tiny.tar.zst")
    return Origin(folder / "cache", source, folder / "tiny.tar.zst")


@pytest.fixture
def packed(origin: Origin, tmp_path: Path) -> Path:
    return Path(shutil.copy(origin.archive, tmp_path))


@pytest.fixture
def elsewhere(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a second machine, after everything was packed on the first."""
    folder = tmp_path / "another machine"
    monkeypatch.setenv("APEX_CACHE_DIR", str(folder))
    return folder
