"""The hidden rows that feed the draft head, before or after the final norm: what the tools do, and what it is worth."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from architectures import write_model
from gguf_edit import imatrix_without_rows, uneven_norms
from reference import Reference

from apex_build.evaluation.intervals import clustered_mean
from apex_build.evaluation.task import read_prompts
from apex_build.gguf_model.imatrix import Imatrix, read_imatrix
from apex_build.native.server import serve
from apex_build.native.toolset import Toolset

Array = npt.NDArray[np.float32]
Run = Callable[..., subprocess.CompletedProcess[str]]
CONTEXT, CHUNKS = 128, 6
HEAD = "blk.6."
ROWS = ("post", "pre")
pytestmark = pytest.mark.usefixtures("rows_choice")


@pytest.fixture(scope="module")
def run(tools: Toolset, heldout: Path) -> Run:
    def run(tool: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [tools.tool(tool), *arguments, "-t", 1]
        ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace")
        assert not check or ran.returncode == 0, ran.stderr[-3000:]
        return ran

    return run


@pytest.fixture(scope="module")
def uneven(testbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_norms(testbed, tmp_path_factory.mktemp("uneven") / "uneven.gguf")


@pytest.fixture(scope="module")
def ids(tools: Toolset, testbed: Path, heldout: Path) -> list[int]:
    with serve(tools, testbed, arguments=["--ctx-size", "512"]) as server:
        text = (heldout / "code.txt").read_text()[:8000]
        found: list[int] = server.post("/tokenize", {"content": text, "add_special": True, "parse_special": False})[
            "tokens"
        ]
    return found


def scored(run: Run, model: Path, text: Path, out: Path, rows: str, *arguments: object) -> Array:
    """One row per position at depth 1: the columns of the tool's file."""
    ran = run(
        "llama-perplexity", "-m", model, "-f", text, "--mtp", "--mtp-rows", rows, "--mtp-output-file", out, *arguments
    )
    assert f"MTP rows: {rows}_norm\n" in ran.stdout + ran.stderr
    table = np.loadtxt(out, delimiter=",", skiprows=1)
    found: Array = table[table[:, 1] == 1]
    return found


def recomputed(reference: Reference, ids: list[int], rows: str) -> tuple[Array, Array]:
    """With NumPy: whether head and trunk agree, and the divergence, at each scored position of the chunks."""
    agree, divergence = [], []
    for start in range(0, CHUNKS * CONTEXT, CONTEXT):
        part = ids[start : start + CONTEXT]
        hidden = reference.trunk(part)
        head = reference.logits(reference.head(part, reference.fed(hidden, rows)), f"{HEAD}nextn.shared_head_norm")
        scored = slice(CONTEXT // 2, CONTEXT - 1)
        p, q = (
            x - np.logaddexp.reduce(x.astype(np.float64), axis=-1, keepdims=True)
            for x in (reference.logits(hidden), head)
        )
        agree.append((p.argmax(-1) == q.argmax(-1))[scored])
        divergence.append((np.exp(p) * (p - q)).sum(-1)[scored])
    return np.concatenate(agree), np.concatenate(divergence)


def test_the_scorer_is_fed_as_numpy_feeds_it(
    run: Run, uneven: Path, heldout: Path, ids: list[int], tmp_path: Path
) -> None:
    """With uneven norms the two kinds of rows differ much: each agrees only with its own recomputation."""
    common = ["-c", CONTEXT, "-b", 3 * CONTEXT, "--chunks", CHUNKS, "--mtp-depth", 1]
    tables = {rows: scored(run, uneven, heldout / "code.txt", tmp_path / f"{rows}.csv", rows, *common) for rows in ROWS}
    default = run("llama-perplexity", "-m", uneven, "-f", heldout / "code.txt", "--mtp", *common)
    assert "MTP rows: post_norm\n" in default.stdout + default.stderr
    reference = Reference(uneven)
    here = {rows: recomputed(reference, ids, rows) for rows in ROWS}
    for rows in ROWS:
        agree, divergence = here[rows]
        assert len(agree) == len(tables[rows]) == CHUNKS * (CONTEXT // 2 - 1)
        assert (tables[rows][:, 5] == agree).mean() > 0.98, "but for ties"
        assert np.isclose(tables[rows][:, 7].mean(), divergence.mean(), rtol=0.01)
    assert not np.isclose(here["pre"][1].mean(), here["post"][1].mean(), rtol=0.05), "the test can tell them apart"


def weight_of(model: Path, name: str) -> Array:
    return next(np.array(tensor.data) for tensor in gguf.GGUFReader(model).tensors if tensor.name == name)


@pytest.mark.parametrize("batch", [CONTEXT, 3 * CONTEXT], ids=["one sequence a batch", "three"])
def test_the_imatrix_is_of_the_rows_that_it_names(
    batch: int, run: Run, uneven: Path, heldout: Path, ids: list[int], tmp_path: Path
) -> None:
    reference = {rows: Reference(uneven) for rows in ROWS}
    found: dict[str, Imatrix] = {}
    for rows in ROWS:
        flags = [] if rows == "post" else ["--mtp-rows", rows]
        out = tmp_path / f"{rows}.gguf"
        common = [
            "-m",
            uneven,
            "-f",
            heldout / "code.txt",
            "-c",
            CONTEXT,
            "-b",
            batch,
            "--chunks",
            3,
            "--no-ppl",
            "-o",
            out,
        ]
        run("llama-imatrix", *common, "--mtp", *flags)
        found[rows] = read_imatrix(out)
        assert found[rows].head_rows == f"{rows}_norm"
        for start in range(0, 3 * CONTEXT, CONTEXT):
            part = ids[start : start + CONTEXT]
            reference[rows].head(part, reference[rows].fed(reference[rows].trunk(part), rows))
    name = f"{HEAD}nextn.eh_proj.weight"
    sums = {rows: reference[rows].recorder.sums[name] for rows in ROWS}
    for rows, other in (("post", "pre"), ("pre", "post")):
        off = {kind: np.abs(found[rows].entries[name].values() - sums[kind]).sum() / sums[kind].sum() for kind in ROWS}
        assert off[rows] < 0.01 < 0.1 < off[other]
    trunk = [name for name in found["pre"].entries if not name.startswith(HEAD)]
    assert all(np.array_equal(found["pre"].entries[n].values(), found["post"].entries[n].values()) for n in trunk)


def test_only_files_of_the_same_rows_are_combined(
    run: Run, tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path
) -> None:
    common = ["-m", testbed, "-f", heldout / "code.txt", "-c", 128, "-b", 128, "--chunks", 3, "--no-ppl"]
    post, pre, old, trunk, out = (tmp_path / f"{name}.gguf" for name in ("post", "pre", "old", "trunk", "out"))
    run("llama-imatrix", *common, "--mtp", "-o", post)
    run("llama-imatrix", *common, "--mtp", "--mtp-rows", "pre", "-o", pre)
    run("llama-imatrix", *common, "-o", trunk)
    imatrix_without_rows(post, old)
    assert read_imatrix(old).head_rows is None and read_imatrix(old).head_tokens == read_imatrix(post).head_tokens

    def combine(*files: Path, check: bool = True) -> str:
        given = [part for file in files for part in ("--in-file", file)]
        ran = run("llama-imatrix", "-m", testbed, *given, "-o", out, check=check)
        return ran.stdout + ran.stderr if ran.returncode else ""

    for first, second in ((post, pre), (pre, post), (old, post), (post, old)):
        names = {post: "post_norm", pre: "pre_norm", old: "unknown"}
        said = f"the MTP head was fed with different rows: {names[first]} in {first}, {names[second]} in {second}"
        assert said in combine(first, second, check=False) and not out.exists()
    for files, rows in (
        ((post, trunk, post), "post_norm"),
        ((pre, pre), "pre_norm"),
        ((trunk, pre), "pre_norm"),
        ((old, old), None),
    ):
        combine(*files)
        assert read_imatrix(out).head_rows == rows
        out.unlink()

    for before, flags, said in (
        (post, ["--mtp-rows", "pre"], f"post_norm in {post}, pre_norm with --mtp"),
        (pre, [], f"pre_norm in {pre}, post_norm with --mtp"),
        (old, [], f"unknown in {old}, post_norm with --mtp"),
    ):
        ran = run("llama-imatrix", *common, "--mtp", *flags, "--in-file", before, "-o", out, check=False)
        assert ran.returncode == 1 and said in ran.stdout + ran.stderr and not out.exists()
    run("llama-imatrix", *common, "--mtp", "--in-file", trunk, "-o", out)
    assert read_imatrix(out).head_rows == "post_norm"


@pytest.mark.parametrize("tool", ["llama-imatrix", "llama-perplexity"])
def test_the_switch_is_refused_where_it_can_do_nothing(
    tool: str, run: Run, testbed: Path, heldout: Path, tmp_path: Path
) -> None:
    common = ["-m", testbed, "-f", heldout / "code.txt", "-c", 128, "--chunks", 2]
    out = ["-o", tmp_path / "x.gguf"] if tool == "llama-imatrix" else []
    ran = run(tool, *common, *out, "--mtp-rows", "pre", check=False)
    assert ran.returncode == 1 and "--mtp-rows needs --mtp" in ran.stdout + ran.stderr
    ran = run(tool, *common, *out, "--mtp", "--mtp-rows", "both", check=False)
    assert ran.returncode == 1 and "--mtp-rows" in ran.stdout + ran.stderr
    assert not any(tmp_path.iterdir())


# What a context gives, asked for directly: rows of all tokens or of the outputs alone, before or after the norm, of
# trunk or head.
_PROGRAM = """
#include "llama.h"
#include "../src/llama-ext.h"
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
int main(int argc, char ** argv) { // model, out, trunk or head, pre or post, masked or all
    llama_backend_init();
    auto mparams = llama_model_default_params();
    mparams.n_gpu_layers = 0;
    llama_model * model = llama_model_load_from_file(argv[1], mparams);
    auto cparams = llama_context_default_params();
    const bool head = !strcmp(argv[3], "head");
    cparams.n_ctx = 256; cparams.n_batch = 64; cparams.n_ubatch = 16; cparams.n_seq_max = 2;
    cparams.n_threads = cparams.n_threads_batch = 1;
    if (head) cparams.ctx_type = LLAMA_CONTEXT_TYPE_MTP;
    llama_context * ctx = llama_init_from_model(model, cparams);
    const bool masked = !strcmp(argv[5], "masked");
    llama_set_embeddings_pre_norm(ctx, true, masked);
    llama_set_mtp_rows(ctx, !strcmp(argv[4], "pre") ? LLAMA_MTP_ROWS_PRE_NORM : LLAMA_MTP_ROWS_DEFAULT);
    const int n_embd = llama_model_n_embd(model), n = 40;
    llama_batch batch = llama_batch_init(n, head ? n_embd : 0, 1);
    if (head) batch.token = (llama_token *) malloc(n*sizeof(llama_token));
    for (int i = 0; i < n; ++i) { // two sequences, one after the other; every third token an output
        batch.token[i] = 300 + (i*37)%1000; batch.pos[i] = i%20; batch.logits[i] = i%3 == 0;
        batch.n_seq_id[i] = 1; batch.seq_id[i][0] = i/20;
        for (int k = 0; head && k < n_embd; ++k) batch.embd[i*n_embd + k] = ((i*31 + k*17)%101)/50.0f - 1.0f;
    }
    batch.n_tokens = n;
    FILE * out = fopen(argv[2], "wb");
    for (int turn = 0; turn < 2; ++turn) { // again, with the graphs of the first time
        llama_memory_clear(llama_get_memory(ctx), true);
        if (llama_decode(ctx, batch)) return 1;
        for (int i = 0; i < n; ++i) {
            if (masked && !batch.logits[i]) continue;
            fwrite(llama_get_embeddings_pre_norm_ith(ctx, i), sizeof(float), n_embd, out);
        }
    }
    fclose(out);
    return 0;
}
"""


@pytest.fixture(scope="module")
def program(tools: Toolset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from apex_build.source.fetch import ensure_source
    from apex_build.source.pins import load_pin

    tree, folder = ensure_source(load_pin()), tmp_path_factory.mktemp("rows")
    (folder / "rows.cpp").write_text(_PROGRAM)
    library = tools.library("llama")
    command = [
        os.environ.get("CXX", "c++"),
        "-std=c++17",
        "-O1",
        f"-I{tree}/include",
        f"-I{tree}/ggml/include",
        "-o",
        str(folder / "rows"),
    ]
    command += [str(folder / "rows.cpp"), str(library), str(tools.library("ggml")), str(tools.library("ggml-base"))]
    subprocess.run([*command, f"-Wl,-rpath,{library.parent}"], check=True, capture_output=True)
    return folder / "rows"


@pytest.mark.parametrize("part", ["trunk", "head"])
def test_rows_for_all_tokens_and_for_outputs_alone(part: str, program: Path, uneven: Path, tmp_path: Path) -> None:
    """Both ways return the same row of a token; after the norm it is the normalized one, and up to date each time."""
    found: dict[tuple[str, str], Array] = {}
    for rows in ROWS:
        for which in ("all", "masked"):
            out = tmp_path / f"{rows}-{which}.bin"
            ran = subprocess.run(
                [program, uneven, out, part, rows, which], capture_output=True, text=True, errors="replace"
            )
            assert ran.returncode == 0, ran.stderr[-2000:]
            first, second = np.fromfile(out, np.float32).reshape(
                2, -1, weight_of(uneven, "output_norm.weight").shape[0]
            )
            assert np.array_equal(first, second)
            found[rows, which] = first
    outputs = np.arange(40) % 3 == 0
    weight = weight_of(uneven, "output_norm.weight" if part == "trunk" else f"{HEAD}nextn.shared_head_norm.weight")
    for which in ("all", "masked"):
        before = found["pre", which].astype(np.float64)
        normalized = before / np.sqrt(np.square(before).mean(-1, keepdims=True) + 1e-6) * weight
        assert np.allclose(found["post", which], normalized, rtol=1e-4, atol=1e-4)
    for rows in ROWS:
        assert len(found[rows, "all"]) == 40 and len(found[rows, "masked"]) == outputs.sum()
        assert np.allclose(found[rows, "all"][outputs], found[rows, "masked"], rtol=1e-4, atol=1e-4)


def acceptance(
    tools: Toolset, model: Path, heldout: Path, rows: str, every: int
) -> tuple[list[int], list[int], list[str]]:
    """Drafted and accepted tokens and the text for each prompt; greedy, drafts of up to 3."""
    prompts = read_prompts(heldout / "prompts.jsonl")[::every]
    arguments = [
        "--ctx-size",
        "2048",
        "--parallel",
        "1",
        "--threads",
        "1",
        "--spec-type",
        "draft-mtp",
        "--spec-draft-n-max",
        "3",
    ]
    with serve(tools, model, arguments=[*arguments, *([] if rows == "post" else ["--mtp-rows", rows])]) as server:
        answers = [
            server.completion(prompt.text, n_predict=48, cache_prompt=False, temperature=0.0) for prompt in prompts
        ]
        assert f"mtp_rows={rows}_norm" in server.output.read_text(errors="replace")
    timings = [answer["timings"] for answer in answers]
    return (
        [t["draft_n"] for t in timings],
        [t["draft_n_accepted"] for t in timings],
        [answer["content"] for answer in answers],
    )


def test_the_server_drafts_with_either_rows(tools: Toolset, uneven: Path, heldout: Path) -> None:
    """Other drafts, the same text."""
    drafted, accepted, texts = zip(*(acceptance(tools, uneven, heldout, rows, 12) for rows in ROWS), strict=True)
    assert all(sum(counts) > 0 for counts in drafted)
    assert accepted[0] != accepted[1]
    same = sum(one == other for one, other in zip(*texts, strict=True))
    assert same >= 0.75 * len(texts[0]), "a near tie may fall otherwise with another batch"


def test_an_architecture_without_a_choice_says_so(run: Run, testbed: Path, heldout: Path, tmp_path: Path) -> None:
    model = write_model("exaone-moe", testbed, tmp_path / "exaone.gguf")
    common = ["-m", model, "-f", heldout / "code.txt", "-c", 128, "--chunks", 2, "--mtp", "--mtp-rows", "pre"]
    ran = run("llama-perplexity", *common, check=False)
    assert ran.returncode == 1 and "the MTP head of this architecture can not be evaluated" in ran.stdout + ran.stderr
    ran = run("llama-imatrix", *common, "-o", tmp_path / "x.gguf")
    assert "the MTP head of this architecture can not be evaluated, ignoring --mtp" in ran.stdout + ran.stderr
    assert read_imatrix(tmp_path / "x.gguf").head_rows is None


def test_a_head_trained_on_post_norm_rows_scores_clearly_higher_with_them(
    run: Run, testbed: Path, heldout: Path, tmp_path: Path
) -> None:
    """The test that would have found the bug. Paired, over chunks from all four domains."""
    better, chunk = [], []
    for number, name in enumerate(("chat", "code", "reasoning", "tool-calling")):
        common = ["-c", 256, "-b", 256, "--chunks", 8, "--mtp-depth", 1, "--parse-special"]
        tables = {
            rows: scored(run, testbed, heldout / f"{name}.txt", tmp_path / "x.csv", rows, *common) for rows in ROWS
        }
        better.append(tables["post"][:, 5] - tables["pre"][:, 5])
        chunk.append((tables["post"][:, 0].astype(np.int64) - 1) // 256 + 1000 * number)
    gain = clustered_mean(np.concatenate(better), np.concatenate(chunk)).times(100)
    print(f"points of agreement gained: {gain}")
    assert gain.low is not None and gain.low > 0 and gain.value > 1


def test_a_head_trained_on_post_norm_rows_is_accepted_more_often_with_them(
    tools: Toolset, testbed: Path, heldout: Path
) -> None:
    rates = {}
    for rows in ROWS:
        drafted, accepted, _ = acceptance(tools, testbed, heldout, rows, 2)
        rates[rows] = 100 * sum(accepted) / sum(drafted)
    print(f"acceptance: {rates}")
    assert rates["post"] > rates["pre"] + 1
