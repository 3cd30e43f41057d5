"""The docs match the code: environment variables, hints of errors, settings in apex.toml."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "apex_build").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")])
NAME = re.compile(r"[A-Z][A-Za-z]*_[A-Z_]*|CC|CXX|[A-Z]*FLAGS|PATH|CPATH|CUDA_[A-Z_]+|[A-Z]{2,}_[A-Z_0-9]*")
# given to programs that we run, or options of CMake: not read from the user's environment
NOT_READ = re.compile(r"LD_TRACE_LOADED_OBJECTS|LC_ALL|CCACHE_\w+|CMAKE_\w+")


def variables(path: Path) -> Iterator[str]:
    """Names and prefixes in functions that use `os.environ`, or in constants that these use."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)) or "os.environ" not in ast.unparse(
            function
        ):
            continue
        named = [
            constants[node.id] for node in ast.walk(function) if isinstance(node, ast.Name) and node.id in constants
        ]
        for part in (*function.body, *named):
            for node in ast.walk(part):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value):
                    yield node.value


def test_every_variable_that_is_read_is_documented() -> None:
    found = {name for path in SOURCES for name in variables(path)}
    found = {name for name in found if not NOT_READ.fullmatch(name)}
    assert {
        "APEX_CACHE_DIR",
        "APEX_TOOLS",
        "CXX",
        "CUDA_HOME",
        "PIP_",
        "APEX_PLUGINS_OFF",
        "APEX_CONVERT_PYTHON",
    } <= found
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`([A-Za-z][A-Za-z_0-9]*)\*?`", page))
    beginnings = tuple(re.findall(r"`([A-Za-z][A-Za-z_0-9]*)\*`", page))
    assert not [name for name in sorted(found - listed) if not name.startswith(beginnings)]
    ours = {name for name in listed if name.startswith("APEX_")}
    everywhere = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    assert not [name for name in ours if name not in everywhere], "a variable that nothing reads"


def test_the_readmes_pages_exist_and_its_links_need_no_checkout() -> None:
    """A package index shows the README without the files beside it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not re.findall(r"\]\((?!https?://|#)[^)]*\)", text)
    for page in re.findall(r"docs/[\w/-]+\.md", text):
        assert (ROOT / page).is_file(), page
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in text, page.name
