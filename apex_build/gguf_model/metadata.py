"""Metadata that a person may set on a model: `general.*` keys, as the readers of gguf-py and llama.cpp know them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gguf.constants import Keys

from apex_build.errors import ParameterUnknown
from apex_build.near import near_hint

QUANTIZED_BY = "APEX_QUANTIZED_BY"  # variable of the environment: who quantizes here
_TEXT, _COUNT, _NUMBER, _LIST = "STRING", "UINT32", "FLOAT32", "ARRAY"
_OURS = (
    "type",
    "architecture",
    "quantization_version",
    "alignment",
    "file_type",
)  # of general.*: facts about the file, not free to set
_WHOLE = ("sampling.top_k", "sampling.penalty_last_n", "sampling.mirostat")
_LISTS = ("tags", "languages")
_COUNTS = ("base_model.count", "dataset.count")
_KEPT = re.compile(r"(general|tokenizer|split|quantize|apex|imatrix|gguf|adapter|clip|mmproj)\.")
_OWN = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+")


@dataclass(frozen=True)
class Setting:
    """A key with its value; `kind` names the GGUF type (ARRAY: of texts)."""

    key: str
    kind: str
    value: str | int | float | tuple[str, ...]


def parse_meta(given: Iterable[str]) -> tuple[Setting, ...]:
    """`key=value` texts. `name` stands for `general.name`, and so on; base_model=ORG/NAME sets count, organization
    and name.

    A key given twice takes the last value. Raises ParameterUnknown for other forms, for keys of `general.` that no
    reader knows or that state facts about the file, and for values of the wrong type.
    """
    found: dict[str, Setting] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ParameterUnknown(f"--meta {text}: expected KEY=VALUE", hint="--meta license=apache-2.0")
        if name in ("base_model", "general.base_model"):
            found |= {one.key: one for one in _base_model(value)}
            continue
        one = _setting(name, value)
        found[one.key] = one
    return tuple(found.values())


def who_quantizes(settings: Iterable[Setting], environment: Mapping[str, str] = os.environ) -> tuple[Setting, ...]:
    """The settings, with general.quantized_by from the environment if they lack it. No name is guessed."""
    settings = tuple(settings)
    name = environment.get(QUANTIZED_BY, "").strip()
    if not name or any(one.key == Keys.General.QUANTIZED_BY for one in settings):
        return settings
    return (*settings, _setting("quantized_by", name))


def known_keys() -> dict[str, str]:
    """Keys of `general.` that may be set -> their kind; `{id}` stands for a number."""
    names = [value.removeprefix("general.") for name, value in vars(Keys.General).items() if name.isupper()]
    return {f"general.{name}": _kind(name) for name in names if name not in _OURS}


def _kind(name: str) -> str:
    if name in _LISTS:
        return _LIST
    if name in (*_WHOLE, *_COUNTS):
        return _COUNT
    return _NUMBER if name.startswith("sampling.") and not name.endswith("sequence") else _TEXT


def _setting(name: str, value: str) -> Setting:
    known = known_keys()
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{id}", name)
    key = next((full for full in (name, f"general.{name}") if re.sub(r"(?<=\.)\d+(?=\.)", "{id}", full) in known), None)
    if key is None:
        if name.removeprefix("general.") in _OURS:
            raise ParameterUnknown(f"--meta {name}: this key states a fact about the file, and cannot be set")
        if _OWN.fullmatch(name) and not _KEPT.match(name) and not _of_an_architecture(name):
            return Setting(name, _TEXT, value)
        otherwise = "name, license, author, ...; or a key in your own name space: my.key"
        words = [one.removeprefix("general.") for one in known]
        raise ParameterUnknown(
            f"--meta {name}: no reader of GGUF files knows this key",
            hint=near_hint(pattern.removeprefix("general."), words, otherwise),
        )
    kind = known[re.sub(r"(?<=\.)\d+(?=\.)", "{id}", key)]
    return Setting(key, kind, _value(key, kind, value))


def _of_an_architecture(name: str) -> bool:
    """Keys such as qwen35moe.block_count decide how the file is read."""
    patterns = {
        value
        for part in vars(Keys).values()
        if isinstance(part, type)
        for value in vars(part).values()
        if isinstance(value, str)
    }
    return "{arch}." + name.partition(".")[2] in patterns


def _value(key: str, kind: str, value: str) -> Any:
    if not value or not value.isprintable():
        raise ParameterUnknown(f"--meta {key}={value!r}: expected printable text on one line")
    if kind == _LIST:
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if kind == _TEXT:
        return value
    try:
        number = float(value) if kind == _NUMBER else int(value)
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 31:
        raise ParameterUnknown(f"--meta {key}={value}: expected a number")
    return number


def _base_model(value: str) -> tuple[Setting, ...]:
    organization, slash, name = value.strip().rpartition("/")
    if not name:
        raise ParameterUnknown(f"--meta base_model={value}: expected ORGANIZATION/NAME or a name")
    words = [("general.base_model.count", _COUNT, 1), ("general.base_model.0.name", _TEXT, name.replace("-", " "))]
    if slash:
        words.append(("general.base_model.0.organization", _TEXT, organization))
    return tuple(Setting(key, kind, _value(key, kind, str(value))) for key, kind, value in words)
