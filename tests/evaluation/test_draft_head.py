"""The evaluator `draft-head`: its figures compared with NumPy and the tool's summary, paired differences, and what it
rejects.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from architectures import write_model
from gguf_edit import copy, uneven_norms, without_head
from scoring import CONTEXT, SCORED, Figures, measure, perplexity_tool, plugin_module, quantize, task_of

from apex_build.errors import CalibrationSetInvalid, DiskTooSmall, EvaluationRefused, ParameterUnknown, ToolFailed
from apex_build.evaluation.intervals import Estimate, clustered_mean
from apex_build.hookspecs import Figure
from apex_build.native.toolset import Toolset
from apex_build.progress import Step

Array = npt.NDArray[np.float64]
CHUNKS, DEPTH = 10, 3
DIFFERENCES = {f"depth{depth}.{what}" for depth in (1, 2, 3) for what in ("agreement", "p", "kld")} | {
    f"tokens.{n}{suffix}" for n in (1, 2, 3) for suffix in ("", ".sampled")
}


@pytest.fixture(scope="module", autouse=True)
def cache(tools: Toolset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A separate cache, so that results are made here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APEX_CACHE_DIR", str(folder := tmp_path_factory.mktemp("cache")))
        yield folder


@pytest.fixture(scope="module")
def q3(tools: Toolset, testbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(tools, testbed, tmp_path_factory.mktemp("quantized") / "q3.gguf")


@pytest.fixture(scope="module")
def texts(heldout: Path) -> dict[str, Path]:
    return {"code": heldout / "code.txt", "chat": heldout / "chat.txt"}


@pytest.fixture(scope="module")
def found(cache: Path, tools: Toolset, testbed: Path, q3: Path, texts: dict[str, Path]) -> Figures:
    """Evaluate the 3-bit file on two texts, with the F16 as reference."""
    return measure("draft-head", tools, q3, texts, testbed)


@pytest.fixture(scope="module")
def tables(
    tools: Toolset, testbed: Path, q3: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Array]:
    """The CSV files of both models on both texts: pos, depth, token, trunk, head, agree, p, kld, nll."""
    folder = tmp_path_factory.mktemp("csv")
    result = {}
    for name, model in (("f16", testbed), ("q3", q3)):
        for domain, text in texts.items():
            out = folder / f"{name}-{domain}.csv"
            wanted = [
                "-f",
                text,
                "--chunks",
                CHUNKS,
                "--parse-special",
                "--mtp",
                "--mtp-depth",
                DEPTH,
                "--mtp-output-file",
                out,
            ]
            (folder / f"{name}-{domain}.txt").write_text(perplexity_tool(tools, model, *wanted))
            result[f"{name} {domain}"] = np.loadtxt(out, delimiter=",", skiprows=1)
            result[f"{name} {domain} said"] = np.array((folder / f"{name}-{domain}.txt").read_text())
    return result


def at(table: Array, depth: int) -> Array:
    found: Array = table[table[:, 1] == depth]
    return found


def chunks(rows: Array) -> npt.NDArray[np.int64]:
    return (rows[:, 0].astype(np.int64) - 1) // CONTEXT


def tokens(table: Array, n: int, column: int) -> tuple[Array, npt.NDArray[np.int64]]:
    """1 + the probabilities that the first 1, 2, ... n tokens of each draft are accepted; and the chunk of each."""
    value = {(int(row[0] - row[1]), int(row[1])): row[column] for row in table}
    starts = [start for start, depth in value if depth == n]
    chains = [1 + np.cumprod([value[start, depth] for depth in range(1, n + 1)]).sum() for start in starts]
    return np.array(chains), np.array(starts) // CONTEXT


def close(figure: Figure, estimate: Estimate, rel: float | None = None, abs: float | None = None) -> bool:
    return (figure.value, figure.low, figure.high) == pytest.approx(estimate, rel=rel, abs=abs)


def test_every_figure_agrees_with_numpy(found: Figures, tables: dict[str, Array]) -> None:
    table = tables["q3 code"]
    for depth in range(1, DEPTH + 1):
        rows = at(table, depth)
        assert len(rows) == CHUNKS * (SCORED - depth + 1)
        for name, column, scale in (("agreement", 5, 100), ("p", 6, 100), ("kld", 7, 1)):
            figure = found[f"depth{depth}.{name}", "code"]
            assert close(
                figure, clustered_mean(rows[:, column], chunks(rows)).times(scale), rel=1e-5
            ) and figure.n == len(rows)
        assert close(found[f"depth{depth}.ppl", "code"], clustered_mean(rows[:, 8], chunks(rows)).exp(), rel=1e-5)
        for suffix, column in (("", 5), (".sampled", 6)):
            chains, member = tokens(table, depth, column)
            figure = found[f"tokens.{depth}{suffix}", "code"]
            assert close(figure, clustered_mean(chains, member), rel=1e-5) and figure.n == len(rows)


def test_the_figures_are_those_of_the_tools_summary(found: Figures, tables: dict[str, Array]) -> None:
    said = str(tables["q3 code said"])
    lines = re.findall(
        r"MTP depth (\d): agreement = ([\d.]+) .*?mean p = ([\d.]+) .*?KLD = ([\d.]+) .*?PPL = ([\d.]+) .*?n = (\d+)",
        said,
    )
    assert len(lines) == DEPTH
    for depth, *values, n in lines:
        for name, value in zip(("agreement", "p", "kld", "ppl"), values, strict=True):
            figure = found[f"depth{depth}.{name}", "code"]
            assert figure.value == pytest.approx(float(value), rel=1e-4) and figure.n == int(n)
    for n, greedy, sampled in re.findall(
        r"MTP draft of (\d): tokens per step = ([\d.]+) .*?\(greedy\), ([\d.]+)", said
    ):
        assert found[f"tokens.{n}", "code"].value == pytest.approx(float(greedy), abs=1e-4)
        assert found[f"tokens.{n}.sampled", "code"].value == pytest.approx(float(sampled), abs=1e-4)


def test_differences_are_paired(found: Figures, tables: dict[str, Array]) -> None:
    ours, theirs = tables["q3 code"], tables["f16 code"]
    assert (ours[:, :3] == theirs[:, :3]).all()
    for depth in range(1, DEPTH + 1):
        rows, others = at(ours, depth), at(theirs, depth)
        for name, column, scale, unit in (
            ("agreement", 5, 100, "points"),
            ("p", 6, 100, "points"),
            ("kld", 7, 1, "nats"),
        ):
            figure = found[f"depth{depth}.{name}.difference", "code"]
            expected = clustered_mean(rows[:, column] - others[:, column], chunks(rows)).times(scale)
            assert close(figure, expected, rel=1e-3, abs=1e-5) and figure.unit == unit
        for suffix, column in (("", 5), (".sampled", 6)):
            (mine, member), (other, _) = (tokens(table, depth, column) for table in (ours, theirs))
            figure = found[f"tokens.{depth}{suffix}.difference", "code"]
            assert close(figure, clustered_mean(mine - other, member), rel=1e-3, abs=1e-5)
    kld, difference = found["depth1.p", ""], found["depth1.p.difference", ""]
    width, narrow = ((figure.high or 0) - (figure.low or 0) for figure in (kld, difference))
    assert narrow < width, "what pairing is for"
    assert {name.removesuffix(".difference") for name, _ in found if name.endswith(".difference")} == DIFFERENCES


def test_texts_together_are_all_of_their_positions(found: Figures, tables: dict[str, Array]) -> None:
    both = [at(tables[f"q3 {domain}"], 1) for domain in ("code", "chat")]
    text = np.repeat([0, 1], [len(rows) for rows in both])
    rows = np.concatenate(both)
    figure = found["depth1.agreement", ""]
    assert close(figure, clustered_mean(rows[:, 5], chunks(rows), text).times(100), rel=1e-5) and figure.n == len(rows)
    assert {domain for _, domain in found} == {"", "code", "chat"}
    assert found["tokens.3", ""].value == pytest.approx(
        np.mean([found["tokens.3", domain].value for domain in ("code", "chat")])
    )


def test_a_file_does_not_differ_from_itself(
    found: Figures, tools: Toolset, testbed: Path, texts: dict[str, Path], cache: Path
) -> None:
    """The reference was scored only once, for all files."""
    assert found and len(list(cache.glob("evaluation/*/draft-head.npz"))) == 4
    steps: list[Step] = []
    own = measure("draft-head", tools, testbed, texts, testbed, report=steps.append)
    assert steps == []
    differences = [figure for (name, _), figure in own.items() if name.endswith(".difference")]
    assert len(differences) == 3 * len(DIFFERENCES)
    assert all((figure.value, figure.low, figure.high) == (0, 0, 0) for figure in differences)


def test_one_text_and_few_chunks(tools: Toolset, testbed: Path, texts: dict[str, Path], cache: Path) -> None:
    steps: list[Step] = []
    few = measure("draft-head", tools, testbed, {"chat": texts["chat"]}, chunks=7, depth=1, report=steps.append)
    assert {domain for _, domain in few} == {""} and "depth2.agreement" not in {name for name, _ in few}
    assert all(figure.value is not None and figure.low is figure.high is None for figure in few.values())
    assert steps[-1].task == "draft-head: testbed-f16.gguf on chat" and (steps[-1].total, steps[-1].unit) == (
        7,
        "chunks",
    )
    assert not [path for path in cache.rglob("*") if path.suffix in (".part", ".csv")]


def test_the_rows_that_the_head_is_fed_with(
    rows_choice: None, tools: Toolset, testbed: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    """As known for the architecture, or as requested; reported with the first figure, and cached separately."""
    model, text = uneven_norms(testbed, tmp_path / "uneven.gguf"), {"code": texts["code"]}
    auto, post, pre = (
        measure("draft-head", tools, model, text, depth=1, rows=rows) for rows in ("auto", "post", "pre")
    )
    assert auto == post and auto["depth1.agreement", ""].note == "post_norm rows" and auto["depth1.p", ""].note == ""
    assert pre["depth1.agreement", ""].note == "pre_norm rows"
    for rows, figures in (("post", post), ("pre", pre)):
        said = perplexity_tool(
            tools,
            model,
            "-f",
            texts["code"],
            "--chunks",
            CHUNKS,
            "--mtp",
            "--mtp-depth",
            1,
            "--mtp-rows",
            rows,
            "--parse-special",
        )
        agreement = re.search(r"MTP depth 1: agreement = ([\d.]+)", said)
        assert agreement and figures["depth1.agreement", ""].value == pytest.approx(float(agreement[1]), abs=1e-3)
    assert (pre["depth1.agreement", ""].value or 0) > (post["depth1.agreement", ""].value or 0) + 1
    with pytest.raises(ParameterUnknown, match=r"draft-head\.rows takes auto, pre or post, not 'both'"):
        measure("draft-head", tools, model, text, rows="both")


def test_a_model_without_a_head(tools: Toolset, testbed: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    headless = without_head(testbed, tmp_path / "headless.gguf")
    with pytest.raises(EvaluationRefused, match=r"headless\.gguf has no draft head to score"):
        measure("draft-head", tools, headless, texts)
    task = task_of("draft-head", tools, headless, texts)
    with pytest.raises(
        ToolFailed, match=r"headless\.gguf: llama-perplexity ended with code 1(.|\n)*the model has no MTP head"
    ):
        plugin_module("draft_head", "scores").scored(task, "code")
    unknown = write_model("exaone-moe", testbed, tmp_path / "exaone.gguf")
    with pytest.raises(
        ToolFailed, match=r"exaone\.gguf: llama-perplexity ended(.|\n)*the MTP head of this architecture can not be"
    ):
        measure("draft-head", tools, unknown, texts)


def test_a_reference_without_a_head_gives_no_differences(
    tools: Toolset, testbed: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    headless = without_head(testbed, tmp_path / "headless.gguf")
    figures = measure("draft-head", tools, testbed, texts, headless)
    assert figures["depth1.agreement", "code"].value is not None
    missing = figures["depth1.agreement.difference", ""]
    assert missing.value is None and missing.note == "the reference has no draft head: headless.gguf"
    assert ("depth1.agreement.difference", "code") not in figures


def test_a_reference_that_reads_the_text_differently(
    tools: Toolset, testbed: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    other = copy(testbed, tmp_path / "other.gguf", keys={"tokenizer.ggml.pre": "default"})
    with pytest.raises(
        EvaluationRefused, match=r"other\.gguf were not scored on the same positions of .*code\.txt: \d+ and \d+ scores"
    ) as e:
        measure("draft-head", tools, testbed, {"code": texts["code"]}, other)
    assert str(testbed) in e.value.message and "differ in token at" in e.value.message and e.value.hint


@pytest.mark.parametrize("depth", [0, 64])
def test_a_depth_that_no_chunk_holds(depth: int, tools: Toolset, testbed: Path, texts: dict[str, Path]) -> None:
    with pytest.raises(
        ParameterUnknown,
        match=rf"draft-head\.depth={depth} does not fit draft-head\.context=128: expected from 1 to 63",
    ):
        measure("draft-head", tools, testbed, texts, depth=depth)


def test_a_text_that_is_too_short(tools: Toolset, testbed: Path, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short for two chunks.")
    kept = set(cache.glob("evaluation/*/*.npz"))
    with pytest.raises(
        CalibrationSetInvalid, match=r"short\.txt: the text is too short: expected at least 256 tokens.*found \d+$"
    ):
        measure("draft-head", tools, testbed, {"": tmp_path / "short.txt"})
    assert set(cache.glob("evaluation/*/*.npz")) == kept and not list(cache.rglob("*.part"))


def test_scores_that_are_no_scores(tools: Toolset, testbed: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    scores, figures = (plugin_module("draft_head", name) for name in ("scores", "figures"))
    for text, said in (
        ("", "expected 'pos,depth"),
        ("pos,depth,token,trunk,head,agree,p,kld,nll\n1,2,3\n", "cannot be read"),
    ):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(ToolFailed, match=said):
            scores.read_head_scores(tmp_path / "x.csv")
    lines = [
        f"{chunk * 128 + 65 + i},1,5,5,5,1,0.5,{'nan' if chunk == i == 3 else 0.1},2.0"
        for chunk in range(9)
        for i in range(63)
    ]
    (tmp_path / "x.csv").write_text("\n".join(["pos,depth,token,trunk,head,agree,p,kld,nll", *lines]))
    columns = dict(figures.columns_of([scores.read_head_scores(tmp_path / "x.csv")], 1, 128))
    made = {name: figures._figure(name, column.estimate(), column, "") for name, column in columns.items()}
    assert made["depth1.agreement"].value == 100 == made["depth1.agreement"].low
    assert made["depth1.kld"].value is None and "not finite numbers" in made["depth1.kld"].note
    assert made["depth1.ppl"].value == pytest.approx(np.exp(2.0))


def test_a_disk_too_small_for_the_scores(
    tools: Toolset, testbed: Path, texts: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: type("Usage", (), {"free": 64 << 20}))
    with pytest.raises(DiskTooSmall, match=r"the file with the scores of the draft head over 9 chunks takes") as caught:
        measure("draft-head", tools, testbed, {"code": texts["code"]}, chunks=9)
    assert "--set draft-head.chunks=2" in str(caught.value.hint)
    assert not list(cache.glob("evaluation/*/*.csv"))


def test_a_damaged_cache_is_said(tools: Toolset, testbed: Path, texts: dict[str, Path], cache: Path) -> None:
    one = {"code": texts["code"]}
    before = set(cache.glob("evaluation/*/*.npz"))
    measure("draft-head", tools, testbed, one, chunks=8)
    (kept,) = set(cache.glob("evaluation/*/*.npz")) - before
    size = kept.stat().st_size
    kept.write_bytes(kept.read_bytes()[:1000])
    measure("draft-head", tools, testbed, one, chunks=8)
    assert kept.stat().st_size == size, "a file that was cut is made again"
    kept.write_bytes(b"x" * size)
    with pytest.raises(EvaluationRefused, match=r"draft-head\.npz: damaged in the cache") as caught:
        measure("draft-head", tools, testbed, one, chunks=8)
    assert str(kept) in str(caught.value.hint)
