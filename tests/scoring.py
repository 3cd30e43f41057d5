"""Run the evaluators of trunk and head scores in tests, and the tool itself."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from apex_build.evaluation.task import Task
from apex_build.gguf_model.model import read_model
from apex_build.hookspecs import Figure
from apex_build.native.toolset import Toolset
from apex_build.parameters import Value
from apex_build.plugins import load_plugins
from apex_build.progress import Report, silent

Figures = dict[tuple[str, str], Figure]

CONTEXT, SCORED = 128, 63


def task_of(
    evaluator: str,
    tools: Toolset,
    model: Path,
    texts: Mapping[str, Path],
    reference: Path | None = None,
    *,
    report: Report = silent,
    **settings: Value,
) -> Task:
    """One thread: llama.cpp's threads wait for each other slowly on a busy machine."""
    plugins = load_plugins()
    defaults = {name: parameter.default for name, parameter in plugins.evaluators()[evaluator].parameters.items()}
    given = {"context": CONTEXT, "chunks": 10} | settings
    models = [read_model(path, plugins.role_of) if path else None for path in (model, reference)]
    assert models[0] is not None
    return Task(evaluator, models[0], tools, models[1], texts, settings={**defaults, **given}, threads=1, report=report)


def measure(evaluator: str, *arguments: object, **settings: object) -> Figures:
    """Figures by name and domain."""
    task = task_of(evaluator, *arguments, **settings)  # type: ignore[arg-type]
    figures = load_plugins().evaluators()[evaluator].evaluate(task)
    found = {(figure.name, figure.domain): figure for figure in figures}
    assert len(found) == len(figures)
    return found


def plugin_module(plugin: str, name: str) -> ModuleType:
    """A file of a built-in plugin."""
    found = load_plugins().manager.get_plugin(plugin)
    assert isinstance(found, ModuleType)
    return importlib.import_module(f".{name}", found.__name__)


def perplexity_tool(tools: Toolset, model: Path, *arguments: object) -> str:
    """What llama-perplexity says; again where its last lines were lost, which happens on a busy machine."""
    command = [tools.tool("llama-perplexity"), "-m", model, "-c", CONTEXT, "-t", 1, *arguments]
    for _ in range(20):
        ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace")
        assert ran.returncode == 0, ran.stderr[-2000:]
        said = ran.stdout + ran.stderr
        if "Same top p:" in said or "Final estimate" in said:
            return said
    raise AssertionError(said)


def quantize(tools: Toolset, model: Path, out: Path, type_: str = "Q3_K_S") -> Path:
    command = [tools.tool("llama-quantize"), model, out, type_, "2"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return out
