"""Shared fixtures of the policy tests."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
from policy_kit import MakePolicy
from shapes import write_header_only

from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.model import read_model
from apex_build.hookspecs import Parameter, PolicySpec
from apex_build.loaded import LoadedPolicy
from apex_build.native.ggml import Ggml
from apex_build.native.run import run_tool
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins


@pytest.fixture(scope="session")
def ggml(tools: Toolset) -> Ggml:
    return Ggml(tools)


@pytest.fixture(scope="session")
def small(testbed: Path) -> Model:
    return read_model(testbed, load_plugins().role_of)


@pytest.fixture(scope="session")
def big(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The shapes of the 35B-A3B: 71 GB in a sparse file that takes no space."""
    path = write_header_only(tmp_path_factory.mktemp("big") / "35b-a3b.gguf")
    return read_model(path, load_plugins().role_of)


@pytest.fixture(scope="session")
def trunk_imatrix(testbed: Path, tools: Toolset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like the output of llama-imatrix without --mtp: data for the trunk, none for the draft head."""
    folder = tmp_path_factory.mktemp("imatrix")
    vocabulary = [
        "the",
        "model",
        "sees",
        "tokens",
        "and",
        "each",
        "expert",
        "def",
        "return",
        "import",
        "self",
        "if",
        "for",
        "x",
    ]
    words = random.Random(5).choices(vocabulary, k=6000)
    (folder / "text.txt").write_text(" ".join(words), encoding="utf-8")
    out = folder / "trunk.gguf"
    run_tool(
        [
            tools.tool("llama-imatrix"),
            "-m",
            testbed,
            "-f",
            folder / "text.txt",
            "-o",
            out,
            "-c",
            "256",
            "--chunks",
            "8",
            "-t",
            "1",
        ]
    )
    return out


@pytest.fixture
def make_policy(tmp_path: Path) -> MakePolicy:
    """A policy with the given text as its template."""

    def make(
        text: str, base_type: str = "Q8_0", parameters: Mapping[str, Parameter] | None = None, **files: str
    ) -> PolicySpec:
        folder = tmp_path / "mine"
        folder.mkdir(exist_ok=True)
        (folder / "mine.jinja").write_text(text, encoding="utf-8")
        for name, content in files.items():
            (folder / f"{name}.jinja").write_text(content, encoding="utf-8")
        library = load_plugins().policy("i-nano").library
        return LoadedPolicy(
            "mine", folder / "mine.jinja", base_type, parameters=parameters or {}, plugin="mine", library=library
        )

    return make
