"""Dialogues made from the documentation of Python packages: thousands of functions, so that sentences hardly repeat.

Part of the testbed's training text. Read from the packages that training needs anyway (the standard library, torch,
transformers, NumPy) when it runs; none of it is committed.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

Dialogue = dict[str, Any]

PACKAGES = ("torch", "transformers", "numpy", "tokenizers", "jinja2", "gguf", "safetensors")
SKIPPED = {
    "test",
    "tests",
    "site-packages",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "__pycache__",
    "ensurepip",
    "_vendor",
}

ASKED = (
    "What does `{name}` do?", "Can you explain {name} from {module}?", "I found {name} in some code. What is it for?",
    "How would I use `{name}({arguments})`?", "Tell me about {module}.{name}.", "Is there a description of {name}?",
    "what is {name} good for", "I keep forgetting what {name} does, remind me please.",
    "Please document `def {name}({arguments})`.",
    "Someone on my team asked about {name}. What should I tell them?",
    "In {module} there is {name}. In which case do I need it?",
    "Summarize {name} for me.", "Help with {name}, please!", "Explain this line: {name}({arguments})",
)  # fmt: skip
FOLLOWED = (
    "Which arguments does it take?", "And the arguments?", "What do I pass to it?", "How is it called?", "Show me the "
                                                                                                         "signature.",
    "What are its parameters?",
)  # fmt: skip
WORDS = (
    "report",
    "blue",
    "main",
    "north",
    "utf-8",
    "river",
    "index",
    "draft",
    "alpha",
    "paper",
    "window",
    "summer",
    "left",
    "stone",
)


@dataclass(frozen=True)
class Documented:
    """A function, method or class, where it is defined, the names of its arguments, and its docstring."""

    module: str
    name: str
    arguments: tuple[str, ...]
    text: str

    @property
    def first_sentence(self) -> str:
        return re.split(r"(?<=[.!?])\s", " ".join(self.text.split("\n\n")[0].split()), maxsplit=1)[0]


def documented() -> list[Documented]:
    """Everything with a long enough docstring, in a fixed order, each docstring once."""
    found, seen = [], set()
    for module, path in _modules():
        try:
            tree = ast.parse(path.read_text(errors="ignore"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
                continue
            text = ast.get_docstring(node) or ""
            key = " ".join(text.split())[:100]
            if len(text) < 120 or key in seen:
                continue
            seen.add(key)
            taken = node.args.args if not isinstance(node, ast.ClassDef) else []
            arguments = tuple(a.arg for a in taken if a.arg not in ("self", "cls"))
            found.append(Documented(module, node.name, arguments[:6], text))
    return found


def _modules() -> Iterator[tuple[str, Path]]:
    roots = [("", Path(sysconfig.get_paths()["stdlib"]))]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec and spec.submodule_search_locations:
            roots.append((package, Path(spec.submodule_search_locations[0])))
    for package, root in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if not SKIPPED & set(parts) and path.stat().st_size < 400_000:
                yield ".".join(part for part in (package, *parts) if part and part != "__init__"), path


def paragraphs(text: str, limit: int = 900) -> str:
    """The first paragraphs of the docstring, as many as fit."""
    kept = ""
    for paragraph in text.split("\n\n"):
        if kept and len(kept) + len(paragraph) > limit:
            break
        kept += ("\n\n" if kept else "") + paragraph.rstrip()
    return kept[: 2 * limit]


def chat(item: Documented, r: Random) -> Dialogue:
    asked = r.choice(ASKED).format(name=item.name, module=item.module, arguments=", ".join(item.arguments))
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": paragraphs(item.text)}]
    if item.arguments and r.random() < 0.3:
        told = ", ".join(f"`{argument}`" for argument in item.arguments)
        messages += [
            {"role": "user", "content": r.choice(FOLLOWED)},
            {"role": "assistant", "content": f"`{item.name}({', '.join(item.arguments)})`: it takes {told}."},
        ]
    if r.random() < 0.15:
        messages.insert(
            0, {"role": "system", "content": f"You know the package {item.module.split('.')[0]}. Be brief."}
        )
    return {"messages": messages}


def examples(item: Documented) -> list[tuple[str, str]]:
    """The docstring's `>>>` examples: code and what it prints."""
    found: list[tuple[str, str]] = []
    code: list[str] = []
    printed: list[str] = []
    for line in [*textwrap.dedent(item.text).splitlines(), ""]:
        bare = line.strip()
        if bare.startswith((">>>", "...")):
            if printed:
                found.append(("\n".join(code), "\n".join(printed)))
                code, printed = [], []
            code.append(bare[4:])
        elif bare and code:
            printed.append(bare)
        else:
            if code and printed:
                found.append(("\n".join(code), "\n".join(printed)))
            code, printed = [], []
    return found


def reasoning(item: Documented, r: Random) -> Dialogue | None:
    shown = [(code, out) for code, out in examples(item) if code.strip() and len(code) < 500 and len(out) < 300]
    if not shown:
        return None
    code, out = r.choice(shown)
    asked = r.choice(
        ("What does this print?", "What is the output of this code?", "Work out the result:", "What do I get here?")
    )
    thought = (
        f"The code uses {item.name} from {item.module}. {item.first_sentence} "
        f"The last line is `{code.splitlines()[-1]}`, so the output is what that gives."
    )
    return {"messages": [
        {"role": "user", "content": f"{asked}\n\n```python\n{code}\n```"},
        {"role": "assistant", "reasoning_content": thought, "content": f"It prints:\n\n```\n{out}\n```"},
    ]}  # fmt: skip


def explained(item: Documented, r: Random) -> Dialogue:
    """A choice between this function and another, with the reason: reasoning for functions without examples."""
    rest = paragraphs(item.text.partition("\n\n")[2] or item.text, 500)
    asked = r.choice(
        (
            "When should I use {0}, and why?",
            "Would {0} be right for this?",
            "Why does {0} exist?",
            "Is {0} what I need?",
        )
    )
    return {"messages": [
        {"role": "user", "content": f"{asked.format(item.name)} {item.first_sentence}"},
        {"role": "assistant", "reasoning_content": rest, "content": f"Use `{item.name}` of {item.module}: "
                                                                    f"{item.first_sentence}"},
    ]}  # fmt: skip


def _value(argument: str, r: Random) -> tuple[str, Any]:
    if re.search(r"n$|num|size|count|dim|index|len|max|min|width|step|seed|port|level", argument):
        return "integer", r.randint(0, 4096)
    if re.search(r"is_|use_|flag|return_|allow|keep", argument):
        return "boolean", r.random() < 0.5
    if re.search(r"rate|alpha|beta|eps|scale|prob|timeout|tol", argument):
        return "number", round(r.random() * 10, 3)
    return "string", "-".join(r.sample(WORDS, r.randint(1, 2)))


def tool_call(items: list[Documented], r: Random) -> Dialogue:
    """A call of the first item's function; the others are offered as well."""
    tools = []
    for item in items:
        properties = {a: {"type": _value(a, r)[0]} for a in item.arguments}
        schema = {"type": "object", "properties": properties, "required": list(item.arguments[:2])}
        tools.append(
            {
                "type": "function",
                "function": {"name": item.name, "description": item.first_sentence, "parameters": schema},
            }
        )
    item = items[0]
    arguments = {a: _value(a, r)[1] for a in item.arguments}
    wanted = " and ".join(f"{a} {json.dumps(v)}" for a, v in arguments.items()) or "the defaults"
    sentence = item.first_sentence.rstrip(".")
    asked = r.choice(
        (
            "{0}, with {1}.",
            "Please: {0}. Take {1}.",
            "I need this: {0} ({1})",
            "Could you run it with {1}? {0}",
            "{1}. {0}",
        )
    )
    result = r.choice(
        (
            {"ok": True, "result": r.choice(WORDS)},
            {"status": "done", "items": r.randint(0, 99)},
            {"value": r.randint(0, 999)},
        )
    )
    second = paragraphs(item.text.partition("\n\n")[2], 300) or f"`{item.name}` is done."
    r.shuffle(tools)
    call = {"type": "function", "function": {"name": item.name, "arguments": arguments}}
    return {"tools": tools, "messages": [
        {"role": "user", "content": asked.format(sentence, wanted)},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": json.dumps(result)},
        {"role": "assistant", "content": f"{json.dumps(next(iter(result.values())))}. {second}"},
    ]}  # fmt: skip


def dialogues(seed: int) -> dict[str, list[Dialogue]]:
    """Dialogues by domain, with each documented item once per suitable domain, shuffled by the seed."""
    items = documented()
    r = Random(f"documented/{seed}")
    r.shuffle(items)
    with_arguments = [item for item in items if len(item.arguments) >= 1]
    calls = [
        tool_call([item, *r.sample(with_arguments, r.randint(0, 2))], r)
        for item in with_arguments
        if len(item.first_sentence) < 200
    ]
    thoughts = [reasoning(item, r) or explained(item, r) for item in items]
    return {"chat": [chat(item, r) for item in items], "reasoning": thoughts, "tool-calling": calls}
