"""Finding the tools, and noticing a damaged build."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apex_build.errors import BuildMissing
from apex_build.native.toolset import find_toolset


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("APEX_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("APEX_TOOLS", raising=False)
    return tmp_path


def make_build(root: Path) -> Path:
    (root / "bin").mkdir(parents=True)
    tool = root / "bin" / "llama-quantize"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    manifest = {"files": {"bin/llama-quantize": {"size": 10, "sha256": "0" * 64}}}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def test_the_current_build_of_the_cache(cache: Path) -> None:
    root = make_build(cache / "builds" / "abc")
    (cache / "builds" / "current-cpu.json").write_text('{"key": "abc"}')
    assert find_toolset().tool("llama-quantize") == root / "bin" / "llama-quantize"
    with pytest.raises(BuildMissing, match="no llama-imatrix"):
        find_toolset().tool("llama-imatrix")


def test_nothing_built(cache: Path) -> None:
    with pytest.raises(BuildMissing) as caught:
        find_toolset()
    assert "make build" in str(caught.value.hint)


@pytest.mark.parametrize("damage", ["gone", "short", "manifest", "json", "list"])
def test_a_damaged_build(cache: Path, damage: str) -> None:
    root = make_build(cache / "builds" / "abc")
    (cache / "builds" / "current-cpu.json").write_text('{"key": "abc"}')
    match damage:
        case "gone":
            (root / "bin" / "llama-quantize").unlink()
        case "short":
            (root / "bin" / "llama-quantize").write_text("#!")
        case "manifest":
            (root / "manifest.json").unlink()
        case "json":
            (root / "manifest.json").write_text("{")
        case "list":
            (root / "manifest.json").write_text("[]")
    with pytest.raises(BuildMissing) as caught:
        find_toolset()
    assert str(root) in caught.value.message


@pytest.mark.parametrize("part", ["", "bin"])
def test_a_build_that_is_not_ours(cache: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    root = make_build(cache / "theirs")
    (root / "manifest.json").unlink()
    monkeypatch.setenv("APEX_TOOLS", str(root / part))
    assert find_toolset().root == root
    assert find_toolset().manifest == {}


def test_a_folder_without_tools(cache: Path) -> None:
    with pytest.raises(BuildMissing, match="holds no built tools"):
        find_toolset(cache / "empty")


def test_a_build_that_is_not_ours_is_another_when_a_part_of_it_is(tmp_path: Path) -> None:
    """Figures depend on the backend's library and on the tool as much as on the library of models."""
    found = set()
    for changed in ("", "libllama.so", "libggml-cuda.so", "llama-perplexity"):
        root = tmp_path / f"build{changed}" / "bin"
        root.mkdir(parents=True)
        for name in ("libllama.so", "libggml-cuda.so", "llama-perplexity", "llama-quantize"):
            (root / name).write_text(f"{name} {name == changed}")
        found.add(find_toolset(root).identity)
    assert len(found) == 4
