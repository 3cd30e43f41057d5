"""The imatrix without the head's entries: all others are bit-identical, and nothing mentions the head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apex_build.errors import ImatrixInvalid
from apex_build.gguf_model.coverage import coverage
from apex_build.gguf_model.imatrix import HEAD_TOKENS, read_imatrix
from apex_build.gguf_model.model import read_model
from apex_build.native.run import run_tool
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins
from apex_build.sweep.without_head import write_without_head


def test_the_trunk_is_left_as_it_was(testbed: Path, calibrated: Path, headless_imatrix: Path, tmp_path: Path) -> None:
    model = read_model(testbed, load_plugins().role_of)
    out = tmp_path / "without.gguf"
    write_without_head(calibrated, model, out)
    before, after, stock = read_imatrix(calibrated), read_imatrix(out), read_imatrix(headless_imatrix)
    assert list(after.entries) == [name for name in before.entries if not name.startswith("blk.6.")]
    for name, entry in after.entries.items():
        for other in (before, stock):
            assert entry.counts == other.entries[name].counts
            assert np.array_equal(entry.values(), other.entries[name].values())
    assert (after.datasets, after.chunk_count, after.chunk_size) == (
        before.datasets,
        before.chunk_count,
        before.chunk_size,
    )
    assert after.head_tokens is None and HEAD_TOKENS not in after.metadata
    assert coverage(after, model).head_calibrated is False
    first = out.read_bytes()
    write_without_head(calibrated, model, out)
    assert out.read_bytes() == first


def test_the_format_before_gguf_is_refused(testbed: Path, heldout: Path, tools: Toolset, tmp_path: Path) -> None:
    old = tmp_path / "old.dat"
    wanted = [
        "-m",
        testbed,
        "-f",
        heldout / "chat.txt",
        "--output-format",
        "dat",
        "-o",
        old,
        "--chunks",
        "2",
        "-c",
        "128",
        "-b",
        "128",
    ]
    run_tool([tools.tool("llama-imatrix"), *map(str, wanted)])
    with pytest.raises(ImatrixInvalid, match="in the format before it"):
        write_without_head(old, read_model(testbed, load_plugins().role_of), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
