"""Every hint of every error can be followed: its commands, options, variables and pages exist."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from apex_build import errors
from apex_build.cli import apex
from apex_build.cli.verbs import all_verbs

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "apex_build").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")])
CLASSES = {
    name: one
    for name, one in vars(errors).items()
    if isinstance(one, type) and issubclass(one, errors.ApexError) and one is not errors.ApexError
}
HOLE = "HOLE"  # what stands for a value that is only known when it is raised


@functools.cache
def modules() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


@functools.cache
def functions() -> dict[str, list[tuple[ast.FunctionDef, ast.Module]]]:
    """All functions whose name is unique: helpers for hints."""
    found: dict[str, list[tuple[ast.FunctionDef, ast.Module]]] = {}
    for tree in modules().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, []).append((node, tree))
    return {name: all_ for name, all_ in found.items() if len(all_) == 1}


@functools.cache
def assignments(scope: ast.AST) -> dict[str, list[ast.expr]]:
    """The values assigned to names in a function or a module."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(scope):
        value = getattr(node, "value", None)
        if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) or value is None:
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name):
                found.setdefault(target.id, []).append(value)
            elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                for one, part in zip(target.elts, value.elts, strict=False):
                    if isinstance(one, ast.Name):
                        found.setdefault(one.id, []).append(part)
    return found


@functools.cache
def constants() -> dict[str, list[ast.expr]]:
    """Top-level assignments of all modules, by name: for module.NAME."""
    found: dict[str, list[ast.expr]] = {}
    for tree in modules().values():
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found.setdefault(node.targets[0].id, []).append(node.value)
    return found


def texts(node: ast.expr, scopes: tuple[ast.AST, ...], depth: int = 0) -> list[str]:
    """The possible values of an expression, with HOLE for parts known only at run time."""
    if depth > 4:
        return [HOLE]
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.IfExp):
        return texts(node.body, scopes, depth) + texts(node.orelse, scopes, depth)
    if isinstance(node, ast.BoolOp):
        return [text for value in node.values for text in texts(value, scopes, depth)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [a + b for a in texts(node.left, scopes, depth) for b in texts(node.right, scopes, depth)][:50]
    if isinstance(node, ast.JoinedStr):
        found = [""]
        for part in node.values:
            inner = part.value if isinstance(part, ast.FormattedValue) else part
            pieces = (
                texts(inner, scopes, depth + 1) or [HOLE]
                if isinstance(inner, (ast.Constant, ast.Name, ast.Call, ast.IfExp))
                else [HOLE]
            )
            found = [a + b for a in found for b in pieces][:50]
        return found
    if isinstance(node, ast.Name):
        values = [value for scope in scopes for value in assignments(scope).get(node.id, [])] or constants().get(
            node.id, []
        )
        return [text for value in values for text in texts(value, scopes, depth + 1)][:50] or [HOLE]
    if isinstance(node, ast.Attribute):
        return [text for value in constants().get(node.attr, []) for text in texts(value, scopes, depth + 1)][:50] or [
            HOLE
        ]
    if isinstance(node, ast.Call):
        name = (
            node.func.id
            if isinstance(node.func, ast.Name)
            else node.func.attr
            if isinstance(node.func, ast.Attribute)
            else ""
        )
        results: list[str] = []
        for function, module in functions().get(name, []):
            for statement in ast.walk(function):
                if isinstance(statement, ast.Return) and statement.value is not None:
                    results += texts(statement.value, (function, module), depth + 1)
        return results[:50] or [HOLE]
    return [HOLE]


@functools.cache
def hints() -> dict[str, set[str]]:
    """Error class -> all hints that the code may raise it with."""
    found: dict[str, set[str]] = {name: {one.advice} if one.advice else set() for name, one in CLASSES.items()}
    for tree in modules().values():
        scopes = {
            id(node): scope
            for scope in ast.walk(tree)
            if isinstance(scope, ast.FunctionDef)
            for node in ast.walk(scope)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            given = next((one.value for one in node.keywords if one.arg == "hint"), None)
            if name in CLASSES and given is not None:
                scope = (scopes[id(node)], tree) if id(node) in scopes else (tree,)
                found[name] |= {text for text in texts(given, scope) if text not in ("", HOLE)}
    return found


@functools.cache
def verbs() -> dict[str, click.Command]:
    context, found = click.Context(apex), {}
    for name in all_verbs():  # those of the built-in plugins too
        command = apex.get_command(context, name)
        assert command is not None
        found[name] = command
        if isinstance(command, click.Group):
            found |= {f"{name} {below}": inner for below, inner in command.commands.items()}
    return found


@functools.cache
def helped(verb: str) -> str:
    """The help of a verb, as a user who follows a hint sees it."""
    ran = CliRunner().invoke(apex, [*verb.split(), "--help"])
    assert ran.exit_code == 0, verb
    return ran.output


COMMAND = re.compile(r"\bapex ([a-z]+(?:-[a-z]+)*)(?: ([a-z]+))?([^;,()]*)")
OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z-]*)")
FOREIGN = re.compile(r"\b(llama-[a-z]+|dask|git|pip|python|make|sudo|gguf-convert-endian|mkdir|mv|rm|df)\b[^;,]*")


def followed(hint: str) -> int:
    """Check everything that a hint names; returns the number of commands and options."""
    count = 0
    ours = FOREIGN.sub("", hint)
    for verb, below, rest in COMMAND.findall(ours):
        if verb not in all_verbs():
            assert verb in ("runs", "is", "that", "evaluates"), f"no verb '{verb}': {hint}"
            continue
        name = f"{verb} {below}" if f"{verb} {below}" in verbs() else verb
        helped(name)
        count += 1
        for option in OPTION.findall(rest):
            if option != "--help":
                assert option in helped(name), f"apex {name} has no {option}: {hint}"
                count += 1
    everywhere = {
        option
        for command in verbs().values()
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    for option in OPTION.findall(ours):
        assert option == "--help" or option in everywhere, f"no verb has {option}: {hint}"
        count += 1
    for variable in re.findall(r"\bAPEX_[A-Z_]+", hint):
        assert f"`{variable}`" in (ROOT / "docs" / "environment.md").read_text(encoding="utf-8"), hint
        count += 1
    for page in re.findall(r"docs/[\w-]+\.md", hint):
        assert (ROOT / page).is_file(), hint
        count += 1
    for target in re.findall(r"(?:^|, |; |or )make (?!the)(\w+)", hint):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), hint
        count += 1
    for extra in re.findall(r"apex-build\[(\w+)\]", hint):
        assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE), hint
        count += 1
    return count


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_hints_can_be_followed(name: str) -> None:
    assert hints()[name], f"{name} never says what to try"
    for hint in sorted(hints()[name]):
        followed(hint)


def test_the_walk_finds_what_the_code_says() -> None:
    """Ensure that the test does not pass by finding nothing."""
    every = set().union(*hints().values())
    assert len(every) > 150
    assert sum(map(followed, every)) > 150
    assert any("apex calibrate" in hint for hint in hints()["DataMissing"])
    assert any("--cuda-toolchain" in hint for hint in hints()["ToolkitUnusable"])


def test_the_walk_refuses_what_does_not_exist() -> None:
    for hint in (
        "apex calibrate MODEL --no-such",
        "apex quantise MODEL",
        "--nothing-has-this",
        "APEX_NOWHERE=1",
        "make nothing",
        "docs/no.md",
    ):
        with pytest.raises(AssertionError):
            followed(hint)


def test_hints_are_short_lines_of_plain_english() -> None:
    for hint in set().union(*hints().values()):
        assert "\n" not in hint and not re.search(r"\b(mend|mended|anew|foretell)", hint), hint
