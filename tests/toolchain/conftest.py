"""Every test of the build works in a cache of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_project import Gate, make_source


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "the cache, größer"
    monkeypatch.setenv("APEX_CACHE_DIR", str(folder))
    monkeypatch.delenv("APEX_TOOLS", raising=False)
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
