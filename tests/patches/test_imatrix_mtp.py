"""llama-imatrix records the draft head, and takes its snapshots after whole batches."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from architectures import write_model
from gguf_edit import with_own_head_output, without_head
from reference import Reference

from apex_build.gguf_model.imatrix import Imatrix, read_imatrix
from apex_build.native.output import chunks_done
from apex_build.native.server import serve
from apex_build.native.toolset import Toolset

HEAD = "blk.6."
Run = Callable[..., Imatrix]


def imatrix(tool: Path, model: Path, text: Path, out: Path, *arguments: object) -> tuple[Imatrix, str]:
    command = [tool, "-m", model, "-f", text, "-o", out, "-t", 2, *arguments]
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace")
    assert ran.returncode == 0, ran.stderr[-3000:]
    return read_imatrix(out), ran.stdout + ran.stderr


@pytest.fixture(scope="session")
def text(heldout: Path) -> Path:
    return heldout / "code.txt"


@pytest.fixture
def patched(tools: Toolset, testbed: Path, text: Path, tmp_path: Path) -> Run:
    """Run the patched tool, with a new output file each time."""
    numbers = iter(range(100))

    def run(*arguments: object, model: Path = testbed) -> Imatrix:
        out = tmp_path / f"patched-{next(numbers)}.gguf"
        return imatrix(tools.tool("llama-imatrix"), model, text, out, *arguments)[0]

    return run


def same(a: Imatrix, b: Imatrix, names: set[str]) -> list[str]:
    """Names of entries that are not bit-identical."""
    return [
        n
        for n in sorted(names)
        if a.entries[n].counts != b.entries[n].counts
        or not np.array_equal(a.entries[n].values(), b.entries[n].values())
    ]


def far(a: Imatrix, b: Imatrix, names: set[str], bound: float = 5e-5) -> list[str]:
    """Names of entries with other counts, or with values that differ by more than the stock tool's rounding."""
    return [
        n
        for n in sorted(names)
        if a.entries[n].counts != b.entries[n].counts
        or not np.allclose(a.entries[n].values(), b.entries[n].values(), rtol=bound, atol=0)
    ]


def marks(said: str) -> dict[str, str]:
    """The running perplexity after each chunk: `[3]89.4257,`."""
    return dict(re.findall(r"\[(\d+)\](\d+\.\d+),", said))


def head_of(found: Imatrix) -> set[str]:
    return {name for name in found.entries if name.startswith(HEAD)}


CONFIGURATIONS = {
    "one sequence a batch": ["-c", 512, "-b", 512, "--chunks", 4],
    "three sequences, rows left over": ["-c", 512, "-b", 1536, "-ub", 512, "--chunks", 5],
    "batch smaller than context": ["-c", 512, "-b", 128, "--chunks", 3],
    "ubatch smaller than batch": ["-c", 512, "-b", 512, "-ub", 64, "--chunks", 3],
    "batch that does not divide the context": ["-c", 512, "-b", 100, "--chunks", 3],
    "flash attention off": ["-c", 512, "-b", 1024, "-fa", "off", "--chunks", 4],
    "flash attention on": ["-c", 512, "-b", 1024, "-fa", "on", "--chunks", 4],
    "without perplexity": ["-c", 512, "-b", 1024, "--no-ppl", "--chunks", 4],
    "with the output matrix": ["-c", 512, "-b", 512, "--process-output", "--chunks", 3],
}


@pytest.mark.parametrize("arguments", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_the_trunk_is_untouched_and_the_head_is_counted(
    arguments: list[object], stock_imatrix: Path, tools: Toolset, testbed: Path, text: Path, tmp_path: Path
) -> None:
    stock, stock_said = imatrix(stock_imatrix, testbed, text, tmp_path / "stock.gguf", *arguments)
    plain, _ = imatrix(tools.tool("llama-imatrix"), testbed, text, tmp_path / "plain.gguf", *arguments)
    mtp, said = imatrix(tools.tool("llama-imatrix"), testbed, text, tmp_path / "mtp.gguf", *arguments, "--mtp")

    trunk = set(stock.entries)
    assert not head_of(stock)
    assert set(plain.entries) == trunk and far(stock, plain, trunk) == []
    assert set(mtp.entries) - head_of(mtp) == trunk and same(plain, mtp, trunk) == []
    assert mtp.chunk_count == stock.chunk_count and mtp.chunk_size == stock.chunk_size
    if "--no-ppl" not in arguments:
        # the tools' logger may lose its last lines on a busy machine, stock or not: compare what both printed
        before, after = marks(stock_said), marks(said)
        assert (common := before.keys() & after.keys()) and {n: before[n] for n in common} == {
            n: after[n] for n in common
        }

    dense = {name: e.counts[0] for name, e in mtp.entries.items() if len(e.counts) == 1 and name.startswith("blk.")}
    assert len(set(dense.values())) == 1, "every dense matrix, of trunk and head, saw the same tokens"
    chunks = int(str(arguments[arguments.index("--chunks") + 1]))
    assert mtp.head_tokens == chunks * 512
    for name in head_of(mtp):
        if "_exps" in name:
            assert sum(mtp.entries[name].counts) == chunks * 512 * 2
    assert len(head_of(mtp)) == 13
    assert mtp.head_tokens is not None and plain.head_tokens is None and stock.head_tokens is None


@pytest.mark.parametrize("head", [[], ["--mtp"]], ids=["trunk", "head"])
def test_without_perplexity_the_data_is_the_same(
    head: list[str], tools: Toolset, testbed: Path, text: Path, tmp_path: Path
) -> None:
    """The output is not computed then. One chunk a batch, and several."""
    tool, arguments = tools.tool("llama-imatrix"), ["-c", 256, "--chunks", 5, *head]
    for batch in (256, 1024):
        scored, _ = imatrix(tool, testbed, text, tmp_path / "scored.gguf", *arguments, "-b", batch)
        plain, said = imatrix(tool, testbed, text, tmp_path / "plain.gguf", *arguments, "-b", batch, "--no-ppl")
        assert scored.entries.keys() == plain.entries.keys() and same(scored, plain, set(scored.entries)) == []
        assert [done for line in said.splitlines() if (done := chunks_done(line))][-1] == 5


@pytest.mark.parametrize("rows", ["post", "pre"])
def test_sums_agree_with_a_forward_pass_in_numpy(
    rows: str, tools: Toolset, testbed: Path, text: Path, patched: Run, request: pytest.FixtureRequest
) -> None:
    """Computed independently: tokens from llama-server, everything else from the GGUF file with NumPy."""
    if rows == "pre":
        request.getfixturevalue("rows_choice")
    context, chunks = 128, 4
    with serve(tools, testbed, arguments=["--ctx-size", "512"]) as server:
        answer = server.post(
            "/tokenize", {"content": text.read_text()[:8000], "add_special": True, "parse_special": False}
        )
    ids = answer["tokens"]
    flags = [] if rows == "post" else ["--mtp-rows", rows]
    found = patched("--mtp", *flags, "-c", context, "-b", context, "--chunks", chunks, "--no-ppl")
    assert found.head_rows == f"{rows}_norm"
    reference = Reference(testbed)
    for chunk in range(chunks):
        part = ids[chunk * context : (chunk + 1) * context]
        reference.head(part, reference.fed(reference.trunk(part), rows))
    for name in ("nextn.eh_proj", "ffn_down_exps", "ffn_gate_exps", "attn_q", "attn_output", "ffn_down_shexp"):
        entry, sums = found.entries[f"{HEAD}{name}.weight"], reference.recorder.sums[f"{HEAD}{name}.weight"]
        assert np.abs(entry.values() - sums).sum() / sums.sum() < 0.01, name
    eh_proj = found.entries[f"{HEAD}nextn.eh_proj.weight"].values()[0]
    assert np.allclose(
        eh_proj, reference.recorder.sums[f"{HEAD}nextn.eh_proj.weight"][0], rtol=0.01, atol=1e-3 * eh_proj.max()
    )


def test_several_sequences_give_what_one_gives(patched: Run) -> None:
    one = patched("--mtp", "-c", 256, "-b", 256, "--chunks", 8, "--no-ppl")
    four = patched("--mtp", "-c", 256, "-b", 1024, "--chunks", 8, "--no-ppl")
    for name in head_of(one):
        a, b = one.entries[name], four.entries[name]
        assert a.counts == b.counts
        assert np.abs(a.values() - b.values()).sum() / a.values().sum() < 1e-4


def test_split_runs_add_up(patched: Run, tools: Toolset, testbed: Path, tmp_path: Path) -> None:
    common = ["--mtp", "-c", 256, "-b", 256, "--no-ppl"]
    whole = patched(*common, "--chunks", 9)
    first = patched(*common, "--chunks", 4)
    continued = patched(*common, "--chunk", 4, "--chunks", 5, "--in-file", first.path)
    assert set(continued.entries) == set(whole.entries)
    assert same(whole, continued, set(whole.entries)) == []
    assert continued.head_tokens == whole.head_tokens == 9 * 256

    second = patched(*common, "--chunk", 4, "--chunks", 5)
    merged = tmp_path / "merged.gguf"
    command = [
        tools.tool("llama-imatrix"),
        "-m",
        testbed,
        "--in-file",
        first.path,
        "--in-file",
        second.path,
        "-o",
        merged,
    ]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    both = read_imatrix(merged)
    assert both.head_tokens == 9 * 256
    for name, entry in whole.entries.items():
        assert both.entries[name].counts == entry.counts
        assert np.allclose(both.entries[name].values(), entry.values(), rtol=1e-4, atol=1e-6 * entry.values().max())


def test_a_snapshot_is_the_result_of_its_chunks(patched: Run) -> None:
    """Without the patch, a snapshot includes the current batch only for tensors that the graph had reached."""
    common = ["--mtp", "-c", 256, "-b", 256, "--no-ppl"]
    whole = patched(*common, "--chunks", 8, "--output-frequency", 1, "--save-frequency", 3)
    three = patched(*common, "--chunks", 3)
    snapshot = read_imatrix(whole.path.with_name(whole.path.name + ".at_3"))
    assert snapshot.chunk_count == 3 and snapshot.head_tokens == three.head_tokens
    assert same(three, snapshot, set(three.entries)) == []
    assert whole.path.with_name(whole.path.name + ".at_6").exists()


def test_snapshots_come_with_several_sequences_a_batch(patched: Run) -> None:
    whole = patched("--mtp", "-c", 256, "-b", 1024, "--no-ppl", "--chunks", 12, "--save-frequency", 5)
    made = sorted(path.name.rpartition("_")[2] for path in whole.path.parent.glob(f"{whole.path.name}.at_*"))
    assert made == ["12", "8"], "the first batch ends past 5 are at 8 and 12 chunks"


def test_a_model_without_a_head_is_warned_of_once(
    stock_imatrix: Path, tools: Toolset, testbed: Path, text: Path, tmp_path: Path
) -> None:
    model = without_head(testbed, tmp_path / "headless.gguf")
    stock, _ = imatrix(stock_imatrix, model, text, tmp_path / "stock.gguf", "--chunks", 3, "-c", 256)
    mtp, said = imatrix(
        tools.tool("llama-imatrix"), model, text, tmp_path / "mtp.gguf", "--chunks", 3, "-c", 256, "--mtp"
    )
    assert [line for line in said.splitlines() if "MTP" in line or "mtp" in line] == [
        line for line in said.splitlines() if "the model has no MTP head, ignoring --mtp" in line
    ]
    assert said.count("ignoring --mtp") == 1
    assert set(mtp.entries) == set(stock.entries) and far(stock, mtp, set(stock.entries)) == []
    assert mtp.head_tokens is None


def test_a_head_with_an_output_matrix_of_its_own_gets_data_for_it(patched: Run, testbed: Path, tmp_path: Path) -> None:
    model = with_own_head_output(testbed, tmp_path / "own.gguf")
    shared = patched("--mtp", "-c", 256, "-b", 256, "--chunks", 3, "--process-output", "--no-ppl")
    own = patched("--mtp", "-c", 256, "-b", 256, "--chunks", 3, "--process-output", "--no-ppl", model=model)
    assert head_of(own) - head_of(shared) == {f"{HEAD}nextn.shared_head_head.weight"}
    assert own.entries[f"{HEAD}nextn.shared_head_head.weight"].counts == (3 * 256,)
    assert own.entries["output.weight"].counts == shared.entries["output.weight"].counts == (3 * 256,)


@pytest.mark.parametrize("batch", [128, 256], ids=["one sequence a batch", "two"])
def test_an_architecture_without_a_graph_for_its_head_is_left_alone(
    batch: int, stock_imatrix: Path, tools: Toolset, testbed: Path, text: Path, tmp_path: Path
) -> None:
    """An MTP context for such a model would run the trunk again and count it twice."""
    model = write_model("exaone-moe", testbed, tmp_path / "exaone.gguf")
    arguments = ["-c", 128, "-b", batch, "--chunks", 3, "--no-ppl"]
    stock, _ = imatrix(stock_imatrix, model, text, tmp_path / "stock.gguf", *arguments)
    mtp, said = imatrix(tools.tool("llama-imatrix"), model, text, tmp_path / "mtp.gguf", *arguments, "--mtp")
    assert said.count("the MTP head of this architecture can not be evaluated, ignoring --mtp") == 1
    assert set(mtp.entries) == set(stock.entries) and far(stock, mtp, set(stock.entries)) == []
    assert mtp.head_tokens is None
