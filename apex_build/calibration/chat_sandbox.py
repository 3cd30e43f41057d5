"""Renders conversations with a model's chat template: `python -m apex_build.calibration.chat_sandbox`, see
sandbox_child.py.

The environment is the one that transformers gives chat templates (utils/chat_template_utils.py), but for the current
date: a calibration text must come out the same tomorrow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from apex_build.native import sandbox_child

CPU_SECONDS = 120
# What all conversations together may become: templates add a few words to each message, and some repeat the tools.
_BASE_CHARACTERS = 8 << 20
_TIMES_GIVEN = 8
DATE = datetime(2026, 1, 1)


class _Refused(Exception):
    """The template itself said no to a conversation (`raise_exception`)."""


def _refuse(message: str) -> None:
    raise _Refused(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what the assistant wrote, for training; renders its content."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """For each conversation `text`, `refused` with the template's words, or `failed`; or one error for all of them."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": DATE.strftime}
    results: list[dict[str, str]] = []
    left = _BASE_CHARACTERS + _TIMES_GIVEN * len(json.dumps(request["conversations"], ensure_ascii=False))
    try:
        template = environment.from_string(request["template"])
        for conversation in request["conversations"]:
            try:
                pieces = []
                for piece in template.generate(**request["variables"], **conversation):
                    left -= len(piece)
                    if left < 0:
                        return {"error": "it renders many times what it is given", "at": len(results)}
                    pieces.append(piece)
                results.append({"text": "".join(pieces)})
            except _Refused as error:
                results.append({"refused": str(error)})
            except (SecurityError, MemoryError):
                raise
            except Exception as error:
                results.append({"failed": f"{type(error).__name__}: {error}"})
    except SecurityError as error:
        return {"error": f"it tried what the sandbox forbids: {error}", "at": len(results)}
    except MemoryError:
        return {"error": f"it needs more than {sandbox_child.MEMORY_BYTES >> 30} GiB of memory", "at": len(results)}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "at": len(results)}
    return {"results": results}


if __name__ == "__main__":
    sandbox_child.serve(_answer, cpu_seconds=lambda _request: CPU_SECONDS)
