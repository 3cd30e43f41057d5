"""Lists of types that people share: llama.cpp's --tensor-type-file, ik_llama.cpp's --custom-q, and recipes in their
style.

All are `regex=type`. They are one a line, or several separated by commas or spaces; `#` starts a comment; types and
patterns are case-insensitive, as llama-quantize lower-cases patterns. A pattern is searched in a tensor's name, and
the first match decides: so lists are used unchanged, and a rule may match any number of tensors, or none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apex_build.errors import TemplateFailed, TypeUnknown
from apex_build.gguf_model.catalogue import Tensor
from apex_build.hookspecs import PolicySpec
from apex_build.native.ggml import Ggml
from apex_build.parameters import writable_type
from apex_build.policy.render import Places, find
from apex_build.policy.rules import Rule

MAX_BYTES = 4 << 20
_WORD = re.compile(r"\s*,?\s*(?P<pattern>[^\s=][^\s]*?)\s*=\s*(?P<type>[A-Za-z0-9_]+)\s*(?=$|[\s,;])[,;]*")
_CLASS = re.compile(r"\\[A-Z]")
_SHOWN = 4


@dataclass(frozen=True)
class TypeList:
    """A user's list, checked. `path` is where it was read."""

    path: Path
    rules: tuple[Rule, ...]


def own_types() -> PolicySpec:
    """The policy for a bare list: other tensors get the base type, Q8_0 unless --set base_type changes it."""
    description = "the types of a list (--tensor-types), and one base type for the rest"
    return PolicySpec("own-types", Path(__file__).with_name("own_types.jinja"), "Q8_0", description=description)


def read_list(path: Path, ggml: Ggml) -> TypeList:
    """Raises TemplateFailed for a file or line that is not a list of rules, TypeUnknown naming every line of unknown
    type.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8")
    except OSError as error:
        hint = f"--tensor-types reads a list; to write the plan's rules: apex plan --write-rules {path.name}"
        raise TemplateFailed(f"{path}: cannot be read: {error.strerror or error}", hint=hint) from None
    except UnicodeDecodeError:
        raise TemplateFailed(
            f"{path}: not a list of types: not text", hint=f"apex inspect {path}  says what it may be"
        ) from None
    if len(raw) > MAX_BYTES:
        raise TemplateFailed(f"{path}: too large for a list of types: expected at most {MAX_BYTES >> 20} MiB")
    rules: list[Rule] = []
    unknown: list[TypeUnknown] = []
    for pattern, name, where in _words(text, path):
        try:
            rules.append(Rule(_checked(pattern, where), writable_type(name, ggml), where, optional=True))
        except TypeUnknown as error:
            unknown.append(TypeUnknown(f"{where}: {error.message}", hint=error.hint))
    if unknown:
        shown = "\n  ".join(error.message for error in unknown[:_SHOWN])
        more = f"\n  and {len(unknown) - _SHOWN} more lines" if len(unknown) > _SHOWN else ""
        raise TypeUnknown(f"{shown}{more}", hint=_of_another(unknown[0].hint))
    if not rules:
        raise TemplateFailed(f"{path}: no rule of the form regex=type")
    return TypeList(path, tuple(rules))


def apply_list(
    found: TypeList, tensors: Sequence[Tensor], places: Mapping[str, Places] | None = None
) -> tuple[dict[str, Rule], list[Rule]]:
    """Tensor name -> the rule that decides for it, and the rules that match no tensor."""
    deciding: dict[str, Rule] = {}
    idle: list[Rule] = []
    if places is None:
        places = find((rule.pattern for rule in found.rules), [tensor.name for tensor in tensors])
    for rule in found.rules:
        if not places[rule.pattern]:
            idle.append(rule)
        for index, _, _ in places[rule.pattern]:
            deciding.setdefault(tensors[index].name, rule)
    return deciding, idle


def _words(text: str, path: Path) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        rest = line.partition("#")[0].strip().rstrip("\\").strip()
        at = 0
        while at < len(rest):
            word = _WORD.match(rest, at)
            if word is None:
                raise TemplateFailed(
                    f"{path}:{number}: {rest[at:]!r:.120} is not of the form regex=type", hint="comments start with #"
                )
            yield word["pattern"], word["type"], f"{path}:{number}"
            at = word.end()


def _checked(pattern: str, where: str) -> str:
    if _CLASS.search(pattern):
        raise TemplateFailed(
            f"{where}: '{pattern}': llama-quantize lower-cases patterns, which turns {_CLASS.findall(pattern)[0]} "
            "around"
        )
    try:
        re.compile(pattern.lower())
    except (re.error, RecursionError, OverflowError) as error:
        raise TemplateFailed(f"{where}: '{pattern}' is not a regular expression: {error}") from None
    return pattern.lower()


def _of_another(hint: str | None) -> str:
    return (
        f"types of other programs, such as ik_llama.cpp's iq4_k, cannot be written by this llama-quantize. {hint or ''}"
    ).strip()
