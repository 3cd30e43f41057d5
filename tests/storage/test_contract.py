"""No verb writes files directly: all use the artifact protocol or `outputs.write_text`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2] / "apex_build"
WRITERS = {
    "write_text",
    "write_bytes",
    "write_json",
    "whole_file",
    "new_part",
    "put",
    "rename",
    "replace_file",
    "symlink_to",
    "copy2",
}
# A skeleton's files go into a folder that must not be there.
EXEMPT = {"cli/plugins.py": {"whole_file", "write_text"}}


def calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            guarded = (
                isinstance(node.func, ast.Name) and name == "write_text"
            )  # storage.outputs.write_text, with all checks
            modes = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
            if (name in WRITERS and not guarded) or (name == "open" and any(set(mode) & set("wxa+") for mode in modes)):
                yield name


def test_no_verb_and_no_stage_writes_by_itself() -> None:
    found = {}
    for room in ("cli", "stages"):
        for path in sorted((ROOT / room).glob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if own := set(calls(path)) - EXEMPT.get(name, set()):
                found[name] = own
    assert found == {}


def test_what_has_a_manifest_is_made_by_the_mechanism() -> None:
    """Each verb had its own code for this before."""
    users = {
        "calibration/run.py": "making", "calibration/merge.py": "making", "quantization/run.py": "making",
        "conversion/convert.py": "making", "evaluation/task.py": "making", "conversion/environment.py": "making_folder",
        "toolchain/build/run.py": "making_folder", "toolchain/cuda/wheels.py": "making_folder",
        "sweep/rows.py": "making", "toolchain/packed/packing.py": "making",
        "toolchain/packed/unpacking.py": "making_folder",
    }  # fmt: skip
    for name, function in users.items():
        called = {
            node.func.id
            for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert function in called, name
    for path in ROOT.rglob("*.py"):  # and there is one lock, besides that of the cache's folders
        if path.parent.name != "storage" and path.name != "places.py":
            assert "LOCK_EX" not in path.read_text(encoding="utf-8"), path
