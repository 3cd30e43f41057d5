"""Run an evaluator's task on the testbed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apex_build.evaluation.run import Inputs, Work, plan_work
from apex_build.gguf_model.model import read_model
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins

WorkOf = Callable[..., Work]


@pytest.fixture
def work_of(tools: Toolset, testbed: Path) -> WorkOf:
    """work_of("speed", prompt="64", ...): run the evaluator on the testbed, with `inputs` and these settings.

    One thread: with two, llama.cpp's threads wait for each other slowly on a busy machine.
    """

    def make(
        name: str, inputs: Inputs | None = None, *, tools: Toolset = tools, report: Any = None, **settings: str
    ) -> Work:
        plugins = load_plugins()
        given = inputs or Inputs()
        named = {f"{name}.{key}": value for key, value in settings.items()}
        whole = Inputs(given.reference, given.texts, given.prompts, given.data, named)
        extra = {"report": report} if report else {}
        return plan_work(
            plugins.evaluators()[name], read_model(testbed, plugins.role_of), whole, tools, threads=1, **extra
        )

    return make
