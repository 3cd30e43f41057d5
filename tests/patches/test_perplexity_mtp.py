"""llama-perplexity scores the draft head, and feeds it rows in the order of the batch."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from architectures import write_model
from gguf_edit import uneven_norms, without_head
from reference import Array, Reference, sigmoid, softmax

from apex_build.native.server import serve
from apex_build.native.toolset import Toolset

Ran = subprocess.CompletedProcess[str]
Run = Callable[..., Ran]
Scores = dict[tuple[int, int], dict[str, float]]

_LINE = re.compile(
    r"MTP depth (\d+): agreement = ([\d.]+) \+/- ([\d.]+) %, mean p = ([\d.]+) \+/- ([\d.]+) %, "
    r"KLD = ([\d.]+) \+/- ([\d.]+), PPL = ([\d.]+) \+/- ([\d.]+), n = (\d+)"
)
_TOKENS = re.compile(r"MTP draft of (\d+): tokens per step = ([\d.]+) \+/- [\d.]+ \(greedy\), ([\d.]+) \+/-")


@pytest.fixture
def run(tools: Toolset, testbed: Path, heldout: Path) -> Run:
    def run(*arguments: object, model: Path = testbed, check: bool = True) -> Ran:
        command = [tools.tool("llama-perplexity"), "-m", model, "-f", heldout / "code.txt", "-t", 1, *arguments]
        ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace")
        assert not check or ran.returncode == 0, ran.stderr[-3000:]
        return ran

    return run


def scores(path: Path) -> Scores:
    table = np.genfromtxt(path, delimiter=",", names=True)
    names = table.dtype.names or ()
    return {(int(row["pos"]), int(row["depth"])): {name: float(row[name]) for name in names} for row in table}


def estimates(ran: Ran) -> dict[str, str]:
    """The running perplexity after each chunk, and the final one."""
    return dict(re.findall(r"(Final estimate: PPL|\[\d+\])( = [-+/. \d]+|\d+\.\d+(?=,))", ran.stdout + ran.stderr))


def log_softmax(logits: Array) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        "-c 256 -b 256 --chunks 4",
        "-c 256 -b 1024 --chunks 6",
        "-c 512 -b 1536 -ub 512 --chunks 5",
        "-c 512 -b 128 --chunks 2",
        "-c 512 -b 512 -ub 64 --chunks 2",
        "-c 512 -b 1024 -fa off --chunks 4",
        "-c 2048 -b 512 --chunks 2",
    ],
)
def test_the_perplexity_of_the_trunk_is_unchanged(run: Run, arguments: str, tmp_path: Path) -> None:
    plain = run(*arguments.split(), "--save-all-logits", tmp_path / "plain.kld")
    scored = run(*arguments.split(), "--save-all-logits", tmp_path / "scored.kld", "--mtp")
    assert (tmp_path / "plain.kld").read_bytes() == (tmp_path / "scored.kld").read_bytes()
    # the tools' logger may lose its last lines on a busy machine, where it is not flushed: compare what both printed
    before, after = estimates(plain), estimates(scored)
    assert (common := before.keys() & after.keys()) and {n: before[n] for n in common} == {n: after[n] for n in common}
    assert "Final estimate: PPL" in after
    assert "MTP depth" not in plain.stdout + plain.stderr
    context, chunks = int(arguments.split()[1]), int(arguments.split()[-1])
    counts = [int(found[-1]) for found in _LINE.findall(scored.stdout + scored.stderr)]
    assert counts == [chunks * (context - 1 - context // 2 - depth) for depth in range(3)]


def test_several_sequences_a_batch_score_as_one_does(run: Run, tmp_path: Path) -> None:
    """Without the fix for the order of pre-norm rows, the head gets rows of the first sequence for the second."""
    found = {}
    for batch in (128, 512, 2048):
        run("--mtp", "-c", 512, "-b", batch, "--chunks", 6, "--mtp-output-file", out := tmp_path / f"{batch}.csv")
        found[batch] = scores(out)
    for batch in (128, 2048):
        assert found[batch].keys() == found[512].keys()
        pairs = [(row, found[512][key]) for key, row in found[batch].items()]
        assert all(a["token"] == b["token"] for a, b in pairs)
        assert sum(a["head"] != b["head"] for a, b in pairs) <= 3
        assert max(abs(a["kld"] - b["kld"]) for a, b in pairs) < 0.05


@pytest.mark.parametrize(("rows", "uneven"), [("post", False), ("post", True), ("pre", True)])
def test_scores_agree_with_numpy(
    rows: str,
    uneven: bool,
    run: Run,
    tools: Toolset,
    testbed: Path,
    heldout: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Depth 2 gets the head's own rows, and sees what depth 1 left in the cache for earlier positions.

    Uneven final norms show which rows: those before and after the norm differ much.
    """
    if rows == "pre":
        request.getfixturevalue("rows_choice")
    model = uneven_norms(testbed, tmp_path / "uneven.gguf") if uneven else testbed
    context, chunks = 128, 4
    with serve(tools, testbed, arguments=["--ctx-size", "512"]) as server:
        text = (heldout / "code.txt").read_text()[:8000]
        ids = server.post("/tokenize", {"content": text, "add_special": True, "parse_special": False})["tokens"]
    out = tmp_path / "scores.csv"
    flags = [] if rows == "post" else ["--mtp-rows", rows]
    common = ["-c", context, "-b", 2 * context, "--chunks", chunks, "--mtp-output-file", out]
    ran = run("--mtp", *flags, "--mtp-depth", 2, *common, model=model)
    assert f"MTP rows: {rows}_norm\n" in ran.stdout + ran.stderr
    found, reference = scores(out), Reference(model)
    norm = f"blk.{reference.trunk_layers}.nextn.shared_head_norm"
    for depth in (1, 2):
        table = []
        for start in range(0, chunks * context, context):
            part = ids[start : start + context]
            hidden = reference.trunk(part)
            trunk = log_softmax(reference.logits(hidden))
            head = log_softmax(reference.logits(drafts(reference, part, hidden, depth, rows), norm))
            for row in range(context // 2 + depth - 1, context - 1):
                score = found[start + row + 1, depth]
                p, q = trunk[row], head[row]
                assert score["token"] == part[row + 1]
                same = (score["trunk"], score["head"]) == (p.argmax(), q.argmax())
                here = (np.exp(p) * (p - q)).sum(), -q[part[row + 1]], np.exp(p[q.argmax()])
                table.append((same, score["kld"], score["nll"], score["p"], *here))
        agreed, *figures = np.array(table, float).T
        assert agreed.mean() > (0.97 if uneven else 0.99), "but for ties"
        for there, here in zip(figures[:3], figures[3:], strict=True):
            assert np.isclose(there.mean(), here.mean(), rtol=0.01)
    if uneven:  # the head's own rows of the other kind give something else
        part = ids[:context]
        hidden, wrong = reference.trunk(part), "pre" if rows == "post" else "post"
        kept = slice(context // 2 + 1, context - 1)
        trunk = log_softmax(reference.logits(hidden))[kept]
        heads = (reference.logits(drafts(reference, part, hidden, 2, rows, chained), norm) for chained in (rows, wrong))
        right, mixed = ((np.exp(trunk) * (trunk - log_softmax(head)[kept])).sum(-1).mean() for head in heads)
        assert not np.isclose(right, mixed, rtol=0.03)


def drafts(reference: Reference, ids: list[int], hidden: Array, depth: int, rows: str, own: str = "") -> Array:
    """The head's hidden states at depth 1 or 2, one for each position of the text. `own`: feed it its own rows."""
    fed = reference.fed(hidden, rows)
    first = reference.head(ids, fed)
    if depth == 1:
        return first
    chained = reference.fed(first, own or rows, f"blk.{reference.trunk_layers}.nextn.shared_head_norm")
    of_trunk, of_head = head_inputs(reference, ids, fed), head_inputs(reference, ids, chained)

    def attention(_: Array, name: str, positions: npt.NDArray[np.int64]) -> Array:
        """Keys and values from the trunk's rows for earlier positions, from its own row for the last one."""
        _, _, keys, values = projections(reference, reference.norm(of_trunk, f"{name}.attn_norm"), name, positions)
        query, gate, own_keys, own_values = projections(
            reference, reference.norm(of_head, f"{name}.attn_norm"), name, positions
        )
        n, scale = len(ids), np.sqrt(reference.head_dim)
        before = np.where(np.tril(np.ones((n, n), bool), -1), np.einsum("qhd,khd->hqk", query, keys) / scale, -np.inf)
        own = np.einsum("qhd,qhd->hq", query, own_keys)[..., None] / scale
        weights = softmax(np.concatenate([before, own], axis=-1))
        mixed = np.einsum("hqk,khd->qhd", weights[..., :-1], values) + weights[..., -1].T[..., None] * own_values
        return reference.linear((mixed * sigmoid(gate)).reshape(n, -1).astype(np.float32), f"{name}.attn_output")

    return reference.block(of_head, reference.trunk_layers, attention, np.arange(len(ids)))


def head_inputs(reference: Reference, ids: list[int], rows: Array) -> Array:
    name = f"blk.{reference.trunk_layers}.nextn"
    before = np.concatenate([np.zeros_like(rows[:1]), rows[:-1]])
    both = [
        reference.norm(reference.weights["token_embd.weight"][ids], f"{name}.enorm"),
        reference.norm(before, f"{name}.hnorm"),
    ]
    return reference.linear(np.concatenate(both, axis=-1), f"{name}.eh_proj")


def projections(reference: Reference, x: Array, name: str, positions: npt.NDArray[np.int64]) -> tuple[Array, ...]:
    n, d = len(x), reference.head_dim
    query, gate = np.split(reference.linear(x, f"{name}.attn_q").reshape(n, reference.heads, 2 * d), 2, axis=-1)
    key = reference.linear(x, f"{name}.attn_k").reshape(n, reference.kv_heads, d)
    value = reference.linear(x, f"{name}.attn_v").reshape(n, reference.kv_heads, d)
    repeat = reference.heads // reference.kv_heads
    query = reference.rope(reference.norm(query, f"{name}.attn_q_norm"), positions)
    key = reference.rope(reference.norm(key, f"{name}.attn_k_norm"), positions)
    return query, gate, key.repeat(repeat, axis=1), value.repeat(repeat, axis=1)


def test_the_summary_is_that_of_the_file(run: Run, tmp_path: Path) -> None:
    ran = run(
        "--mtp",
        "-c",
        512,
        "-b",
        1024,
        "--chunks",
        4,
        "--mtp-depth",
        3,
        "--mtp-output-file",
        out := tmp_path / "scores.csv",
    )
    found, said = scores(out), ran.stdout + ran.stderr
    lines = _LINE.findall(said)
    assert [line[0] for line in lines] == ["1", "2", "3"]
    for line in lines:
        rows = [row for (_, depth), row in found.items() if depth == int(line[0])]
        agree, p, kld, nll = (np.array([row[name] for row in rows]) for name in ("agree", "p", "kld", "nll"))
        assert all(row["agree"] == (row["trunk"] == row["head"]) for row in rows) and len(rows) == int(line[-1])
        figures = [100 * agree.mean(), 100 * p.mean(), kld.mean(), np.exp(nll.mean())]
        errors = [100 * agree.std(), 100 * p.std(), kld.std(), np.exp(nll.mean()) * nll.std()] / np.sqrt(len(rows) - 1)
        assert np.allclose([float(line[i]) for i in (1, 3, 5, 7)], figures, rtol=1e-4, atol=1e-3)
        assert np.allclose([float(line[i]) for i in (2, 4, 6, 8)], errors, rtol=1e-2, atol=1e-3)
    for depth, greedy, sampled in _TOKENS.findall(said):
        steps = range(1, int(depth) + 1)
        starts = [pos - 1 for pos, d in found if d == 1 and (pos - 1 + int(depth), int(depth)) in found]
        for name, figure in (("agree", greedy), ("p", sampled)):
            chains = [np.cumprod([found[start + d, d][name] for d in steps]).sum() for start in starts]
            assert np.isclose(1 + np.mean(chains), float(figure), atol=2e-4)


def test_the_depth_does_not_change_what_is_said_of_the_lesser_ones(run: Run) -> None:
    one, four = (run("--mtp", "-c", 256, "-b", 512, "--chunks", 4, "--mtp-depth", depth) for depth in (1, 4))
    first, lines = (_LINE.findall(ran.stdout + ran.stderr) for ran in (one, four))
    assert len(first) == 1 and len(lines) == 4 and lines[0] == first[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--mtp-depth 0", "the MTP depth must be at least 1"),
        ("--mtp-depth 300", "an MTP depth of 300 needs a context of more than 256 tokens"),
        ("--ppl-stride 64", "--mtp works only when computing the perplexity"),
        ("--hellaswag", "--mtp works only when computing the perplexity"),
        ("--mtp-output-file /nowhere/scores.csv", "failed to open /nowhere/scores.csv"),
        ("--mtp-output-file /dev/full", "failed to write /dev/full"),
    ],
)
def test_what_cannot_be_scored_is_refused(run: Run, arguments: str, said: str) -> None:
    ran = run("--mtp", "-c", 256, "--chunks", 2, *arguments.split(), check=False)
    assert ran.returncode == 1 and said in ran.stdout + ran.stderr


def test_a_file_of_scores_needs_the_flag(run: Run, tmp_path: Path) -> None:
    ran = run("-c", 256, "--chunks", 2, "--mtp-output-file", tmp_path / "scores.csv", check=False)
    assert ran.returncode == 1 and "--mtp-output-file needs --mtp" in ran.stdout + ran.stderr
    assert not any(tmp_path.iterdir())


def test_an_automatic_size_of_ubatches_is_that_of_the_trunk(run: Run) -> None:
    """`-ub 0` means the batch size; the head has to ask the trunk's context for it."""
    automatic, given = (run("--mtp", "-c", 256, "-b", 256, "--chunks", 2, "-ub", size) for size in (0, 256))
    assert len(found := _LINE.findall(automatic.stdout + automatic.stderr)) == 3
    assert found == _LINE.findall(given.stdout + given.stderr)


@pytest.mark.parametrize("markup", [False, True], ids=["as text", "as tokens"])
def test_markup_is_read_as_tokens_where_that_is_asked_for(
    markup: bool, run: Run, tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path
) -> None:
    text, context, chunks = heldout / "chat.txt", 128, 4
    with serve(tools, testbed, arguments=["--ctx-size", "512"]) as server:
        asked = {"content": text.read_text()[:8000], "add_special": True, "parse_special": markup}
        ids = server.post("/tokenize", asked)["tokens"]
    flags = ["--parse-special"] if markup else []
    out = tmp_path / "scores.csv"
    run("-f", text, "--mtp", "--mtp-depth", 1, "-c", context, "--chunks", chunks, *flags, "--mtp-output-file", out)
    found = scores(out)
    assert len(found) == chunks * (context // 2 - 1)
    assert all(row["token"] == ids[position] for (position, _), row in found.items())


def test_models_without_a_head_that_runs_are_refused(run: Run, testbed: Path, tmp_path: Path) -> None:
    for model, said in (
        (without_head(testbed, tmp_path / "headless.gguf"), "the model has no MTP head"),
        (
            write_model("exaone-moe", testbed, tmp_path / "exaone.gguf"),
            "the MTP head of this architecture can not be evaluated",
        ),
    ):
        ran = run("--mtp", "-c", 128, "--chunks", 2, model=model, check=False)
        assert ran.returncode == 1 and said in ran.stdout + ran.stderr
        assert "MTP depth" not in ran.stdout + ran.stderr
