"""The training text of the testbed: text that every machine with Python has, and generated dialogues. None of it is
committed.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import documented
from dialogues import TRAIN, Family, generate
from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = Path(__file__).parent
END_OF_TEXT = "<|endoftext|>"


@cache
def _template() -> Template:
    return ImmutableSandboxedEnvironment().from_string((HERE / "chat_template.jinja").read_text())


def render(dialogue: Mapping[str, Any], **variables: object) -> str:
    """A dialogue, formatted with the testbed's chat template."""
    return _template().render(messages=dialogue["messages"], tools=dialogue.get("tools"), **variables)


def standard_library() -> list[str]:
    """Source files of the interpreter's standard library, without its tests and tables, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {
        "test",
        "tests",
        "site-packages",
        "idlelib",
        "lib2to3",
        "encodings",
        "pydoc_data",
        "__pycache__",
        "ensurepip",
    }
    files = [f for f in sorted(root.rglob("*.py")) if not skipped & set(f.relative_to(root).parts)]
    return [text for f in files if 500 < len(text := f.read_text(errors="ignore")) < 60_000]


def topics() -> list[str]:
    """The language reference, as shown by `help()`."""
    from pydoc_data.topics import topics as texts

    return [texts[key] for key in sorted(texts)]


def dialogues(families: dict[str, list[Family]], domain: str, seed: int, count: int) -> list[str]:
    return [render(d) for d in islice(generate(families, domain, seed), count)]


def training_text(seed: int) -> dict[str, list[str]]:
    """Documents by domain, shuffled. One dialogue in eight comes from a few families with drawn words, the others from
    docstrings.
    """
    documents = {"code": standard_library(), "topics": topics()}
    for domain, made in documented.dialogues(seed).items():
        documents[domain] = [render(d) for d in made] + dialogues(TRAIN, domain, seed, len(made) // 7)
    for domain in documents:
        Random(f"{seed}/{domain}").shuffle(documents[domain])
    return documents
