"""Renders conversations with a model's chat template: `python -m apex_build.calibration.chat_sandbox`, see
sandbox_child.py.

The environment, and what is done to the messages first, are those of transformers (utils/chat_template_utils.py), so
that a text is byte for byte what `apply_chat_template` makes; tests/calibration/test_chat_parity.py compares the two.
The one exception is the current date: a calibration text must come out the same tomorrow.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from types import FrameType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.utils
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from apex_build.native import sandbox_child

CPU_SECONDS = 120
# A limit for all conversations together: templates add a few words to each message, and some repeat the tools.
_BASE_CHARACTERS = 8 << 20
_TIMES_GIVEN = 8
DATE = datetime(2026, 1, 1)
# What a message's reasoning is called in public data, the name that templates read first.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class _Refused(TemplateError):
    """The template itself said no to a conversation (`raise_exception`)."""


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what the assistant wrote, for training; renders its content, in a separate scope."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict`, reduced to its two harmless uses for templates."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace`, without names that start with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        names = dict(*rest, **kwargs)
        for name in names:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(
            f"Chat templates cannot store underscore-prefixed attributes on a namespace, but got {name!r}. "
            "Please rename the attribute."
        )


def environment() -> ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> None:  # named as in transformers: errors about wrong arguments show the name
        raise _Refused(message)

    def strftime_now(format: str) -> str:
        return DATE.strftime(format)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    made.globals |= {"dict": _Dict(), "namespace": _Namespace}
    return made


def _messages(given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As transformers hands them over: no key without a value, and the reasoning under each of its names."""
    made = []
    for one in given:
        message = {key: value for key, value in one.items() if value is not None}
        reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        made.append(message)
    return made


def _where(error: BaseException, messages: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The template's line that raised, and the message that it was at, counted from 1; 0 where that is not known."""
    line, message = 0, 0
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == "<template>":
            line, message = number, _message_of(frame, messages) or message
    return {"line": line, "message": message}


def _message_of(frame: FrameType, messages: Sequence[Mapping[str, Any]]) -> int:
    at = {
        name: number
        for name, value in frame.f_locals.items()
        for number, message in enumerate(messages, 1)
        if value is message
    }
    named = [at[name] for name in ("message", "msg", "m") if name in at]  # others: the first or the last one, kept
    return (named or [max(at.values(), default=0)])[0]


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """For each conversation `text`, `refused` with the template's words, or `failed`; or one error for all of them."""
    results: list[dict[str, Any]] = []
    left = _BASE_CHARACTERS + _TIMES_GIVEN * len(json.dumps(request["conversations"], ensure_ascii=False))
    try:
        template = environment().from_string(request["template"])
        for conversation in request["conversations"]:
            messages = _messages(conversation["messages"])
            try:
                pieces = []
                for piece in template.generate(**request["variables"], **{**conversation, "messages": messages}):
                    left -= len(piece)
                    if left < 0:
                        return {"error": "it renders many times what it is given", "at": len(results)}
                    pieces.append(piece)
                results.append({"text": "".join(pieces)})
            except _Refused as error:
                results.append({"refused": str(error), **_where(error, messages)})
            except MemoryError:
                raise
            except Exception as error:
                results.append({"failed": f"{type(error).__name__}: {error}", **_where(error, messages)})
    except MemoryError:
        return {"error": f"it needs more than {sandbox_child.MEMORY_BYTES >> 30} GiB of memory", "at": len(results)}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "at": len(results)}
    return {"results": results}


if __name__ == "__main__":
    sandbox_child.serve(_answer, cpu_seconds=lambda _request: CPU_SECONDS)
