"""Find the tools, and notice a damaged build."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from apex_runs import run_apex

from apex_build.errors import BuildMissing
from apex_build.native.toolset import Toolset, current_build, find_toolset, open_build
from apex_build.source.pins import DEFAULT_PIN
from apex_build.toolchain.build.cache import all_builds, look_up, make_current


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
    with pytest.raises(BuildMissing, match="does not contain built tools"):
        find_toolset(cache / "empty")


def test_a_build_that_is_not_ours_is_another_when_a_part_of_it_is(tmp_path: Path) -> None:
    """Figures depend on the backend's library and the tool as much as on libllama."""
    found = set()
    for changed in ("", "libllama.so", "libggml-cuda.so", "llama-perplexity"):
        root = tmp_path / f"build{changed}" / "bin"
        root.mkdir(parents=True)
        for name in ("libllama.so", "libggml-cuda.so", "llama-perplexity", "llama-quantize"):
            (root / name).write_text(f"{name} {name == changed}")
        found.add(find_toolset(root).identity)
    assert len(found) == 4


DAMAGED = (
    "null",
    '"x"',
    "[]",
    "3",
    "",
    "{",
    "[" * 100_000,
    '{"key": 3}',
    '{"key": "../.."}',
    '{"key": "abc", "at": "x"}',
    "\xff",
)


@pytest.mark.slow
@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_pointer_is_none(content: str, cache: Path) -> None:
    pointer = cache / "builds" / "current-cpu.json"
    root = make_build(cache / "builds" / "abc")
    pointer.write_text(content, encoding="latin-1")
    with pytest.raises(BuildMissing, match=r"current-cpu\.json is damaged"):
        find_toolset()
    assert current_build() is None
    assert [build.key for build in all_builds()] == ["abc"]
    (cache / "builds" / "current-cuda.json").write_text('{"key": "abc"}')
    assert find_toolset().root == root
    make_current(Toolset(root, {"key": "abc", "backend": "cpu", "pin": {"name": DEFAULT_PIN}}))
    for verb in (("doctor",), ("build", "--list")) if content in ("null", '"x"', "[" * 100_000) else ():
        run_apex(*verb, env={**os.environ, "APEX_CACHE_DIR": str(cache)})


def test_builds_of_two_pins_lie_side_by_side(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, pin in (("abc", DEFAULT_PIN), ("def", "latest")):
        make_current(Toolset(make_build(cache / "builds" / key), {"key": key, "backend": "cpu", "pin": {"name": pin}}))
    assert find_toolset().root.name == "abc"
    monkeypatch.setenv("APEX_PIN", "latest")
    assert find_toolset().root.name == "def"
    monkeypatch.setenv("APEX_PIN", "pr-1")
    with pytest.raises(BuildMissing, match="the native tools of the pin pr-1 have not been built") as raised:
        find_toolset()
    assert raised.value.hint == "apex build --pin pr-1"


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"bin/llama-quantize": None}},
        {"files": {"bin/llama-quantize": {"size": "x"}}},
        {"files": {"../../x": {"size": 1}}},
        {"files": []},
        {"pin": "x"},
        {"cuda": 3},
        {"key": []},
        {"patches": 7},
        {"ggml_type_count": "x"},
        {"ggml_type_count": 10**9},
        {"ggml_type_count": -1},
        {"ggml_type_count": True},
    ],
)
def test_a_manifest_of_other_kinds_is_a_damaged_build(change: dict[str, object], cache: Path) -> None:
    root = make_build(cache / "builds" / "abc")
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(BuildMissing, match=r"manifest\.json is damaged"):
        open_build(root)
    assert look_up("abc") is None and all_builds() == []
