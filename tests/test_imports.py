"""The order of the rooms: what a module may import. `python tests/test_imports.py` prints rooms and imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the ground up: each imports only what stands before it.
ROOMS = (
    "errors", "near", "printable", "system", "progress", "places", "parameters", "hookspecs", "plugin_api", "loaded",
    "storage",
    "fetching", "native", "gguf_model", "plugin_finding", "plugin_blame", "plugins", "source", "toolchain", "workshop",
    "conversion", "calibration", "policy", "plugin_check", "quantization", "evaluation", "report", "sweep", "cluster",
    "stages", "api", "pruning", "cli", "__main__",
)  # fmt: skip
TOOLCHAIN = ("backends", "machine", "cuda", "build", "doctor", "packed")
# What plugins may import.
PUBLIC = {"apex_build.plugin_api"}


def imports(path: Path) -> Iterator[str]:
    """The modules of apex_build that this one imports, also inside functions."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.partition(".")[0] == "apex_build")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "apex_build":
            for name in node.names:
                module = f"{node.module}.{name.name}"
                file = ROOT / module.replace(".", "/")
                yield module if file.is_dir() or file.with_suffix(".py").is_file() else node.module
        nodes += ast.iter_child_nodes(node)


def graph() -> dict[str, set[str]]:
    modules = {}
    for path in sorted((ROOT / "apex_build").rglob("*.py")):
        if "skeletons" in path.parts:  # of plugins: what they import is below
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        modules[name] = set(imports(path)) - {name, "apex_build"}
    return modules


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def out_of_order(modules: dict[str, set[str]], rooms: tuple[str, ...], depth: int) -> list[str]:
    """`depth`: which part of a module's name is the room's name."""
    place = {name: number for number, name in enumerate(rooms)}
    found = []
    for module, imported in modules.items():
        for other in imported:
            here, there = module.split(".")[depth], other.split(".")[depth]
            if place[there] > place[here]:
                found.append(f"{module} imports {other}")
    return found


def test_each_room_imports_only_those_before_it() -> None:
    modules = {name: imported for name, imported in graph().items() if name != "apex_build"}
    assert out_of_order(modules, ROOMS, 1) == []
    inside = {
        name: {other for other in imported if other.startswith("apex_build.toolchain.")}
        for name, imported in modules.items()
        if name.startswith("apex_build.toolchain.")
    }
    assert out_of_order(inside, TOOLCHAIN, 2) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    left = graph()
    while free := {name for name, imported in left.items() if not imported & left.keys()}:
        left = {name: imported for name, imported in left.items() if name not in free}
    assert sorted(left) == [], "these import each other, or stand on such modules"


def test_nothing_imports_the_command_line() -> None:
    roof = ("cli", "__main__")
    below = {name: imported for name, imported in graph().items() if room(name) not in roof}
    assert [name for name, imported in below.items() if any(room(module) in roof for module in imported)] == []


def test_plugins_use_the_public_api_alone() -> None:
    paths = sorted([*(ROOT / "plugins").rglob("*.py"), *(ROOT / "apex_build" / "skeletons").rglob("*.py")])
    used = [f"{path.relative_to(ROOT)}: {module}" for path in paths for module in imports(path) if module not in PUBLIC]
    assert used == []


if __name__ == "__main__":
    modules = graph()
    for name in ROOMS:
        below = {room(other) for module, imported in modules.items() if room(module) == name for other in imported}
        print(f"{name:<12} {' '.join(one for one in ROOMS if one in below - {name})}")
