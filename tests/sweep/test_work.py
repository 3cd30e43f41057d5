"""Count what planning and quantizing cost: headers read, tools and child processes started."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from apex_runs import SMALL
from shapes import QWEN_35B_A3B, write_header_only

from apex_build.evaluation.run import Inputs
from apex_build.gguf_model import header
from apex_build.gguf_model.cursor import Cursor
from apex_build.gguf_model.header import Header
from apex_build.gguf_model.model import read_model
from apex_build.native.toolset import Toolset
from apex_build.plugins import Plugins, load_plugins
from apex_build.policy.plan import Plan, Wanted, make_plans
from apex_build.quantization.run import prepare, run
from apex_build.sweep.plan import Request, plan_sweep

_counting: list[Counter[str]] = []


def _started(event: str, arguments: tuple[Any, ...]) -> None:
    if _counting and event == "subprocess.Popen":
        words = [str(word) for word in arguments[1]]
        tool = next((Path(word).name for word in words if "/llama-" in word), "")
        name = words[words.index("-m") + 1] if "apex_build.policy.sandbox" in words else tool
        _counting[-1][f"{name} --dry-run" if "--dry-run" in words else name] += 1


sys.addaudithook(_started)  # there is no taking it back


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts of child processes by tool or module, and of headers by file name."""
    counts: Counter[str] = Counter()
    parse = header._parse

    def parse_counted(cursor: Cursor) -> Header:
        counts[Path(cursor.path).name] += 1
        return parse(cursor)

    _counting.append(counts)
    with monkeypatch.context() as patched:
        patched.setattr(header, "_parse", parse_counted)
        yield counts
    _counting.pop()


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return load_plugins()


def small() -> dict[str, str | int | float | bool]:
    return {name: value for name, _, value in (word.partition("=") for word in SMALL) if value}


def test_one_file(
    tools: Toolset, plugins: Plugins, testbed: Path, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model.gguf"
    source.symlink_to(testbed)
    with counted(monkeypatch) as counts:
        model = read_model(source, plugins.role_of)
        job = prepare(model, plugins.policy("i-nano"), small(), tools, tmp_path / "out.gguf", imatrix=calibrated)
        assert counts["model.gguf"] == 1
        run(job, threads=1)
    assert counts["model.gguf"] == 1
    assert counts["llama-quantize --dry-run"] <= 2, "what can be quantized, and the plan"
    assert counts["apex_build.policy.sandbox"] == 1, "the template; patterns for one name each need no process"


def test_a_sweep_of_eight_points(
    tools: Toolset,
    plugins: Plugins,
    testbed: Path,
    calibrated: Path,
    heldout: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = tmp_path / "model.gguf"
    source.symlink_to(testbed)
    with counted(monkeypatch) as counts:
        model = read_model(source, plugins.role_of)
        over = {"draft_head": ["Q8_0", "Q6_K", "Q4_K", "IQ2_XXS"]}
        inputs = Inputs(texts={"chat": heldout / "chat.txt"})
        evaluators, policy = plugins.evaluators(), plugins.policy("draft-head-only")
        request = Request(
            model, policy, {}, over, calibrated, tmp_path / "out", tools, evaluators, ["draft-head"], inputs
        )
        sweep = plan_sweep(request)
    assert len(sweep.points) == 8
    assert counts["model.gguf"] == 1
    assert counts["llama-quantize --dry-run"] <= 1 + 4, "what can be quantized, and each set of types"
    assert counts["apex_build.policy.sandbox"] == 1
    assert counts[calibrated.name] <= 6


def test_fifty_plans_of_a_large_model(
    tools: Toolset, plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = read_model(write_header_only(tmp_path / "m.gguf", QWEN_35B_A3B), plugins.role_of)
    types = ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K"]
    wanted = [
        Wanted(
            {"draft_head.routed": routed, "draft_head.attention": attention, "draft_head.other": "Q8_0"}, imatrix=curve
        )
        for routed in types
        for attention in types
        for curve in (True, False)
    ]
    with counted(monkeypatch) as counts:
        plans = make_plans(model, plugins.policy("draft-head-only"), wanted, tools)
    assert len(plans) == 50 and all(isinstance(plan, Plan) for plan in plans)
    assert counts["apex_build.policy.sandbox"] == 1
    assert counts["llama-quantize --dry-run"] <= 1 + 50
    assert counts["m.gguf"] == 0
