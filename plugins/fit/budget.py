"""Parse what the user asks for: bytes, bits per weight, and the types that tensors may or must have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from apex_build.plugin_api import Ggml, Model, ParameterUnknown, Tensor, TypeUnknown, parse_bytes

HEAD = "draft_head"


def size_of(text: str) -> int:
    """Parse 12.5GiB, 800MB or 123456 as bytes. Raises ParameterUnknown."""
    n_bytes = parse_bytes(text)
    if not n_bytes:
        raise ParameterUnknown(f"'{text}' is not a size", hint="for example 12.5GiB, 800MB or 12500000000")
    return n_bytes


def shown(n_bytes: float) -> str:
    unit, name = (2**30, "GiB") if n_bytes >= 2**30 else (2**20, "MiB")
    return f"{n_bytes / unit:.3f} {name}"


def bytes_for(bits: float, model: Model) -> int:
    """Size of all tensors together at this average of bits per weight, without the file's header."""
    return int(bits * sum(tensor.n_elements for tensor in model.tensors) / 8)


def pairs_of(text: str, what: str, ggml: Ggml, also: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Parse `A=TYPE,B=TYPE`. Raises ParameterUnknown, TypeUnknown."""
    found = []
    for one in filter(None, (part.strip() for part in text.split(","))):
        name, equals, type_name = one.rpartition("=")
        if not equals or not name:
            raise ParameterUnknown(f"{what} '{one}' is not of the form {what.upper()}=TYPE")
        kind = type_name.strip()
        found.append((name.strip(), kind.lower() if kind.lower() in also else ggml.type_traits(kind).name))
    return found


def types_of(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """The candidate types: those listed, or all but those listed with a minus. Raises TypeUnknown."""
    names = [one.strip().upper() for one in text.split(",") if one.strip()]
    if not names:
        return tuple(known)
    for name in names:
        if name.lstrip("-") not in known:
            raise TypeUnknown(
                f"--types: '{name.lstrip('-')}' is not a candidate; the candidates: {', '.join(known)}",
                hint="--types Q8_0,Q6_K,Q5_K,Q4_K,Q3_K,Q2_K, or --types=-IQ3_XXS,-IQ2_S to leave some out",
            )
    out = {name[1:] for name in names if name.startswith("-")}
    wanted = [name for name in names if not name.startswith("-")] or known
    return tuple(name for name in known if name in wanted and name not in out)


def kept(tensor: Tensor, patterns: Sequence[tuple[re.Pattern[str], str]]) -> str | None:
    """The type given with the first pattern that matches the tensor's name."""
    return next((type_name for pattern, type_name in patterns if pattern.search(tensor.name)), None)


def compiled(pairs: Sequence[tuple[str, str]], model: Model) -> list[tuple[re.Pattern[str], str]]:
    """Raises ParameterUnknown for a pattern that is invalid or matches no tensor."""
    found = []
    for pattern, type_name in pairs:
        try:
            made = re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ParameterUnknown(f"keep: '{pattern}' is not a regular expression: {error}") from None
        if not any(made.search(tensor.name) for tensor in model.tensors):
            raise ParameterUnknown(f"keep: '{pattern}' matches no tensor of {model.path.name}")
        found.append((made, type_name))
    return found


def least_bits(tensor: Tensor, least: Mapping[str, float]) -> float:
    """The minimum bits per weight that --min sets for the tensor's role, or for the draft head it belongs to."""
    return max(least.get(HEAD, 0.0) if tensor.draft_head else 0.0, least.get(tensor.role, 0.0))
