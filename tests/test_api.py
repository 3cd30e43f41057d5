"""The Python API as documented in docs/api.md: runs each example, in order, on the test model."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest

from apex_build import api
from apex_build.native.toolset import Toolset

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
EXAMPLES = re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
CODE = {
    title: "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)) for title, text in EXAMPLES
}


def test_every_function_of_the_api_has_an_example_and_a_docstring() -> None:
    text = "\n".join(CODE.values())
    for name in api.__all__:
        thing = getattr(api, name)
        if isinstance(thing, FunctionType) and name not in ("silent", "all_pins", "demo"):
            assert f"api.{name}(" in text and thing.__doc__, name
    used = {
        node.attr
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "api"
    }
    assert used <= set(api.__all__)


def test_the_page_runs_as_printed(testbed: Path, tools: Toolset, tmp_path: Path) -> None:
    """Except for conversion, which needs torch: tests/conversion does that."""
    shutil.copy(testbed, tmp_path / "model-F16.gguf")
    code = "\n".join(text for title, text in CODE.items() if title not in ("Convert", "The tools"))
    script = f"from pathlib import Path\nfrom apex_build import api\n{code}"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "calibrating: 24 of 24 chunks" in done.stdout and "model-i-nano.gguf" in done.stdout
    last = done.stdout.splitlines()[-2:]
    assert last[0].startswith("quantized-model ") and last[0].endswith(" i-nano True")
    assert last[1].startswith("DataMissing 72 "), last
    assert {"model-i-nano.gguf", "model-i-nano.gguf.json", "results.jsonl", "sweep"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_the_tools_of_the_page(tools: Toolset, tmp_path: Path) -> None:
    """Cached and current: nothing is fetched or built."""
    done = subprocess.run([sys.executable, "-c", CODE["The tools"]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("True")


@pytest.mark.parametrize("stage", ["calibrate", "plan", "quantize", "evaluate", "check", "sweep", "convert", "build"])
def test_a_stage_stands_under_the_roof(stage: str) -> None:
    function = getattr(api, stage)
    assert function.__module__ == f"apex_build.stages.{stage}"
