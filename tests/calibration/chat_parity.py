"""Compare our renderer with transformers' `apply_chat_template`, on every template of the fetched llama.cpp trees.

python tests/calibration/chat_parity.py    # the table of docs/chat-templates.md
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from apex_build.calibration import chat_sandbox
from apex_build.calibration.chat import ChatTemplate, try_render
from apex_build.hookspecs import Document
from apex_build.places import data_root
from apex_build.source.fetch import ensure_source
from apex_build.source.pins import all_pins

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
FOLDER = "models/templates"

_ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": 'Add <two> numbers & "more" – ünïcode',
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "number", "description": "the first"},
                "b": {"type": "number", "enum": [1, 2.5, -3], "default": 1},
                "how": {"type": "object", "properties": {"exact": {"type": "boolean"}}, "required": ["exact"]},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["a", "b"],
        },
    },
}
_NOW = {
    "type": "function",
    "function": {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}},
}
_PLAIN = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {name: {"type": "number", "description": f"number {name}"} for name in "ab"},
            "required": ["a", "b"],
        },
    },
}


def _call(name: str, arguments: Any, number: int = 0) -> dict[str, Any]:
    return {"id": f"call{number:05}", "type": "function", "function": {"name": name, "arguments": arguments}}


_SYSTEM = {"role": "system", "content": "Be <brief> & kind.\n"}
_HELLO = {"role": "user", "content": "  Hello,\n\tworld! 'ü' {{ 1 + 1 }}  "}
_HI = {"role": "assistant", "content": "Hi.\n\nWhat <else>?\n"}
_AGAIN = {"role": "user", "content": "What is 1 + 2?"}
_THREE = {"role": "assistant", "content": "3"}
_THOUGHT = {"role": "assistant", "content": "3", "reasoning_content": "I add.\n\nIt is 3."}
_INLINE = {"role": "assistant", "content": "<think>\nI add.\n</think>\n\n3"}
_CALLS = {"role": "assistant", "content": "", "tool_calls": [_call("add", {"a": 1, "b": 2.5, "how": {"exact": True}})]}
_ANSWER = {"role": "tool", "name": "add", "tool_call_id": "call00000", "content": '{"sum": 3.5}'}
_TWO = {"role": "assistant", "content": "Both.", "tool_calls": [_call("add", {"a": 1, "b": 2}), _call("now", {}, 1)]}
_NOON = {"role": "tool", "name": "now", "tool_call_id": "call00001", "content": "noon"}

CONVERSATIONS: dict[str, tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]]] = {
    "one turn": ((_HELLO, _HI), ()),
    "system": ((_SYSTEM, _HELLO, _HI), ()),
    "several turns": ((_SYSTEM, _HELLO, _HI, _AGAIN, _THREE), ()),
    "several turns, no system": ((_HELLO, _HI, _AGAIN, _THREE), ()),
    "reasoning": ((_AGAIN, _THOUGHT), ()),
    "reasoning, several turns": ((_SYSTEM, _AGAIN, _THOUGHT, _HELLO, {**_HI, "reasoning_content": "A greeting."}), ()),
    "reasoning in the content": ((_AGAIN, _INLINE, _HELLO, _HI), ()),
    "reasoning under another name": ((_AGAIN, {"role": "assistant", "content": "3", "thinking": "I add."}), ()),
    "tools not used": ((_HELLO, _HI), (_ADD, _NOW)),
    "tools, system": ((_SYSTEM, _HELLO, _HI), (_ADD,)),
    "tool call": ((_AGAIN, _CALLS, _ANSWER, _THREE), (_ADD, _NOW)),
    "tool call without tools": ((_AGAIN, _CALLS, _ANSWER, _THREE), ()),
    "tool call, content None": ((_AGAIN, {**_CALLS, "content": None}, _ANSWER, _THREE), (_ADD,)),
    "tool call, no content": (
        (_AGAIN, {key: value for key, value in _CALLS.items() if key != "content"}, _ANSWER, _THREE), (_ADD,)),
    "tool call, arguments as text": (
        (_AGAIN, {**_CALLS, "tool_calls": [_call("add", '{"a": 1, "b": 2.5}')]}, _ANSWER, _THREE), (_ADD,)),
    "two tool calls": ((_SYSTEM, _AGAIN, _TWO, {**_ANSWER}, _NOON, _THOUGHT, _HELLO, _HI), (_ADD, _NOW)),
    "tools and reasoning": (
        (_SYSTEM, _AGAIN, {**_CALLS, "reasoning_content": "I need the tool."}, _ANSWER, _THOUGHT), (_ADD,)),
    "a plain tool": ((_SYSTEM, _AGAIN, _CALLS, _ANSWER, _THREE), (_PLAIN,)),
    "tool call last": ((_AGAIN, _CALLS), (_ADD,)),
    "content in pieces": (
        ({"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]}, _HI), ()),
    "roles do not alternate": ((_HELLO, _AGAIN, _HI), ()),
    "assistant first": ((_HI, _HELLO, _THREE), ()),
    "system last": ((_HELLO, _HI, _SYSTEM), ()),
    "an unknown role": ((_HELLO, {"role": "narrator", "content": "Meanwhile."}), ()),
    "a message without role": (({"content": "Hello"}, _HI), ()),
    "user without content": (({"role": "user"}, _HI), ()),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A conversation, and whether it ends where the model must answer."""

    name: str
    document: Document
    answer_begins: bool = False


def cases() -> list[Case]:
    """The conversations above, complete and cut before an answer, and some from the built-in set."""
    made = [
        Case(name, Document("", messages=messages, tools=tools, origin=name))
        for name, (messages, tools) in CONVERSATIONS.items()
    ]
    for path in sorted((data_root() / "calibration_sets" / "data").glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[:3], 1):
            row, name = json.loads(line), f"{path.name}:{number}"
            tools = tuple(row.get("tools") or ())
            made.append(Case(name, Document("", messages=tuple(row["messages"]), tools=tools, origin=name)))
    return made + [replace(case, answer_begins=True) for case in made]


def templates() -> Iterator[tuple[str, Path]]:
    """Each template once, named after the first pin that has it; both if two pins have different versions."""
    seen: dict[str, set[bytes]] = {}
    for pin in all_pins():
        for path in sorted((ensure_source(pin) / FOLDER).glob("*.jinja")):
            if (text := path.read_bytes()) not in seen.setdefault(path.name, set()):
                seen[path.name].add(text)
                yield pin.name, path


def ours(text: str, given: list[Case]) -> list[str]:
    """Our rendering of each case, or our error message."""
    template = ChatTemplate(text, "template", TOKENS)
    made: dict[int, str] = {}
    for answer_begins in (False, True):
        at = [number for number, case in enumerate(given) if case.answer_begins is answer_begins]
        found = try_render(template, [given[number].document for number in at], answer_begins=answer_begins)
        for number, one in zip(at, found, strict=True):
            made[number] = one.text if one.text is not None else f"refused: {one.words}"
    return [made[number] for number in range(len(given))]


def tokenizer() -> Any:
    """The smallest possible tokenizer: rendering a template needs none of its tokens."""
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))


def theirs(text: str, given: list[Case]) -> list[str]:
    """The rendering of each case by transformers, or its error message."""
    logging.getLogger("transformers").setLevel(logging.ERROR)  # torch is not needed
    import jinja2
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import chat_template_utils

    class Now(datetime):
        @classmethod
        def now(cls, *_: Any) -> Any:
            return chat_sandbox.DATE

    chat_template_utils.datetime = Now
    tokenizing = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), **TOKENS)
    found = []
    for case in given:
        messages, tools = list(case.document.messages), list(case.document.tools) or None
        try:
            made = tokenizing.apply_chat_template(
                messages, tools, chat_template=text, add_generation_prompt=case.answer_begins, tokenize=False
            )
            found.append(str(made))
        except jinja2.exceptions.TemplateError as error:
            own = type(error) is jinja2.exceptions.TemplateError  # raise_exception, in the template
            found.append(f"refused: {error}" if own else f"refused: {type(error).__name__}: {error}")
        except Exception as error:
            found.append(f"refused: {type(error).__name__}: {error}")
    return found


@dataclass(frozen=True)
class Compared:
    """How many cases a template renders and rejects, and the cases where we differ: name, ours, theirs."""

    pin: str
    name: str
    rendered: int
    refused: int
    unequal: tuple[tuple[str, str, str], ...]


def compare(pin: str, path: Path) -> Compared:
    text, given = path.read_text(encoding="utf-8"), cases()
    mine, others = ours(text, given), theirs(text, given)
    unequal = [(case.name, one, other) for case, one, other in zip(given, mine, others, strict=True) if one != other]
    refused = sum(one.startswith("refused: ") for one in others)
    return Compared(pin, path.name, len(given) - refused, refused, tuple(unequal))


def main() -> None:
    print("| template | of the pin | cases | rendered | refused, in the same words | equal |")
    print("|---|---|---|---|---|---|")
    for pin, path in templates():
        one = compare(pin, path)
        cases = one.rendered + one.refused
        figures = (cases, one.rendered, one.refused, cases - len(one.unequal))
        print("|", " | ".join([path.stem, pin, *map(str, figures)]), "|", flush=True)
        for name, mine, other in one.unequal:
            print(f"{name}\nours:   {mine[-300:]!r}\ntheirs: {other[-300:]!r}")


if __name__ == "__main__":
    main()
