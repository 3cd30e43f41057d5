"""`apex inspect IMATRIX`: draw the tokens of each expert."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from apex_runs import run_apex

from apex_build.cli import heat
from apex_build.gguf_model.expert_grid import expert_grid
from apex_build.gguf_model.imatrix import read_imatrix


def written(path: Path, tokens: npt.NDArray[np.float32], rest: int = 1) -> Path:
    """An imatrix with layers of these expert counts, and a dense weight in each layer."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["x"])
    writer.add_uint32("imatrix.chunk_count", 8)
    writer.add_uint32("imatrix.chunk_size", 512)
    for layer, counts in enumerate(tokens):
        for name, some in ((f"blk.{layer}.ffn_up_exps.weight", counts), (f"blk.{layer}.attn_q.weight", np.ones(rest))):
            writer.add_tensor(f"{name}.in_sum2", np.ones((len(some), 4), dtype=np.float32))
            writer.add_tensor(f"{name}.counts", some.astype(np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def skewed(tmp_path: Path) -> Path:
    tokens = np.floor(np.exp(np.random.default_rng(1).normal(6, 1.6, (5, 256)))).astype(np.float32)
    tokens[2, 100] = 0
    return written(tmp_path / "skewed.gguf", tokens)


def test_a_line_for_each_layer_within_80_columns(skewed: Path) -> None:
    grid = expert_grid(read_imatrix(skewed), head={4})
    assert grid is not None and grid.tokens.shape == (5, 256)
    shown = [*heat.lines(grid)]
    assert max(map(len, shown)) <= 80
    rows = [line for line in shown if " - " in line]
    assert len(rows) == 5 and "×" in rows[2] and "×" not in rows[0] and rows[4].startswith("head 4")
    assert rows[2].split()[-3] == "0" and rows[0].split()[-1] == str(int(grid.tokens[0].max()))


def test_even_counts_are_even(tmp_path: Path) -> None:
    grid = expert_grid(read_imatrix(written(tmp_path / "x.gguf", np.full((2, 8), 7, dtype=np.float32))))
    assert grid is not None
    assert [line for line in heat.lines(grid) if line.startswith("0")] == ["0 ▓▓▓▓▓▓▓▓ 7 - 7"]
    assert expert_grid(read_imatrix(written(tmp_path / "dense.gguf", np.ones((2, 1), dtype=np.float32)))) is None


@pytest.mark.slow
def test_the_plots(skewed: Path, tmp_path: Path) -> None:
    outs = [tmp_path / "x.png", tmp_path / "x.svg"]
    plots = [word for out in outs for word in ("--plot", out)]
    assert "tokens of experts 0 to 255 by layer" in run_apex("inspect", skewed, *plots).stdout
    first = [out.read_bytes() for out in outs]
    assert (
        first[0].startswith(b"\x89PNG")
        and b"<svg" in first[1]
        and b"no token: 1 of 1280" in first[1].replace(b"\n", b"")
    )
    assert "x.png exists" in run_apex("inspect", skewed, *plots, code=71).stderr
    run_apex("inspect", skewed, *plots, "--force")
    assert [out.read_bytes() for out in outs] == first, "the same data, the same bytes"


@pytest.mark.slow
def test_bad_input(skewed: Path, testbed: Path, tmp_path: Path) -> None:
    assert ".png or .svg" in run_apex("inspect", skewed, "--plot", tmp_path / "x.txt", code=2).stderr
    assert "is a model" in run_apex("inspect", testbed, "--plot", tmp_path / "x.png", code=2).stderr
    dense = written(tmp_path / "dense.gguf", np.ones((2, 1), dtype=np.float32))
    assert "no counts of experts" in run_apex("inspect", dense, "--plot", tmp_path / "x.png", code=42).stderr
    before = skewed.read_bytes()
    link = tmp_path / "link.png"
    link.symlink_to(skewed)
    assert "input" in run_apex("inspect", skewed, "--plot", link, "--force", code=71).stderr
    assert skewed.read_bytes() == before and not (tmp_path / "x.png").exists()
