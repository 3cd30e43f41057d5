"""The evaluators `perplexity` and `kld`: figures compared with NumPy and the tool's output, and what they reject."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf_edit import copy
from scoring import CONTEXT, SCORED, Figures, measure, perplexity_tool, plugin_module, quantize, task_of

from apex_build.errors import (
    CalibrationSetInvalid,
    DiskTooSmall,
    EvaluationRefused,
    ParameterUnknown,
    ToolFailed,
    VocabularyMismatch,
)
from apex_build.evaluation.intervals import clustered_mean
from apex_build.evaluation.reference import logits_bytes, reference_logits
from apex_build.native.toolset import Toolset
from apex_build.progress import Step

Array = npt.NDArray[np.float64]
CHUNKS = 10


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


def logits(path: Path) -> tuple[Array, npt.NDArray[np.int64]]:
    """Log-probabilities [chunk, position, token] and the following tokens, from a --save-all-logits file."""
    data = path.read_bytes()
    magic, context, vocabulary, chunks = struct.unpack_from("<8s3i", data)
    assert (magic, context, chunks) == (b"_logits_", CONTEXT, CHUNKS)
    tokens = np.frombuffer(data, np.int32, chunks * context, 20).reshape(chunks, context)
    width = 2 * ((vocabulary + 1) // 2) + 4
    rows = np.frombuffer(data, np.uint16, offset=20 + tokens.nbytes).reshape(chunks, SCORED, width)
    scale, least = np.moveaxis(rows[..., :4].copy().view(np.float32), -1, 0).astype(np.float64)
    return rows[..., 4 : 4 + vocabulary] * scale[..., None] + least[..., None], tokens[:, context // 2 + 1 :].astype(
        np.int64
    )


def of_text(log_p: Array, following: npt.NDArray[np.int64]) -> Array:
    return -np.take_along_axis(log_p, following[..., None], axis=-1)[..., 0]


MEMBER = np.repeat(np.arange(CHUNKS), SCORED)  # the chunk of each position


@pytest.fixture(scope="module")
def saved(
    tools: Toolset, testbed: Path, q3: Path, heldout: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The log-probabilities of both models on code.txt, as the tool saves them."""
    folder = tmp_path_factory.mktemp("saved")
    for name, model in (("f16", testbed), ("q3", q3)):
        wanted = ["-f", heldout / "code.txt", "--chunks", CHUNKS, "--parse-special", "--save-all-logits", folder / name]
        perplexity_tool(tools, model, *wanted)
    return {name: folder / name for name in ("f16", "q3")}


@pytest.fixture(scope="module")
def diverged(cache: Path, tools: Toolset, testbed: Path, q3: Path, texts: dict[str, Path]) -> Figures:
    return measure("kld", tools, q3, texts, testbed)


def test_perplexity_agrees_with_numpy_and_with_the_tool(
    tools: Toolset, testbed: Path, heldout: Path, saved: dict[str, Path]
) -> None:
    figure = measure("perplexity", tools, testbed, {"code": heldout / "code.txt"})["ppl", ""]
    nll = of_text(*logits(saved["f16"])).reshape(-1)
    assert figure.n == len(nll) == CHUNKS * SCORED
    expected = clustered_mean(nll, MEMBER).exp()
    assert (figure.value, figure.low, figure.high) == pytest.approx(expected, rel=1e-3)
    said = perplexity_tool(tools, testbed, "-f", heldout / "code.txt", "--chunks", CHUNKS, "--parse-special")
    found = re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", said)
    assert found and figure.value == pytest.approx(float(found[1]), abs=1e-4)


def test_texts_together_are_all_of_their_positions(tools: Toolset, testbed: Path, texts: dict[str, Path]) -> None:
    found = measure("perplexity", tools, testbed, texts, chunks=9)
    assert set(found) == {("ppl", ""), ("ppl", "code"), ("ppl", "chat")}
    value = {domain: figure.value or 0.0 for (_, domain), figure in found.items()}
    assert value[""] == pytest.approx(np.sqrt(value["code"] * value["chat"]))
    half = {domain: np.log((figure.high or 0) / (figure.value or 1)) for (_, domain), figure in found.items()}
    # independent texts: their squares add up, but for the degrees of freedom
    assert half[""] == pytest.approx(np.hypot(half["code"], half["chat"]) / 2, rel=0.1)
    assert found["ppl", ""].n == 2 * 9 * SCORED


def test_a_few_chunks_give_a_value_without_an_interval(tools: Toolset, testbed: Path, texts: dict[str, Path]) -> None:
    figure = measure("perplexity", tools, testbed, {"chat": texts["chat"]}, chunks=7)["ppl", ""]
    assert figure.value and figure.low is figure.high is None and figure.n == 7 * SCORED


def test_chat_markup_is_read_as_tokens_unless_told_otherwise(
    tools: Toolset, testbed: Path, texts: dict[str, Path]
) -> None:
    read, unread = (
        measure("perplexity", tools, testbed, {"chat": texts["chat"]}, chunks=4, parse_special=flag)["ppl", ""].value
        or 0
        for flag in (True, False)
    )
    assert unread > 2 * read


def test_divergence_agrees_with_numpy(diverged: Figures, saved: dict[str, Path]) -> None:
    reference, following = logits(saved["f16"])
    model, same = logits(saved["q3"])
    assert (following == same).all()
    kld = np.where(reference > -16, np.exp(reference) * (reference - model), 0).sum(-1).reshape(-1)
    found = {name: figure for (name, domain), figure in diverged.items() if domain == "code"}
    assert {figure.n for figure in found.values()} == {len(kld)}
    mean = found["kld.mean"]
    assert (mean.value, mean.low, mean.high) == pytest.approx(clustered_mean(kld, MEMBER), rel=0.02)
    assert found["kld.median"].value == pytest.approx(np.median(kld), rel=0.02)
    assert found["kld.p99_9"].value == pytest.approx(np.quantile(kld, 0.999), rel=0.02)
    assert found["kld.max"].value == pytest.approx(kld.max(), rel=0.02)
    agree = (reference.argmax(-1) == model.argmax(-1)).reshape(-1)
    top = found["top1.agreement"]
    assert top.unit == "%"
    assert (top.value, top.low, top.high) == pytest.approx(clustered_mean(agree, MEMBER).times(100), abs=0.7)


def test_divergence_over_texts(diverged: Figures) -> None:
    names = {name for name, domain in diverged if domain == "code"}
    assert names == {"kld.mean", "kld.median", "kld.p99_9", "kld.max", "top1.agreement"}
    assert {name for name, domain in diverged if not domain} == names - {"kld.median", "kld.p99_9"}, (
        "no exact quantile of all"
    )

    def value(name: str, domain: str) -> float:
        return diverged[name, domain].value or 0.0

    for name in ("kld.mean", "top1.agreement"):
        assert value(name, "") == pytest.approx((value(name, "code") + value(name, "chat")) / 2)
    assert value("kld.max", "") == max(value("kld.max", "code"), value("kld.max", "chat"))


def test_a_model_does_not_diverge_from_itself(
    diverged: Figures, tools: Toolset, testbed: Path, texts: dict[str, Path], cache: Path
) -> None:
    steps: list[Step] = []
    found = measure("kld", tools, testbed, {"code": texts["code"]}, testbed, report=steps.append)
    assert abs(found["kld.mean", ""].value or 0) < 1e-4 and found["kld.median", ""].value is not None
    assert found["top1.agreement", ""].value == 100 == found["top1.agreement", ""].low
    # the reference's log-probabilities were there already, from another file's measurement
    assert {step.task for step in steps} == {"kld: testbed-f16.gguf on code"}
    assert [step.done for step in steps][:1] == [0] and steps[-1].total == CHUNKS
    assert len(list(cache.glob("evaluation/*/reference.logits"))) == 2


def test_near_files_are_not_given_intervals_of_rounding(tools: Toolset) -> None:
    """Rows have five decimals. For a file too close to tell with these, use the tool's standard error."""
    divergence = plugin_module("perplexity", "divergence")
    chunks, mean, error = 400, 0.00034, 0.00001
    random = np.random.default_rng(0)
    exact = np.cumsum(random.normal(mean, error * np.sqrt(chunks), chunks)) / np.arange(1, chunks + 1)
    sums = np.diff(np.arange(1, chunks + 1) * np.round(exact, 5), prepend=0) * SCORED
    part = divergence.Divergence(SCORED, sums, sums, (exact[-1], error), 0, 0, 0)
    estimate = divergence._mean([part])
    assert estimate.value == exact[-1]
    assert 1.9 * error < estimate.high - estimate.value < 3 * error
    rows_alone = clustered_mean(sums / SCORED, np.arange(chunks))
    assert rows_alone.high is not None and rows_alone.high - rows_alone.value > 4 * error


@pytest.mark.parametrize("evaluator", ["perplexity", "kld"])
def test_a_text_that_is_too_short(evaluator: str, tools: Toolset, testbed: Path, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short for two chunks.")
    before = sorted(path.name for path in cache.glob("evaluation/*/*") if path.name != "made-from.json")
    with pytest.raises(
        CalibrationSetInvalid, match=r"short\.txt: the text is too short: expected at least 256 tokens.*found \d+$"
    ):
        measure(evaluator, tools, testbed, {"": tmp_path / "short.txt"}, testbed)
    assert sorted(path.name for path in cache.glob("evaluation/*/*") if path.name != "made-from.json") == before


def test_settings_and_texts_that_measure_nothing(tools: Toolset, testbed: Path, texts: dict[str, Path]) -> None:
    with pytest.raises(ParameterUnknown, match=r"perplexity\.context=0: expected at least 8"):
        measure("perplexity", tools, testbed, texts, context=0)
    with pytest.raises(
        EvaluationRefused, match="1 chunks of 128 tokens are 63 scored positions, expected at least 100"
    ):
        measure("kld", tools, testbed, {"chat": texts["chat"]}, testbed, chunks=1)


def test_a_disk_too_small_for_the_reference(
    tools: Toolset, testbed: Path, texts: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = logits_bytes(11, CONTEXT, 2048)
    room = needed + (64 << 20) - 1
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: type("Usage", (), {"free": room}))
    before = set(cache.glob("evaluation/*/*.logits*"))
    with pytest.raises(DiskTooSmall, match=r"at 693 positions, each for 2048 tokens, takes 2\.8 MB") as caught:
        measure("kld", tools, testbed, {"code": texts["code"]}, testbed, chunks=11)
    assert "kld.chunks=2" in str(caught.value.hint)
    assert set(cache.glob("evaluation/*/*.logits*")) == before
    room += 1
    assert measure("kld", tools, testbed, {"code": texts["code"]}, testbed, chunks=11)["kld.mean", ""].n == 693
    assert {path.stat().st_size for path in set(cache.glob("evaluation/*/*.logits")) - before} == {needed}


def test_the_bytes_of_a_large_vocabulary() -> None:
    n_bytes = logits_bytes(236, 512, 248320)
    assert n_bytes == pytest.approx(29.9e9, rel=0.01), "60,180 positions"


def test_a_reference_of_another_vocabulary(
    tools: Toolset, testbed: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    """apex evaluate rejects it before anything runs; the evaluator also rejects the tool's numbers for it."""
    other = task_of("kld", tools, testbed, texts, testbed)
    logits = reference_logits(other, "code")
    data = bytearray(logits.read_bytes())
    struct.pack_into("<i", data, 12, 2046)
    (tmp_path / "other.logits").write_bytes(data)
    read = plugin_module("perplexity", "divergence")._read
    ran = other.run(
        "llama-perplexity",
        "-m",
        testbed,
        "-c",
        str(CONTEXT),
        "--kl-divergence",
        "--kl-divergence-base",
        tmp_path / "other.logits",
    )
    with pytest.raises(VocabularyMismatch, match=rf"{testbed} cannot be the reference of {testbed}"):
        read(ran.lines, other)


def losing(tools: Toolset, folder: Path) -> Toolset:
    """The tools, but llama-perplexity loses its last lines, as without our patch it may on a busy machine."""
    (folder / "bin").mkdir(parents=True)
    script = f"""#!/bin/sh
{tools.tool("llama-perplexity")} "$@" 2>&1 | sed '/\\[7\\]/d; / 7  /,$d'
"""
    (folder / "bin" / "llama-perplexity").write_text(script)
    (folder / "bin" / "llama-perplexity").chmod(0o755)
    return Toolset(folder, {**tools.manifest, "key": folder.name})


@pytest.mark.parametrize("evaluator", ["perplexity", "kld"])
def test_a_tool_that_loses_its_result(
    evaluator: str, tools: Toolset, testbed: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(
        ToolFailed, match=r"testbed-f16\.gguf: llama-perplexity exited without printing its result"
    ) as caught:
        measure(evaluator, losing(tools, tmp_path / "all"), testbed, {"code": texts["code"]}, testbed, chunks=8)
    assert "\n  | " in caught.value.message and caught.value.hint == "apex build, for tools with this project's patches"


def test_a_model_that_cannot_be_run_is_named(
    tools: Toolset, testbed: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    cut = copy(testbed, tmp_path / "cut.gguf", keys={}, drop="blk.3.ffn")
    with pytest.raises(ToolFailed, match=r"cut\.gguf: llama-perplexity ended with code 1"):
        measure("perplexity", tools, cut, texts)


def test_a_model_gone_bad_has_no_perplexity(tools: Toolset) -> None:
    sums = plugin_module("perplexity", "perplexity")
    lines = [
        "perplexity: calculating perplexity over 2 chunks, n_ctx=128, batch_size=512, n_seq=4",
        "[1]3.5000,[2]nan,",
    ]
    figure = sums._figure([sums.chunk_sums(lines, CONTEXT)], CONTEXT, "")
    assert figure.value is None and figure.note == "the model gives no finite perplexity"
