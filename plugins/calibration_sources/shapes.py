"""Rows of public data sets, known by the names of their columns: conversations, prompts with answers, texts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from apex_build.plugin_api import CalibrationSetInvalid, Document

# What a part may map a column to, with `columns = { messages = "chat" }`.
COLUMNS = ("messages", "tools", "system", "prompt", "completion", "reasoning", "text")
_CONVERSATIONS = ("messages", "conversations", "conversation")
_TEXTS = ("text", "content", "code")
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),  # and `input`, between them
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "answer"),
    ("problem", "solution"),
)
_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "assistant"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
}
_CALLS = ("function_call", "function-call", "tool_call")  # roles of a message that is nothing but calls
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


def document(row: Any, origin: str, columns: Mapping[str, str] | None = None) -> Document:
    """A row as a document. `columns`: the meaning of columns whose names do not tell.

    Raises CalibrationSetInvalid, with the columns that were found, for a row of no known shape.
    """
    if not isinstance(row, dict):
        raise CalibrationSetInvalid(f"{origin}: expected an object with 'messages' or 'text', found {str(row)[:80]}")
    if columns:
        row = _mapped(row, origin, columns)
    for name in _CONVERSATIONS:
        messages = _decoded(row.get(name))
        if _objects(messages) and messages:
            return _conversation(row, [_message(one, n, origin) for n, one in enumerate(messages, 1)], origin)
    for asked, answered in _PAIRS:
        if asked in row and answered in row:
            return _pair(row, asked, answered, origin)
    for name in _TEXTS:
        if isinstance(row.get(name), str):
            return Document(domain="", text=row[name], origin=origin)
    raise _unknown(row, origin)


def without_nones(value: Any) -> Any:
    """As it was before it became a table: there, every object has the keys of all of them."""
    if isinstance(value, dict):
        return {key: without_nones(item) for key, item in value.items() if item is not None}
    return [without_nones(item) for item in value] if isinstance(value, list) else value


def _unknown(row: Mapping[str, Any], origin: str) -> CalibrationSetInvalid:
    found = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items()) or "none"
    pairs = ", ".join("/".join(pair) for pair in _PAIRS)
    return CalibrationSetInvalid(
        f"{origin}: expected an object with 'messages' or 'text'; its columns are: {found:.300}",
        hint=f"known shapes: {', '.join((*_CONVERSATIONS, *_TEXTS))}; {pairs}. "
        'Others need columns = { messages = "COLUMN" } in the [[part]]',
    )


def _mapped(row: Mapping[str, Any], origin: str, columns: Mapping[str, str]) -> dict[str, Any]:
    for source in columns.values():
        if source not in row:
            raise CalibrationSetInvalid(
                f"{origin}: there is no column '{source}'; there are: {', '.join(row) or 'none'}"
            )
    return {target: row[source] for target, source in columns.items()}


def _pair(row: Mapping[str, Any], asked: str, answered: str, origin: str) -> Document:
    before, after = _decoded(row[asked]), _decoded(row[answered])
    if isinstance(row.get("input"), str) and row["input"].strip() and asked == "instruction":
        before = f"{before}\n\n{row['input']}"
    messages = []
    for value, role in ((before, "user"), (after, "assistant")):
        if _objects(value):  # conversations themselves
            messages += [_message(one, n, origin) for n, one in enumerate(value, 1)]
        elif isinstance(value, str):
            messages.append(_message({"role": role, "content": value}, 1, origin))
        else:
            raise _unknown(row, origin)
    thought = next((row[name] for name in _REASONING if isinstance(row.get(name), str)), None)
    if thought and "reasoning_content" not in messages[-1]:
        messages[-1]["reasoning_content"] = thought
    return _conversation(row, messages, origin)


def _conversation(row: Mapping[str, Any], messages: list[dict[str, Any]], origin: str) -> Document:
    system = next((row[name] for name in _SYSTEM if isinstance(row.get(name), str) and row[name].strip()), None)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    tools: Any = next((_decoded(row[name]) for name in _TOOLS if row.get(name)), [])
    if not _objects(tools):
        raise _unknown(row, origin)
    tools = [one if "function" in one else {"type": "function", "function": one} for one in tools]
    return Document(domain="", messages=tuple(messages), tools=tuple(tools), origin=origin)


def _message(given: Mapping[str, Any], number: int, origin: str) -> dict[str, Any]:
    """With `role` and `content`, calls as objects, and the reasoning apart."""
    role = given.get("role", given.get("from"))
    if not isinstance(role, str) or not role:
        raise CalibrationSetInvalid(
            f"{origin}: message {number} has no role: expected 'role', found {', '.join(given) or 'nothing'}"
        )
    if "from" in given and "role" not in given:
        given = {
            **{key: value for key, value in given.items() if key not in ("from", "value")},
            "content": given.get("value"),
        }
    message = {**given, "role": _ROLES.get(role, role)}
    content = message.get("content")
    if content is not None and not isinstance(content, (str, list)):
        raise CalibrationSetInvalid(
            f"{origin}: message {number} ({role}): 'content' is {str(content)[:60]!r}, expected a text"
        )
    if role in _CALLS:
        message = {"role": "assistant", "content": "", "tool_calls": _decoded(content)}
    if (calls := _decoded(message.get("tool_calls"))) is not None:
        message["tool_calls"] = [_call(one) for one in (calls if isinstance(calls, list) else [calls])]
        if not _objects(message["tool_calls"]):
            raise CalibrationSetInvalid(f"{origin}: message {number} ({role}): 'tool_calls' is {str(calls)[:60]!r}")
    if message["role"] == "assistant" and isinstance(content, str) and "reasoning_content" not in message:
        thought = _THOUGHT.match(content)
        if thought and thought[1].strip():
            message |= {"reasoning_content": thought[1].strip(), "content": content[thought.end() :]}
    return message


def _call(given: Any) -> Any:
    """With its name and arguments in `function`, the arguments as an object."""
    given = _decoded(given)
    if not isinstance(given, dict):
        return given
    if "function" not in given and "name" in given:
        given = {"type": "function", "function": {key: given[key] for key in ("name", "arguments") if key in given}}
    function = given.get("function")
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        given = {**given, "function": {**function, "arguments": _decoded(function["arguments"])}}
    return given


def _decoded(value: Any) -> Any:
    """A list or object that was written as JSON text; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def in_pieces(text: str, origin: str, size: int) -> Iterator[Document]:
    """A long text in pieces of whole lines, so that domains take turns often."""
    piece, length = [], 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        length += len(line)
        if length >= size:
            yield Document(domain="", text="".join(piece), origin=origin)
            piece, length = [], 0
    if length:
        yield Document(domain="", text="".join(piece), origin=origin)
