"""Header-only models for these tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_model.files import read
from shapes import QWEN_35B_A3B, TINY, write_header_only

from apex_build.gguf_model.catalogue import Model


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 35B-A3B in F16, 71 GB, as a sparse file."""
    return write_header_only(tmp_path_factory.mktemp("large") / "Qwen-35B-A3B-F16.gguf", QWEN_35B_A3B)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_header_only(tmp_path / "tiny.gguf", TINY)


@pytest.fixture
def tiny_model(tiny: Path) -> Model:
    return read(tiny)
