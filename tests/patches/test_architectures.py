"""For every architecture whose draft head the pin runs, all matrices of all heads get data, as many rows as the trunk.

The trunk's data does not change. Weights are random (tests/testbed/architectures.py): these tests check the graphs, not
the numbers.
"""

from __future__ import annotations

import csv
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from apex_runs import run_apex
from architectures import ARCHITECTURES, LAYERS, USED, write_model

from apex_build.gguf_model.imatrix import Imatrix, read_imatrix
from apex_build.native.toolset import Toolset
from apex_build.source.pins import load_pin

pytestmark = pytest.mark.usefixtures("tools")

_serves = load_pin().serves
assert _serves is not None
SERVES = _serves
RUN = sorted(SERVES.heads)
CONTEXT, CHUNKS = 128, 4
TOKENS = CONTEXT * CHUNKS
Run = Callable[..., Imatrix]


@pytest.fixture(scope="module")
def text(heldout: Path) -> Path:
    return heldout / "code.txt"


@pytest.fixture(scope="module")
def models(testbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("architectures")

    def model(name: str, **options: object) -> Path:
        out = folder / f"{name}-{'-'.join(f'{key}{value}' for key, value in options.items())}.gguf"
        return out if out.is_file() else write_model(name, testbed, out, **options)  # type: ignore[arg-type]

    return model


@pytest.fixture
def run(tools: Toolset, text: Path, tmp_path: Path) -> Run:
    numbers = iter(range(100))

    def run(model: Path, *arguments: object, tool: Path | None = None, chunks: int = CHUNKS) -> Imatrix:
        out = tmp_path / f"{next(numbers)}.gguf"
        command = [
            tool or tools.tool("llama-imatrix"),
            "-m",
            model,
            "-f",
            text,
            "-o",
            out,
            "-t",
            1,
            "--no-ppl",
            "-c",
            CONTEXT,
            "--chunks",
            chunks,
            *arguments,
        ]
        ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace")
        assert ran.returncode == 0, ran.stdout[-1000:] + ran.stderr[-3000:]
        return read_imatrix(out)

    return run


def head_matrices(name: str, model: Path) -> dict[str, int]:
    """The names of the matrices in the heads' blocks that a run can record, and their number of matrices."""
    found = {}
    for tensor in gguf.GGUFReader(model).tensors:
        block = re.match(r"blk\.(\d+)\.", tensor.name)
        left_out = (*ARCHITECTURES[name].unused, "nextn.embed_tokens.weight", "norm.weight", "sinks.weight")
        if block and int(block[1]) >= LAYERS and tensor.name.endswith(".weight") and not tensor.name.endswith(left_out):
            shape = [int(extent) for extent in tensor.shape]
            if len(shape) > 1 or "ffn_gate_inp_shexp" in tensor.name:
                found[tensor.name] = shape[2] if len(shape) > 2 else 1
    return found


def tokens_of(name: str, found: Imatrix) -> float:
    """Tokens that an entry saw; for experts, each token counts for those it was sent to."""
    counts = found.entries[name].counts
    total = sum(counts) / USED if "_exps" in name else max(counts)
    return total / 4 if found.head_rows == "streams" and ".nextn." in name else total


def same(a: Imatrix, b: Imatrix) -> list[str]:
    """Names of entries of the first that are not bit-identical in the second."""
    return [
        name
        for name, entry in a.entries.items()
        if name not in b.entries
        or entry.counts != b.entries[name].counts
        or not np.array_equal(entry.values(), b.entries[name].values())
    ]


@pytest.mark.parametrize("batch", [CONTEXT, 3 * CONTEXT], ids=["one sequence a batch", "three"])
@pytest.mark.parametrize("name", RUN)
def test_all_heads_are_counted_and_the_trunk_is_untouched(
    name: str, batch: int, models: Callable[..., Path], run: Run, stock_imatrix: Path
) -> None:
    model = models(name)
    stock, plain, mtp = (
        run(model, "-b", batch, tool=stock_imatrix),
        run(model, "-b", batch),
        run(model, "-b", batch, "--mtp"),
    )
    assert same(plain, mtp) == [] and set(plain.entries) == set(stock.entries)
    for entry in stock.entries.values():  # a pin may sum up in another order
        ours = plain.entries[entry.name]
        assert ours.counts == entry.counts and np.allclose(ours.values(), entry.values(), rtol=5e-5, atol=0), entry.name
    wanted = head_matrices(name, model)
    assert len(wanted) >= 6 * ARCHITECTURES[name].heads and set(mtp.entries) - set(stock.entries) == set(wanted)
    assert {entry: tokens_of(entry, mtp) for entry in wanted} == dict.fromkeys(wanted, TOKENS)
    assert all(mtp.entries[entry].values().max() > 0 for entry in wanted)
    assert mtp.head_tokens == TOKENS and mtp.head_rows == ARCHITECTURES[name].rows
    assert mtp.chunk_count == stock.chunk_count == CHUNKS and mtp.chunk_size == CONTEXT


SOME = [name for name in ("qwen3next", "step35", "hy_v3", "deepseek4", "nemotron_h_moe") if name in RUN]


@pytest.mark.parametrize("name", SOME)
def test_batches_of_any_size_give_the_same(name: str, models: Callable[..., Path], run: Run) -> None:
    """Several heads share the cells of one cache: a batch smaller than the context would show if they got mixed up."""
    whole, parts = run(models(name), "-b", CONTEXT, "--mtp"), run(models(name), "-b", CONTEXT // 2, "-ub", 32, "--mtp")
    for entry in head_matrices(name, models(name)):
        a, b = whole.entries[entry].values(), parts.entries[entry].values()
        assert np.abs(a - b).sum() / a.sum() < 0.02, entry  # a token or two may go to other experts
        assert tokens_of(entry, whole) == tokens_of(entry, parts) == TOKENS


@pytest.mark.parametrize("name", SOME)
def test_split_runs_and_snapshots(name: str, models: Callable[..., Path], run: Run) -> None:
    model = models(name)
    whole = run(model, "-b", CONTEXT, "--mtp", "--save-frequency", 3, chunks=7)
    first = run(model, "-b", CONTEXT, "--mtp", chunks=3)
    continued = run(model, "-b", CONTEXT, "--mtp", "--chunk", 3, "--in-file", first.path, chunks=4)
    assert same(whole, continued) == [] and set(whole.entries) == set(continued.entries)
    assert continued.head_tokens == whole.head_tokens == 7 * CONTEXT and continued.chunk_count == whole.chunk_count == 7
    snapshot = read_imatrix(whole.path.with_name(f"{whole.path.name}.at_3"))
    assert same(first, snapshot) == [] and snapshot.head_tokens == 3 * CONTEXT and snapshot.chunk_count == 3


def test_rows_of_two_kinds_are_not_combined(
    models: Callable[..., Path], run: Run, tools: Toolset, tmp_path: Path
) -> None:
    if not {"step35", "hy_v3"} <= set(RUN):
        pytest.skip("this pin's heads all take the same rows")
    files = [run(models(name), "-b", CONTEXT, "--mtp").path for name in ("hy_v3", "step35")]
    given = [part for file in files for part in ("--in-file", file)]
    command = [tools.tool("llama-imatrix"), "-m", models("hy_v3"), *given, "-o", tmp_path / "x.gguf"]
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert ran.returncode == 1 and f"post_norm in {files[0]}, pre_norm in {files[1]}" in ran.stdout + ran.stderr


OWN = [name for name in ("glm4moe", "step35", "deepseek4", "qwen35moe") if name in RUN]


@pytest.mark.parametrize("name", OWN)
def test_output_matrices_of_their_own_get_data(name: str, models: Callable[..., Path], run: Run) -> None:
    found = run(models(name, own=True), "-b", CONTEXT, "--mtp", "--process-output")
    for head in range(ARCHITECTURES[name].heads):
        entry = f"blk.{LAYERS + head}.nextn.shared_head_head.weight"
        assert found.entries[entry].counts == (TOKENS,)
    assert found.entries["output.weight"].counts == (TOKENS,), "the trunk's alone"


@pytest.mark.parametrize("name", ["step35"] if "step35" in RUN else [])
def test_a_later_head_is_fed_by_the_one_before_it(name: str, models: Callable[..., Path], run: Run) -> None:
    """The first head sees the same rows alone and with others after it; the second does not see the trunk's rows."""
    three, one = run(models(name), "-b", CONTEXT, "--mtp"), run(models(name, heads=1), "-b", CONTEXT, "--mtp")
    first = f"blk.{LAYERS}.nextn.eh_proj.weight"
    assert np.array_equal(three.entries[first].values(), one.entries[first].values())
    fed = [three.entries[f"blk.{LAYERS + head}.nextn.eh_proj.weight"].values() for head in range(3)]
    assert all(0.01 < np.abs(fed[k] - fed[k + 1]).sum() / fed[k].sum() < 2 for k in range(2))


@pytest.mark.parametrize("name", ["mimo2"] if "mimo2" in RUN else [])
def test_a_head_may_have_its_queries_keys_and_values_apart(name: str, models: Callable[..., Path], run: Run) -> None:
    """Like the trunk: llama.cpp accepts either there, and aborted here."""
    model = models(name, split=True)
    found, wanted = run(model, "-b", CONTEXT, "--mtp"), head_matrices(name, model)
    assert len(wanted) == 8 * ARCHITECTURES[name].heads, sorted(wanted)
    assert {entry: tokens_of(entry, found) for entry in wanted} == dict.fromkeys(wanted, TOKENS)


@pytest.mark.parametrize("name", [name for name in ("glm4moe", "mimo2", "deepseek2", "hy_v3") if name in RUN])
def test_heads_that_the_file_only_says_it_has(
    name: str, models: Callable[..., Path], run: Run, tools: Toolset, text: Path, tmp_path: Path
) -> None:
    """It warns and collects the trunk's data, and never aborts."""
    model = models(name, only_said=True)
    plain, mtp = run(model, "-b", CONTEXT), run(model, "-b", CONTEXT, "--mtp")
    assert same(plain, mtp) == [] and set(plain.entries) == set(mtp.entries) and not mtp.head_tokens
    command = [tools.tool("llama-perplexity"), "-m", model, "-f", text, "-t", 1, "-c", CONTEXT, "--chunks", 2, "--mtp"]
    ran = subprocess.run([*map(str, command)], capture_output=True, text=True, errors="replace")
    assert ran.returncode == 1 and "MTP" in ran.stderr + ran.stdout, "an error, no signal"
    common = ("calibrate", model, "--text", text, "-o", tmp_path / "x.gguf", "--chunks", 2, "--context", CONTEXT)
    assert "the file has no tensors for it" in run_apex(*common, code=75).stderr
    run_apex(*common, "--no-mtp")


def scores(tools: Toolset, model: Path, text: Path, out: Path, *arguments: object) -> tuple[list[dict[str, str]], str]:
    command = [tools.tool("llama-perplexity"), "-m", model, "-f", text, "-t", 1, "-c", CONTEXT, "--chunks", 2, "--mtp"]
    ran = subprocess.run(
        [*map(str, command), "--mtp-output-file", str(out), *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="replace",
    )
    assert ran.returncode == 0, ran.stdout[-1000:] + ran.stderr[-3000:]
    with out.open() as file:
        return list(csv.DictReader(file)), ran.stdout + ran.stderr


@pytest.mark.parametrize("name", RUN)
def test_drafts_are_scored_at_every_depth(
    name: str, models: Callable[..., Path], tools: Toolset, text: Path, tmp_path: Path
) -> None:
    heads = ARCHITECTURES[name].heads
    found, said = scores(tools, models(name), text, tmp_path / "scores.csv", "-b", 2 * CONTEXT)
    depths = heads if heads > 1 else 3
    assert {int(row["depth"]) for row in found} == set(range(1, depths + 1))
    assert f"MTP rows: {ARCHITECTURES[name].rows}\n" in said
    assert ("lowering the MTP depth to 2" in said) == (heads == 2)
    for depth in range(1, depths + 1):
        assert sum(int(row["depth"]) == depth for row in found) == 2 * (CONTEXT // 2 - depth)
        assert len({row["kld"] for row in found if int(row["depth"]) == depth}) > 10, "scores of each position"


@pytest.mark.parametrize("name", [name for name in ("hy_v3", "mimo2") if name in RUN])
def test_the_size_of_a_batch_does_not_change_the_scores(
    name: str, models: Callable[..., Path], tools: Toolset, text: Path, tmp_path: Path
) -> None:
    """Head d scores depth d. It sees all tokens of its draft, and the text before it through the trunk's rows."""
    found = [scores(tools, models(name), text, tmp_path / f"{size}.csv", "-ub", size)[0] for size in (32, 128)]
    close = [abs(float(a["kld"]) - float(b["kld"])) < 0.02 for a, b in zip(*found, strict=True)]
    assert sum(close) > 0.97 * len(close)


@pytest.mark.parametrize("name", [*RUN, *sorted(SERVES.heads_idle)])
def test_the_main_road(name: str, models: Callable[..., Path], tools: Toolset, text: Path, tmp_path: Path) -> None:
    """Calibrate and quantize as a user does; the error for a head that this pin cannot run names a pin that can."""
    model, imatrix = models(name), tmp_path / "imatrix.gguf"
    common = ("calibrate", model, "--text", text, "-o", imatrix, "--chunks", 4, "--context", CONTEXT, "--threads", 1)
    if name in SERVES.heads_idle:
        said = run_apex(*common, code=75).stderr
        assert "the draft head was not run" in said and "--no-mtp, for an imatrix of only the trunk" in said
        other = name in (load_pin("latest").serves or SERVES).heads
        assert ("apex build --pin latest, then run the same command with APEX_PIN=latest" in said) == other
        run_apex(*common, "--no-mtp")
        return
    run_apex(*common)
    out = tmp_path / "quantized.gguf"
    run_apex("quantize", model, "-o", out, "--policy", "i-quality", "--imatrix", imatrix, "--threads", 1)
    assert out.is_file()


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - SERVES.heads - SERVES.heads_idle))
def test_what_this_pin_cannot_load_is_said_at_once(
    name: str, models: Callable[..., Path], tools: Toolset, text: Path, tmp_path: Path
) -> None:
    said = run_apex("calibrate", models(name), "--text", text, "-o", tmp_path / "x.gguf", code=46).stderr
    assert "pin pr-22673" in said
    assert "apex build --pin latest, then run the same command with APEX_PIN=latest" in said
