"""The core knows no plugin by name: built-in policies, evaluators and sources are found by what they declare."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from apex_build.errors import EvaluationRefused, PluginFailed
from apex_build.evaluation.services import the_one_serving
from apex_build.hookspecs import Evaluator
from apex_build.plugins import load_plugins

ROOT = Path(__file__).parents[1]
# These are words of the core too: keys of its JSON, meanings of figures, endings of files. Equal by chance.
ORDINARY = {"files", "datasets", "perplexity", "jsonl"}
MEANT = {
    "apex_build/stages/demo.py": {"i-nano"},  # the demo plays a user
    "apex_build/evaluation/head_scores.py": {"kld"},  # a column that the tool writes
    "apex_build/evaluation/probes.py": {"kld"},  # likewise
}


def names() -> set[str]:
    plugins = load_plugins()
    return {*plugins.policies(), *plugins.evaluators(), *plugins.calibration_sources()} - ORDINARY


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """The strings of a file except docstrings, including parts of f-strings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
        and isinstance(node.body[0].value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.lineno, node.value


def test_no_code_names_a_built_in_plugin() -> None:
    """Find names with a hyphen, and names that are not English words, in any text; other names only if they are the
    whole text or one of its settings (speed.prompt)."""
    known = names()
    english = {name for name in known if name.isalpha() and name not in ("kld", "hellaswag", "mmlu", "truthfulqa")}
    anywhere = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, sorted(known - english)))})(?![\w-])")
    alone = re.compile(rf"(?:{'|'.join(map(re.escape, sorted(english)))})(?:\.\w+)?")
    found = []
    for path in sorted((ROOT / "apex_build").rglob("*.py")):
        place = str(path.relative_to(ROOT))
        if "skeletons" in path.parts:  # plugins themselves
            continue
        for line, text in texts(path):
            matches = {*anywhere.findall(text), *([text] if alone.fullmatch(text) else [])} - MEANT.get(place, set())
            found += [f"{place}:{line}: {match}" for match in sorted(matches)]
    assert found == []


def test_what_is_declared_is_what_is_taken() -> None:
    """Everything is also found under other names."""
    evaluators = {f"x-{name}": replace(one, name=f"x-{name}") for name, one in load_plugins().evaluators().items()}
    taken = {
        (purpose, meaning): the_one_serving(evaluators, purpose, meaning)[0].name
        for purpose, meaning in (
            ("head", ""),
            ("sweep", ""),
            ("auto", "agreement"),
            ("check", "perplexity"),
            ("check", "acceptance"),
        )
    }
    assert list(taken.values()) == ["x-draft-head", "x-kld", "x-draft-head", "x-perplexity", "x-draft-acceptance"]
    assert [name for name, policy in load_plugins().policies().items() if policy.sweeps] == ["draft-head-only"]


def test_no_evaluator_for_a_purpose_and_two() -> None:
    evaluators: dict[str, Evaluator] = dict(load_plugins().evaluators())
    with pytest.raises(EvaluationRefused, match="no evaluator serves 'auto' with a figure for beauty"):
        the_one_serving(evaluators, "auto", "beauty")
    evaluators["again"] = replace(evaluators["draft-head"], name="again")
    with pytest.raises(
        PluginFailed, match=r"two evaluators serve 'auto' .* 'draft-head' of plugin 'draft_head' and 'again'"
    ):
        the_one_serving(evaluators, "auto", "agreement")
