"""Render conversations with the model's chat template."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apex_build.calibration import chat_sandbox
from apex_build.errors import CalibrationSetInvalid, ChatTemplateFailed
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.header import ArrayValue
from apex_build.hookspecs import Document
from apex_build.native.sandbox_child import OutOfBounds, ask

_WALL_SECONDS = 300.0
# The names under which transformers passes special tokens to a template (special_tokens_map).
_SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",  # sic: as GGUF spells it
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}
_HINT = "apex calibrate MODEL --chat-template FILE, with a template that works"


@dataclass(frozen=True)
class ChatTemplate:
    """A template's text, where it came from, and the variables that it may use besides the conversation. `tool_use`:
    another one for conversations with tools, which some models have.
    """

    text: str
    origin: str
    variables: dict[str, str]
    tool_use: str = ""


def chat_template(model: Model, file: Path | None = None) -> ChatTemplate:
    """The template in the model's metadata or in the user's file. Raises ChatTemplateFailed without one."""
    if file is not None:
        return template_of_file(model, file)
    text = model.metadata.get("tokenizer.chat_template")
    if not isinstance(text, str):
        raise ChatTemplateFailed(
            f"{model.path}: the model has no chat template (tokenizer.chat_template), and the calibration set has "
            "conversations",
            hint=f"apex calibrate {model.path} --chat-template FILE, or with a plain text: --text FILE",
        )
    tool_use = model.metadata.get("tokenizer.chat_template.tool_use")
    return ChatTemplate(
        text,
        f"{model.path}: tokenizer.chat_template",
        _variables(model),
        tool_use if isinstance(tool_use, str) else "",
    )


def template_of_file(model: Model, file: Path) -> ChatTemplate:
    """The user's template, with the model's special tokens. Raises ChatTemplateFailed."""
    try:
        return ChatTemplate(file.read_text(encoding="utf-8"), str(file), _variables(model))
    except (OSError, UnicodeDecodeError) as error:
        raise ChatTemplateFailed(f"{file}: cannot be read: {error}") from None


def _variables(model: Model) -> dict[str, str]:
    found = zip(_SPECIAL_TOKENS, _special_tokens(model, _SPECIAL_TOKENS.values()), strict=True)
    return {name: token for name, token in found if token}


@dataclass(frozen=True)
class Rendered:
    """A conversation's `text`; None if the template refused it with these `words`, or failed, which `words` says
    then. `line` of the template and `message` of the conversation, counted from 1: where it did; 0 where not known.
    """

    text: str | None
    words: str = ""
    failed: bool = False
    line: int = 0
    message: int = 0

    def where(self, document: Document) -> str:
        """The place in words, empty if none is known."""
        role = str(document.messages[self.message - 1].get("role")) if self.message else ""
        parts = [f"message {self.message} ({role}) of {document.origin}" if self.message else document.origin]
        return ", ".join([f"line {self.line} of the template", *filter(None, parts)]) if self.line else parts[0]


def render(template: ChatTemplate, documents: Sequence[Document], *, answer_begins: bool = False) -> list[str | None]:
    """The text of each conversation, None if the template refuses it (an unknown role, or tools).

    `answer_begins`: up to where the model must answer, as a server prompts it.

    Raises ChatTemplateFailed for a template that fails, leaves the sandbox, or does not end.
    """
    found = try_render(template, documents, answer_begins=answer_begins)
    for one, document in zip(found, documents, strict=True):
        if one.failed:
            forbidden = "it tried what the sandbox forbids: " if one.words.startswith("SecurityError") else ""
            raise ChatTemplateFailed(
                f"chat template of {template.origin}: {forbidden}{one.words}, at {one.where(document)}", hint=_HINT
            )
    return [one.text for one in found]


def try_render(template: ChatTemplate, documents: Sequence[Document], *, answer_begins: bool = False) -> list[Rendered]:
    """As `render`, but a conversation that the template fails on does not stop the others."""
    if template.tool_use and any(document.tools for document in documents):
        return _by_tools(template, documents, answer_begins)
    conversations = [_conversation(document, answer_begins) for document in documents]
    request = {"template": template.text, "variables": template.variables, "conversations": conversations}
    try:
        answer = ask(chat_sandbox.__name__, request, wall_seconds=_WALL_SECONDS)
    except OutOfBounds as error:
        raise ChatTemplateFailed(f"chat template of {template.origin}: {error}") from None
    except TypeError as error:  # of a source in a plugin
        raise CalibrationSetInvalid(f"a conversation contains a value that is not JSON: {error}") from None
    if "error" in answer:
        at = f", in {documents[answer['at']].origin}" if "at" in answer and answer["at"] < len(documents) else ""
        raise ChatTemplateFailed(
            f"chat template of {template.origin}: {answer['error']}{at}",
            hint=_HINT,
        )
    return [
        Rendered(
            result.get("text"),
            str(result.get("refused") or result.get("failed") or ""),
            "failed" in result,
            result.get("line", 0),
            result.get("message", 0),
        )
        for result in answer["results"]
    ]


def _by_tools(template: ChatTemplate, documents: Sequence[Document], answer_begins: bool) -> list[Rendered]:
    """Each conversation with the template that transformers would use."""
    both = {True: replace(template, text=template.tool_use, tool_use=""), False: replace(template, tool_use="")}
    found: dict[int, Rendered] = {}
    for tools, one in both.items():
        at = [number for number, document in enumerate(documents) if bool(document.tools) is tools]
        made = try_render(one, [documents[number] for number in at], answer_begins=answer_begins) if at else []
        found |= dict(zip(at, made, strict=True))
    return [found[number] for number in range(len(documents))]


def without_system(document: Document) -> Document | None:
    """The conversation with its system message put into the user's first; None if it lacks one of them."""
    first, *rest = document.messages
    if first.get("role") != "system" or not rest or rest[0].get("role") != "user":
        return None
    if not all(isinstance(message.get("content"), str) for message in (first, rest[0])):
        return None
    user = {**rest[0], "content": f"{first['content']}\n\n{rest[0]['content']}"}
    return replace(document, messages=(user, *rest[1:]))


def _conversation(document: Document, answer_begins: bool) -> dict[str, Any]:
    # As transformers calls a template: `tools` and `documents` are there, as none.
    tools = list(document.tools) or None
    return {
        "messages": list(document.messages),
        "tools": tools,
        "documents": None,
        "add_generation_prompt": answer_begins,
    }


def special_token(model: Model, key: str) -> str:
    """The text of a special token (`bos`), '' where the model has none."""
    return _special_tokens(model, (key,))[0]


def _special_tokens(model: Model, keys: Iterable[str]) -> list[str]:
    """For several at once: reading a large vocabulary takes a second."""
    numbers = [model.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in keys]
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, ArrayValue) and any(isinstance(number, int) for number in numbers):
        tokens = tokens.read()
    if not isinstance(tokens, tuple):
        return ["" for _ in numbers]
    return [str(tokens[n]) if isinstance(n, int) and 0 <= n < len(tokens) else "" for n in numbers]
