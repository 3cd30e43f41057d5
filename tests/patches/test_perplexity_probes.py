"""llama-perplexity scores a model with tensors quantized in memory, and restores them."""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_edit import Array, changed, copy
from waiting import until

from apex_build.native.toolset import Toolset

Ran = subprocess.CompletedProcess[str]
Run = Callable[..., Ran]
Rows = list[tuple[str, int, int, float, int]]

CONTEXT, CHUNKS, SCORED = 128, 5, 63
MANY = 100_000  # probes: more than are scored before the tool is killed, on any machine
# one of each kind: routed experts with and without data, dense, a type of the i-quants, the output
TYPES = {
    "blk.2.ffn_down_exps.weight": "iq2_xxs",
    "blk.2.ffn_gate_exps.weight": "q3_K",
    "blk.3.attn_q.weight": "q5_K",
    "blk.0.ffn_up_shexp.weight": "iq3_s",
    "blk.1.ssm_out.weight": "q4_0",
    "output.weight": "q6_K",
}


@pytest.fixture(scope="module")
def reference(tools: Toolset, testbed: Path, heldout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The testbed's log-probabilities."""
    out = tmp_path_factory.mktemp("reference") / "logits"
    command = [tools.tool("llama-perplexity"), "-m", testbed, "-f", heldout / "code.txt", "-c", CONTEXT, "-t", 1]
    command += ["--chunks", CHUNKS, "--kl-divergence-base", out]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return out


def probe(name: str, types: dict[str, str]) -> str:
    return "\t".join([name, *(f"{tensor}={kind}" for tensor, kind in types.items())]) + "\n"


def rows(path: Path) -> Rows:
    header, *lines = path.read_text().splitlines()
    assert header == "probe\tchunk\tn\tkld\tsame_top"
    table = [line.split("\t") for line in lines]
    return [(name, int(chunk), int(n), float(kld), int(same)) for name, chunk, n, kld, same in table]


@pytest.fixture
def run(tools: Toolset, testbed: Path, reference: Path, tmp_path: Path) -> Run:
    def run(probes: str, *arguments: object, model: Path = testbed, out: str = "out.tsv") -> Ran:
        (tmp_path / "probes.txt").write_text(probes)
        command = [tools.tool("llama-perplexity"), "-m", model, "-c", CONTEXT, "-t", 1, "--kl-divergence"]
        command += ["--kl-divergence-base", reference, "--kl-divergence-probes", tmp_path / "probes.txt"]
        command += ["--kl-divergence-output", tmp_path / out, *arguments]
        return subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace")

    return run


def test_a_probe_is_what_llama_quantize_makes_of_these_tensors(
    run: Run, tools: Toolset, testbed: Path, calibrated: Path, tmp_path: Path
) -> None:
    """The values from llama-quantize's file, written to a file with the model's original types, get the same scores."""
    edited = restored_from_quantized(tools, testbed, calibrated, TYPES, tmp_path)
    ran = run(probe("low", TYPES), "--imatrix", calibrated)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = rows(tmp_path / "out.tsv")
    assert run("plain\n", model=edited, out="edited.tsv").returncode == 0
    expected = rows(tmp_path / "edited.tsv")
    assert [row[:3] for row in found] == [("low", chunk, SCORED) for chunk in range(CHUNKS)]
    assert [row[1:] for row in found] == [row[1:] for row in expected]
    assert sum(row[3] for row in found) / SCORED / CHUNKS > 1e-3
    assert run(probe("low", TYPES | {"blk.2.ffn_down_exps.weight": "q2_K"}), out="without.tsv").returncode == 0
    assert rows(tmp_path / "without.tsv") != found, "the imatrix counts"


def restored_from_quantized(tools: Toolset, model: Path, imatrix: Path, types: dict[str, str], folder: Path) -> Path:
    """The model with these tensors' values from llama-quantize's file, in their original types."""
    (folder / "types.txt").write_text("".join(f"^{name}$={kind}\n" for name, kind in types.items()))
    command = [tools.tool("llama-quantize"), "--imatrix", imatrix, "--tensor-type-file", folder / "types.txt"]
    command += [model, folder / "quantized.gguf", "Q8_0", 1]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    values = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(folder / "quantized.gguf").tensors
        if tensor.name in types and tensor.tensor_type.name.lower() == types[tensor.name].lower()
    }
    assert values.keys() == types.keys()

    def restored(name: str, own: Array) -> Array:
        return values[name].reshape(own.shape).astype(own.dtype) if name in values else own

    return changed(model, folder / "edited.gguf", restored)


def test_the_head_is_scored_as_well(
    run: Run, tools: Toolset, testbed: Path, calibrated: Path, heldout: Path, tmp_path: Path
) -> None:
    """Like --mtp on a file with these types. Changing the head does not affect the trunk."""
    types = {
        "blk.6.ffn_down_exps.weight": "iq2_xxs",
        "blk.6.attn_q.weight": "q3_K",
        "blk.6.nextn.eh_proj.weight": "q2_K",
    }
    ran = run("plain\n" + probe("head", types) + "plain\n", "--imatrix", calibrated, "--mtp", "--mtp-depth", 2)
    assert ran.returncode == 0, ran.stderr[-3000:]
    table = np.genfromtxt(tmp_path / "out.tsv", delimiter="\t", names=True, dtype=None, encoding="ascii")
    assert [name for name in table.dtype.names or () if name.startswith("mtp2")] == [
        f"mtp2_{column}" for column in ("n", "agree", "p", "kld", "tokens", "tokens_p")
    ]
    plain, head, again = (table[start : start + CHUNKS] for start in (0, CHUNKS, 2 * CHUNKS))
    assert plain.tolist() == again.tolist() and head["kld"].tolist() == plain["kld"].tolist()
    assert head["mtp1_kld"].sum() > 1.01 * plain["mtp1_kld"].sum()

    edited = restored_from_quantized(tools, testbed, calibrated, types, tmp_path)
    command = [tools.tool("llama-perplexity"), "-m", edited, "-f", heldout / "code.txt", "-c", CONTEXT, "-t", 1]
    command += ["--chunks", CHUNKS, "--mtp", "--mtp-depth", 2, "--mtp-output-file", tmp_path / "scores.csv"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    scores = np.genfromtxt(tmp_path / "scores.csv", delimiter=",", names=True)
    for depth in (1, 2):
        for chunk in range(CHUNKS):
            own = scores[(scores["depth"] == depth) & (scores["pos"] // CONTEXT == chunk)]
            row = head[chunk]
            assert len(own) == row[f"mtp{depth}_n"] == SCORED + 1 - depth
            assert own["agree"].sum() == row[f"mtp{depth}_agree"]
            assert own["p"].sum() == pytest.approx(row[f"mtp{depth}_p"], rel=1e-5)
            assert own["kld"].sum() == pytest.approx(row[f"mtp{depth}_kld"], rel=1e-5)
    assert (head["mtp1_tokens"] == head["mtp1_n"] + head["mtp1_agree"]).all()
    assert np.allclose(head["mtp1_tokens_p"], head["mtp1_n"] + head["mtp1_p"])
    assert (head["mtp2_tokens"] <= head["mtp2_n"] + head["mtp1_agree"] + head["mtp2_agree"]).all()


def test_the_tensors_are_put_back_bit_for_bit(run: Run, calibrated: Path, tmp_path: Path) -> None:
    """Also for a model with F32 tensors. Probes do not depend on their order or on the number of threads."""
    low, other = probe("low", TYPES), probe("other", {"blk.0.ffn_gate_inp.weight": "Q4_0", "token_embd.weight": "q2_k"})
    assert run(f"as it is\n{low}{other}{low}\r\n\nas it is\n", "--imatrix", calibrated).returncode == 0
    found = rows(tmp_path / "out.tsv")
    each = [found[start : start + CHUNKS] for start in range(0, len(found), CHUNKS)]
    assert [part[0][0] for part in each] == ["as it is", "low", "other", "low", "as it is"]
    assert each[0] == each[4] and each[1] == each[3]
    assert all(abs(row[3]) / SCORED < 1e-4 and row[4] == SCORED for row in each[0])
    assert run(other + low, "--imatrix", calibrated, "-t", 3).returncode == 0
    assert rows(tmp_path / "out.tsv") == each[2] + each[1]


def test_the_sums_are_those_of_the_plain_kl_divergence(
    run: Run, tools: Toolset, testbed: Path, reference: Path, tmp_path: Path
) -> None:
    zeroed = changed(
        testbed,
        tmp_path / "zeroed.gguf",
        lambda name, values: values * 0 if name == "blk.4.ffn_up_exps.weight" else values,
    )
    command = [tools.tool("llama-perplexity"), "-m", zeroed, "-c", CONTEXT, "-t", 1, "--kl-divergence"]
    command += ["--kl-divergence-base", reference]
    said = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, errors="replace")
    line = next(line for line in (said.stdout + said.stderr).splitlines() if line.startswith("Mean    KLD:"))
    assert run("plain\n", model=zeroed).returncode == 0
    found = rows(tmp_path / "out.tsv")
    assert sum(row[3] for row in found) / (SCORED * CHUNKS) == pytest.approx(float(line.split()[2]), abs=1e-6)


@pytest.mark.parametrize(
    "arguments",
    ["-b 128", "-b 100", "-b 2048 -ub 64", "-b 300 -ub 300", "-b 2048 -fa off", "-b 7 -ub 3", "-b 256 --no-warmup"],
)
def test_batches_of_any_size(arguments: str, run: Run, calibrated: Path, tmp_path: Path) -> None:
    probes = "plain\n" + probe("low", TYPES)
    assert run(probes, "--imatrix", calibrated, out="usual.tsv").returncode == 0
    ran = run(probes, "--imatrix", calibrated, *arguments.split())
    assert ran.returncode == 0, ran.stderr[-3000:]
    usual, found = rows(tmp_path / "usual.tsv"), rows(tmp_path / "out.tsv")
    assert [row[:3] for row in found] == [row[:3] for row in usual]
    assert np.allclose(
        [row[3] for row in found], [row[3] for row in usual], rtol=0.02, atol=0.05
    )  # a token of 63 may go to another expert


def test_some_of_the_chunks(run: Run, tmp_path: Path) -> None:
    probes = "plain\n" + probe("low", {"blk.1.ffn_up_exps.weight": "q2_K"})
    assert run(probes, "-b", CONTEXT, out="all.tsv").returncode == 0
    found: Rows = []
    for start, chunks in ((0, 2), (2, 1), (3, 9)):
        assert run(probes, "-b", CONTEXT, "--from-chunk", start, "--chunks", chunks).returncode == 0
        found += rows(tmp_path / "out.tsv")
    assert sorted(found) == sorted(rows(tmp_path / "all.tsv"))


def test_a_tied_output_is_probed_as_well(run: Run, testbed: Path, tmp_path: Path) -> None:
    """The embeddings are also the output: both uses change, on a device too (test_device.py)."""
    tied = copy(testbed, tmp_path / "tied.gguf", keys={}, drop="output.weight")
    low = probe("low", {"token_embd.weight": "q2_K"})
    assert run(f"plain\n{low}plain\n", model=tied).returncode == 0
    found = rows(tmp_path / "out.tsv")
    plain, probed, again = (found[start : start + CHUNKS] for start in (0, CHUNKS, 2 * CHUNKS))
    assert plain == again and all(a[3] != b[3] for a, b in zip(plain, probed, strict=True))


def test_the_lines_are_there_before_the_run_has_ended(
    tools: Toolset, testbed: Path, reference: Path, tmp_path: Path
) -> None:
    """Results of a killed run are kept."""
    (tmp_path / "probes.txt").write_text("".join(probe(f"p{n}", {"output.weight": "q2_K"}) for n in range(MANY)))
    command = [tools.tool("llama-perplexity"), "-m", testbed, "-c", CONTEXT, "-t", 1, "-b", CONTEXT, "--kl-divergence"]
    command += ["--kl-divergence-base", reference, "--kl-divergence-probes", tmp_path / "probes.txt"]
    command += ["--kl-divergence-output", out := tmp_path / "out.tsv"]
    ran = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: out.exists() and out.read_text().count("\n") >= 8, ran)
    finally:
        ran.kill()
        ran.wait()
    assert len(rows(out)) < MANY * CHUNKS
    assert [row[:3] for row in rows(out)[:7]] == [(f"p{n // CHUNKS}", n % CHUNKS, SCORED) for n in range(7)]


@pytest.mark.parametrize(
    ("probes", "said"),
    [
        ("a\tblk.9.none.weight=q4_K\n", "the model has no tensor blk.9.none.weight"),
        ("a\toutput.weight=q9_K\n", "invalid 'output.weight=q9_K', expected TENSOR=TYPE"),
        ("a\toutput.weight=q8_K\n", "invalid 'output.weight=q8_K', expected TENSOR=TYPE"),  # a type of activations
        ("a\toutput.weight=i32\n", "invalid 'output.weight=i32', expected TENSOR=TYPE"),
        ("a\toutput.weight=\n", "invalid 'output.weight=', expected TENSOR=TYPE"),
        ("a\toutput.weight\n", "invalid 'output.weight', expected TENSOR=TYPE"),
        ("a\toutput.weight=q4_K\tt=q4_K\toutput.weight=q2_K\n", "output.weight is there twice"),
        (
            "a\tblk.0.ssm_conv1d.weight=q4_0\n",
            "rows of blk.0.ssm_conv1d.weight have 4 values, q4_0 needs a multiple of 32",
        ),
        ("a\toutput.weight=iq2_xs\n", "output.weight needs data in the imatrix (--imatrix) for iq2_xs"),
    ],
)
def test_probes_that_cannot_be(probes: str, said: str, run: Run, tmp_path: Path) -> None:
    """All probes are checked before the first one is scored."""
    ran = run(f"plain\n{probes}")
    assert ran.returncode == 1 and said in ran.stdout + ran.stderr
    assert not (tmp_path / "out.tsv").exists()


def test_a_quantized_model_is_refused(run: Run, tools: Toolset, testbed: Path, tmp_path: Path) -> None:
    command = [tools.tool("llama-quantize"), testbed, model := tmp_path / "q8.gguf", "Q8_0", 1]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    ran = run(probe("a", {"output.weight": "q4_K"}), model=model)
    assert ran.returncode == 1 and "output.weight is q8_0, expected F32, F16 or BF16" in ran.stdout + ran.stderr
    assert run("plain\n", model=model).returncode == 0


def test_values_that_cannot_be_quantized_are_refused(run: Run, testbed: Path, tmp_path: Path) -> None:
    model = changed(
        testbed,
        tmp_path / "spoilt.gguf",
        lambda name, values: values * np.nan if name == "blk.5.ffn_up_exps.weight" else values,
    )
    for kind in ("q8_0", "iq2_s"):  # some quantizers abort
        ran = run(probe("a", {"blk.5.ffn_up_exps.weight": kind}), model=model)
        assert ran.returncode == 1 and "blk.5.ffn_up_exps.weight can not be quantized" in ran.stdout + ran.stderr


def test_an_imatrix_that_does_not_fit(run: Run, calibrated: Path, tmp_path: Path) -> None:
    low = probe("a", {"blk.2.ffn_down_exps.weight": "q4_K"})
    other = copy(
        calibrated,
        tmp_path / "other.gguf",
        keys={},
        drop="blk.2.ffn_down_exps",
        add={
            "blk.2.ffn_down_exps.weight.in_sum2": "blk.3.attn_q.weight.in_sum2",
            "blk.2.ffn_down_exps.weight.counts": "blk.3.attn_q.weight.counts",
        },
    )
    ran = run(low, "--imatrix", other)
    assert ran.returncode == 1
    assert (
        "imatrix size 256 is different from tensor size 2048 for blk.2.ffn_down_exps.weight" in ran.stdout + ran.stderr
    )
    spoilt = changed(
        calibrated,
        tmp_path / "spoilt.gguf",
        lambda name, values: values * np.inf if name == "blk.2.ffn_down_exps.weight.in_sum2" else values,
    )
    ran = run(probe("a", {"blk.2.ffn_down_exps.weight": "iq2_xxs"}), "--imatrix", spoilt)
    assert ran.returncode == 1
    assert re.search(r"non-finite value \S+ for blk\.2\.ffn_down_exps\.weight", ran.stdout + ran.stderr)
    (tmp_path / "text.txt").write_text("no imatrix")
    ran = run(low, "--imatrix", tmp_path / "text.txt")
    assert ran.returncode == 1 and "failed to load the imatrix" in ran.stdout + ran.stderr


def test_options_that_go_together(
    run: Run, tools: Toolset, testbed: Path, reference: Path, heldout: Path, tmp_path: Path
) -> None:
    for name, at, value in (("context", 8, 65536), ("vocabulary", 12, 2046)):
        spoilt = bytearray(reference.read_bytes())
        struct.pack_into("<i", spoilt, at, value)
        (tmp_path / name).write_bytes(spoilt)
    for arguments, said in (
        (["--hellaswag"], "--kl-divergence-probes works only with --kl-divergence"),
        (["--winogrande"], "--kl-divergence-probes works only with --kl-divergence"),
        (["--multiple-choice"], "--kl-divergence-probes works only with --kl-divergence"),
        (["--from-chunk", CHUNKS], f"there is no chunk {CHUNKS} in"),
        (["--from-chunk", -1], "there is no chunk -1 in"),
        (["--mtp", "-c", 2 * CONTEXT], "has been computed with 128, the scores of the MTP head need the same context"),
        (["--mtp", "--mtp-output-file", tmp_path / "x"], "--mtp-output-file does not work with --kl-divergence-probes"),
        (["--kl-divergence-base", tmp_path / "none"], "failed to open"),
        (["--kl-divergence-probes", tmp_path / "none"], "failed to open"),
        (["--kl-divergence-output", tmp_path / "no" / "folder"], "for writing"),
        (["--kl-divergence-base", tmp_path / "context"], "has been computed with 65536"),
        (["--kl-divergence-base", tmp_path / "vocabulary"], "inconsistent vocabulary (2046 vs 2048)"),
    ):
        ran = run("plain\n", *arguments)
        assert ran.returncode == 1 and said in ran.stdout + ran.stderr, arguments
    base = [tools.tool("llama-perplexity"), "-m", testbed, "-f", heldout / "code.txt", "-c", CONTEXT, "-t", 1]
    for further, said in (
        (["--kl-divergence-probes", heldout / "code.txt"], "works only with --kl-divergence"),
        (["--kl-divergence", "--kl-divergence-probes", heldout / "code.txt"], "needs --kl-divergence-output"),
        (["--kl-divergence-output", tmp_path / "out"], "need --kl-divergence-probes"),
        (["--imatrix", tmp_path / "out"], "need --kl-divergence-probes"),
    ):
        ran = subprocess.run(
            [str(part) for part in (*base, *further)], capture_output=True, text=True, errors="replace"
        )
        assert ran.returncode == 1 and said in ran.stdout + ran.stderr, further
