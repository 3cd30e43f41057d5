"""Ask llama.cpp what it allocates besides the weights, without allocating it."""

from __future__ import annotations

from pathlib import Path

import pytest

from apex_build.errors import ToolKilled
from apex_build.native import output
from apex_build.native.footprint import footprint
from apex_build.native.run import run_tool
from apex_build.native.toolset import Toolset


def test_as_a_run_allocates_it(testbed: Path, tools: Toolset, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def f(n):\n    return n + 1\n\n" * 300)
    command: list[str | Path] = [tools.tool("llama-perplexity"), "-m", testbed, "-f", text, "-c", "512", "-b", "512"]
    seen = output.allocations(run_tool([*command, "--chunks", "2", "-t", "1", "-fit", "off", "-lv", "5"]).lines)
    asked = footprint(tools, testbed, context=512, vocabulary=2048)
    assert (asked.kv_cache, asked.kv_layers, asked.recurrent_state) == (
        seen.kv_cache,
        seen.kv_layers,
        seen.recurrent_state,
    )
    assert asked.kv_layers == 1 and asked.recurrent_state > 0
    assert asked.compute_buffers == pytest.approx(seen.compute_buffers, rel=0.1)


def test_grows_with_context_and_sequences(testbed: Path, tools: Toolset) -> None:
    small = footprint(tools, testbed, context=1024, vocabulary=2048)
    long = footprint(tools, testbed, context=4096, vocabulary=2048)
    many = footprint(tools, testbed, context=4096, vocabulary=2048, sequences=4)
    assert long.kv_cache == 4 * small.kv_cache
    assert long.recurrent_state == small.recurrent_state
    assert many.kv_cache == long.kv_cache
    assert many.recurrent_state == pytest.approx(4 * long.recurrent_state, rel=0.05)


def test_a_file_that_is_no_model(tools: Toolset, tmp_path: Path) -> None:
    path = tmp_path / "none.gguf"
    path.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ToolKilled, match="llama-fit-params was ended by SIGABRT"):
        footprint(tools, path, context=512, vocabulary=2048)
