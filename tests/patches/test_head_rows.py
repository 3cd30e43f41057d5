"""Hidden rows of the draft head: what is known about architectures, what an imatrix records, what is rejected."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from apex_runs import SMALL, run_apex
from gguf_edit import imatrix_without_rows, uneven_norms
from shapes import TINY, write_header_only

from apex_build.calibration.run import Settings, calibrate, without_own_arguments
from apex_build.calibration.sets import text_of_file
from apex_build.errors import HeadRowsDoubtful, VerificationFailed
from apex_build.evaluation.head_scores import Scores
from apex_build.evaluation.rows_check import check_rows, compare
from apex_build.gguf_model.header import read_header
from apex_build.gguf_model.imatrix import read_imatrix
from apex_build.gguf_model.model import read_model
from apex_build.gguf_model.mtp_rows import CHOICES, TRAINED_ON, TrainedOn, tool_arguments
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins
from apex_build.progress import Step
from apex_build.sweep.without_head import write_without_head

LOW = ("--policy", "i-nano", *SMALL, "--set", "draft_head=IQ2_XXS")


@pytest.fixture(scope="module")
def pre(rows_choice: None, tools: Toolset, testbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imatrix of rows that heads of qwen35moe were not trained on, made on request."""
    out = tmp_path_factory.mktemp("pre") / "pre.imatrix.gguf"
    run_apex("calibrate", testbed, "-o", out, "--chunks", 24, "--mtp-rows", "pre", "--threads", 1)
    return out


def manifest(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(path.with_name(f"{path.name}.json").read_text())
    return found


def test_every_entry_says_where_it_is_from() -> None:
    assert {"qwen35", "qwen35moe", "qwen3next", "step35", "mimo2", "deepseek4", "glm4moe"} <= TRAINED_ON.keys()
    for known in TRAINED_ON.values():
        assert (
            known.rows in (*CHOICES.values(), "streams")
            and known.source
            and known.basis in ("measured", "source", "inference")
        )
    assert tool_arguments("auto", "qwen35moe") == tool_arguments("post", "unheard-of") == ["--mtp-rows", "post"]
    assert tool_arguments("auto", "mimo2") == ["--mtp-rows", "pre"]
    assert tool_arguments("auto", "deepseek4") == tool_arguments("auto", "unheard-of") == []


def test_the_imatrix_and_all_that_is_made_of_it_say_which(
    calibrated: Path, pre: Path, testbed: Path, tools: Toolset, tmp_path: Path
) -> None:
    for path, rows, source in ((calibrated, "post_norm", TRAINED_ON["qwen35moe"].source), (pre, "pre_norm", "given")):
        assert read_imatrix(path).head_rows == rows
        assert manifest(path)["head_rows"] == {"rows": rows, "source": source}
        assert json.loads(run_apex("inspect", path, "--json").stdout)["head_rows"] == rows
        assert f"with {rows} rows" in run_apex("inspect", path).stdout
        assert f"{rows} rows" in run_apex("inspect", path, "--model", testbed).stdout
    check = manifest(calibrated)["rows_check"]
    assert isinstance(check, dict) and check["known"] == "post_norm" and check["positions"] == 12 * 255
    assert set(check["agreement"]) == {"pre_norm", "post_norm"} and manifest(pre)["rows_check"] is None

    out = tmp_path / "x.gguf"
    run_apex("quantize", testbed, *LOW, "--imatrix", calibrated, "-o", out, "--threads", 1)
    assert read_header(out).metadata["apex.head_rows"] == "post_norm"
    made_from = manifest(out)["from"]
    assert isinstance(made_from, dict) and made_from["apex.head_rows"] == "post_norm"

    write_without_head(calibrated, read_model(testbed, load_plugins().role_of), tmp_path / "trunk.gguf")
    assert read_imatrix(tmp_path / "trunk.gguf").head_rows is None
    common = ("--policy", "i-nano", *SMALL, "--set", "draft_head=Q8_0", "--threads", 1)
    run_apex("quantize", testbed, *common, "--imatrix", tmp_path / "trunk.gguf", "-o", tmp_path / "y.gguf")
    assert "apex.head_rows" not in read_header(tmp_path / "y.gguf").metadata


@pytest.mark.parametrize("verb", ["quantize", "plan", "sweep"])
def test_data_of_other_rows_is_refused(
    verb: str, pre: Path, calibrated: Path, testbed: Path, heldout: Path, tmp_path: Path
) -> None:
    old = imatrix_without_rows(calibrated, tmp_path / "old.gguf")
    command: list[object] = [verb, testbed]
    if verb == "sweep":
        command += ["--over", "draft_head=Q8_0,IQ2_XXS", "--with-head", "--text", heldout / "code.txt", "--dry-run"]
        command += ["-o", tmp_path / "out"]
    else:
        command += [*LOW, *(["-o", tmp_path / "x.gguf"] if verb == "quantize" else [])]
    more = [["--allow-uncalibrated"], []] if verb == "quantize" else [[]]
    for options in more:
        said = run_apex(*command, "--imatrix", pre, *options, code=45).stderr
        assert (
            f"{pre}: the data of the draft head (blk.6." in said
            and "-> IQ2_XXS) is from pre_norm rows: expected post_norm" in said
        )
        assert f"try:   apex calibrate {testbed} --force" in said and "--mtp-rows pre" in said
        said = run_apex(*command, "--imatrix", old, *options, code=45).stderr
        assert (
            f"{old}: the data of the draft head (blk.6." in said
            and "does not name the trunk's hidden rows that it is from" in said
        )
        assert f"try:   apex calibrate {testbed} --force" in said and "--mtp-rows" not in said
    said = run_apex(*command, "--imatrix", calibrated, "--mtp-rows", "pre", code=45).stderr
    assert "is from post_norm rows: expected pre_norm, as --mtp-rows says" in said and "--force --mtp-rows pre" in said
    if verb == "plan":
        run_apex(*command, "--imatrix", pre, "--mtp-rows", "pre")
    assert not (tmp_path / "x.gguf").exists() and not (tmp_path / "out").exists()


def test_what_the_head_does_not_use_is_not_asked_for(pre: Path, testbed: Path, tmp_path: Path) -> None:
    """For Q8_0 its data is not used; if the user insists, it is used, and the file records that."""
    common = ["quantize", testbed, "--policy", "i-nano", *SMALL, "--imatrix", pre, "--threads", 1]
    run_apex(*common, "--set", "draft_head=Q8_0", "-o", tmp_path / "q8.gguf")
    run_apex(*common, "--set", "draft_head=IQ2_XXS", "--mtp-rows", "pre", "-o", tmp_path / "x.gguf")
    assert read_header(tmp_path / "x.gguf").metadata["apex.head_rows"] == "pre_norm"


def test_an_architecture_that_nothing_is_known_of(
    tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = write_header_only(tmp_path / "stranger.gguf", TINY, arch="exaone-moe")
    said = run_apex("calibrate", stranger, "--text", heldout / "code.txt", code=30).stderr
    assert (
        "warning: which hidden rows the draft heads of exaone-moe were trained on is not known: using the tool's "
        "default" in said
    )
    # the table without an architecture that the tools do run: they decide, and that is recorded
    monkeypatch.delitem(TRAINED_ON, "qwen35moe")
    model = read_model(testbed, load_plugins().role_of)
    out = tmp_path / "x.gguf"
    calibrate(model, text_of_file(heldout / "code.txt"), tools, out, Settings(context=128, chunks=3, threads=1))
    assert manifest(out)["head_rows"] == {
        "rows": "post_norm",
        "source": "nothing is known of qwen35moe: the tool's default",
    }
    assert check_rows(model, heldout / "code.txt", tools, context=128) is None


def test_the_check_stops_where_the_other_rows_are_clearly_better(
    rows_choice: None, tools: Toolset, testbed: Path, heldout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = uneven_norms(testbed, tmp_path / "uneven.gguf")
    text = heldout / "code.txt"
    said = run_apex("calibrate", model, "--text", text, "-o", tmp_path / "x.gguf", "--threads", 1, code=52).stderr
    assert (
        "of 3060 positions with post_norm rows" in said
        and "% with pre_norm rows: +" in said
        and "--mtp-rows pre" in said
    )
    assert not (tmp_path / "x.gguf").exists()
    few = ["calibrate", model, "--text", text, "-o", tmp_path / "x.gguf", "--chunks", 3, "--threads", 1]
    run_apex(*few, "--no-rows-check")
    assert manifest(tmp_path / "x.gguf")["rows_check"] is None
    run_apex(*few, "--mtp-rows", "pre", "--force")
    assert read_imatrix(tmp_path / "x.gguf").head_rows == "pre_norm"
    known = TRAINED_ON["qwen35moe"]
    monkeypatch.setitem(TRAINED_ON, "qwen35moe", TrainedOn("pre_norm", known.basis, known.source))
    found = check_rows(read_model(model, load_plugins().role_of), text, tools, context=512, threads=1)
    assert found is not None and not found.doubtful and found.difference < -1


def test_the_check_is_made_once(
    rows_choice: None, tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached: a resumed or repeated run does not wait for it."""
    monkeypatch.setenv("APEX_CACHE_DIR", str(tmp_path / "cache"))
    model, steps = read_model(testbed, load_plugins().role_of), list[Step]()
    ask = partial(check_rows, model, heldout / "code.txt", tools, context=128, chunks=8, threads=1, report=steps.append)
    first = ask()
    assert first is not None and first.positions == 8 * 63 and steps
    steps.clear()
    assert ask() == first and not steps
    assert ask(chunks=3) != first and steps


def test_a_check_that_raises_leaves_nothing(tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path) -> None:
    def check(_: Path) -> None:
        raise HeadRowsDoubtful("the others")

    model = read_model(testbed, load_plugins().role_of)
    settings = Settings(context=128, chunks=4, threads=1)
    with pytest.raises(HeadRowsDoubtful):
        calibrate(model, text_of_file(heldout / "code.txt"), tools, tmp_path / "x.gguf", settings, check=check)
    assert not (tmp_path / "x.gguf").exists() and not (tmp_path / "x.gguf.json").exists()


def scores(agree: npt.NDArray[np.bool_], context: int) -> Scores:
    n = len(agree)
    chunk, within = np.divmod(np.arange(n), context // 2 - 1)
    pos = (chunk * context + context // 2 + 1 + within).astype(np.int32)
    zero = np.zeros(n, np.float32)
    return Scores(pos, np.ones(n, np.int32), np.zeros(n, np.int32), agree.astype(np.int32), zero, zero, zero)


def test_when_the_other_rows_are_clearly_better() -> None:
    """At least a point, and more than the text's noise; with few chunks nothing is clear."""
    random = np.random.default_rng(1)
    size = 255 * 12
    base = random.random(size) < 0.6
    for gain, chunks, doubtful in ((0.05, 12, True), (0.004, 12, False), (-0.05, 12, False), (0.05, 4, False)):
        n = 255 * chunks
        change = random.random(n) < abs(gain) * 2.5
        other = np.where(change, gain > 0, base[:n])
        found = compare(scores(base[:n], 512), scores(other, 512), 512, ("post_norm", "pre_norm"))
        assert found.doubtful == doubtful and found.positions == n and found.chunks == chunks
        assert found.difference == pytest.approx(found.agreement["pre_norm"] - found.agreement["post_norm"])
        assert "pre_norm" in found.said() and (found.low is None) == (chunks < 8)


def test_arguments_that_llama_imatrix_alone_takes() -> None:
    extra = ("--no-ppl", "--chunk", "3", "--no-mmap", "-ofreq", "5", "--override-tensor", "exps=CPU")
    assert without_own_arguments(extra) == ("--no-mmap", "--override-tensor", "exps=CPU")


def test_a_tool_that_takes_other_rows_than_asked_is_found_out(
    rows_choice: None, tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "llama-imatrix"
    script.write_text(f'#!/bin/sh\nexec {tools.tool("llama-imatrix")} "$@" --mtp-rows pre\n')
    script.chmod(0o755)
    model = read_model(testbed, load_plugins().role_of)
    settings = Settings(context=128, chunks=3, threads=1)
    deaf = Toolset(tmp_path, {**tools.manifest, "key": "deaf"})
    with pytest.raises(
        VerificationFailed, match=r"should have been run with post_norm rows, but was run with pre_norm"
    ):
        calibrate(model, text_of_file(heldout / "code.txt"), deaf, tmp_path / "x.gguf", settings)
