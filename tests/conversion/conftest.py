"""The converter of the pinned source, and a Python that can run it."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def source(source_tree: Path) -> Path:
    return source_tree


@pytest.fixture(scope="session")
def python() -> Path:
    """A Python with torch and transformers. The tests do not install these: they take hundreds of megabytes."""
    if given := os.environ.get("APEX_CONVERT_PYTHON"):
        return Path(given)
    if find_spec("torch") and find_spec("transformers"):
        return Path(sys.executable)
    pytest.skip("set APEX_CONVERT_PYTHON to a Python with torch and transformers, or install apex-build[convert]")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("APEX_CACHE_DIR", str(folder))
    return folder
