"""Parameters of policies and evaluators: what `--set name=value` may say, checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from apex_build.errors import ParameterUnknown, TypeUnknown
from apex_build.near import near, nearby

if TYPE_CHECKING:
    from apex_build.hookspecs import PolicySpec
    from apex_build.native.ggml import Ggml

Value = str | int | float | bool

# Every policy has it: `--set base_type=Q3_K_M`
BASE_TYPE = "base_type"
# The value of a parameter that is to be measured on the user's model (Parameter.measured).
AUTO = "auto"

_YES = {"yes": True, "true": True, "on": True, "1": True, "no": False, "false": False, "off": False, "0": False}


@dataclass(frozen=True)
class Parameter:
    """What a user may set with `--set name=value`. A template sees it as a variable, with `_` for each dot of its name.

    kind 'type' takes a GGUF tensor type (Q4_K), 'int' a whole number >= 0, 'number' a decimal one >= 0, 'flag' yes
    or no, 'text' anything, 'file' the path of a file that is there (of which a quantized file records the name).
    `words` are further values of a 'type' parameter, to which the template gives its own meaning; with `mixtures`
    it also takes two types, A+B. One that has `measured` takes the word 'auto': the smallest of these values whose
    loss, measured on the user's model against the first of them, is under a bound, the value of the parameter that
    `bound` names (without one 0.5 points). They stand in the order in which they are tried: the largest first.
    """

    default: str | int | float | bool
    kind: Literal["type", "int", "number", "flag", "text", "file"] = "type"
    help: str = ""
    words: tuple[str, ...] = ()
    mixtures: bool = False
    measured: tuple[str, ...] = ()
    bound: str = ""


def resolve(policy: PolicySpec, given: Mapping[str, Value], ggml: Ggml) -> dict[str, Value]:
    """All parameters of the policy with their values, `base_type` among them.

    Raises ParameterUnknown, listing what there is, and TypeUnknown.
    """
    known = {
        **policy.parameters,
        BASE_TYPE: Parameter(policy.base_type, "text", "llama-quantize's type for what no rule names"),
    }
    values = values_of(f"policy '{policy.name}'", known, given, ggml, hint=f"apex policies {policy.name}")
    values[BASE_TYPE] = re.sub(
        r"\{([\w.]+)\}", lambda found: str(values.get(found[1], found[0])), str(values[BASE_TYPE])
    ).upper()
    return values


def values_of(
    owner: str, known: Mapping[str, Parameter], given: Mapping[str, Value], ggml: Ggml, *, hint: str | None = None
) -> dict[str, Value]:
    """A value for each known parameter, given or default. `owner` is for messages: "policy 'i-nano'"."""
    for name in given:
        if name not in known:
            raise ParameterUnknown(
                f"{owner} has no parameter '{name}'{nearby(name, known)}. It has: {', '.join(sorted(known)) or 'none'}",
                hint=hint,
            )
    return {
        name: _value(f"parameter '{name}' of {owner}", parameter, given.get(name, parameter.default), ggml)
        for name, parameter in known.items()
    }


def parse_settings(settings: Iterable[str]) -> dict[str, str]:
    """`name=value` texts of the command line. A name given twice takes its last value."""
    values = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise ParameterUnknown(
                f"'{setting}' is not of the form name=value", hint="for example: --set draft_head=Q4_K"
            )
        values[name.strip()] = value.strip()
    return values


def _value(about: str, parameter: Parameter, value: Value, ggml: Ggml) -> Value:
    text = str(value).strip()
    if parameter.kind == "int":
        if not re.fullmatch(r"[0-9]{1,6}", text):
            raise ParameterUnknown(f"{about} takes a whole number from 0, not '{value}'")
        return int(text)
    if parameter.kind == "number":
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text):
            raise ParameterUnknown(f"{about} takes a number from 0, such as 0.8, not '{value}'")
        return float(text)
    if parameter.kind == "file":
        if text and not Path(text).is_file():
            raise ParameterUnknown(f"{about}: {text}: no such file")
        return text
    if parameter.kind == "flag":
        if text.lower() not in _YES:
            raise ParameterUnknown(f"{about} takes yes or no, not '{value}'")
        return _YES[text.lower()]
    if parameter.kind == "type":
        words = (*parameter.words, *((AUTO,) if parameter.measured else ()))
        if text.lower() in words:
            return text.lower()
        try:
            if parameter.mixtures and text.count("+") == 1:
                return "+".join(writable_type(part.strip(), ggml) for part in text.split("+"))
            return writable_type(text, ggml)
        except TypeUnknown as error:
            also = f" (or: {', '.join(words)}{', or two types, A+B' if parameter.mixtures else ''})" if words else ""
            close = near(text, words, n=1, cutoff=0.7)
            raise TypeUnknown(
                f"{about}: {error.message}{also}", hint=f"near it: {close[0]}" if close else error.hint
            ) from None
    return text


def writable_type(name: str, ggml: Ggml) -> str:
    """The name in upper case of a tensor type that llama-quantize can write. Raises TypeUnknown with names that are
    near.
    """
    traits = ggml.type_traits(name)
    # Q8_1 and Q8_K hold intermediate results of matrix products: ggml_quantize_chunk has no case for them, nor for
    # integers and F64
    if traits.name in ("Q8_1", "Q8_K") or (not traits.quantized and traits.name not in ("F32", "F16", "BF16")):
        raise TypeUnknown(
            f"llama-quantize cannot write tensors of type {traits.name}",
            hint="types it can: Q8_0, Q6_K, Q4_K, IQ2_XXS, F16, ...",
        )
    return traits.name
