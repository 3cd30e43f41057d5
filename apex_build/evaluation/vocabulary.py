"""Whether two models share a vocabulary: if not, they cannot be compared token by token."""

from __future__ import annotations

from typing import Any

from apex_build.errors import VocabularyMismatch
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.header import ArrayValue
from apex_build.gguf_model.open_file import open_file

_TOKENS = "tokenizer.ggml.tokens"
_HINT = "give the file that this one was quantized from, or another of the same checkpoint"


def check_same_vocabulary(model: Model, reference: Model) -> None:
    """Raises VocabularyMismatch, naming both files and their sizes or the first token that differs."""
    given, expected = (_tokens(one) for one in (model, reference))
    both = f"{reference.path} cannot be the reference of {model.path}: another vocabulary"
    if len(given) != len(expected):
        raise VocabularyMismatch(f"{both}, of {len(expected)} tokens; expected {len(given)}", hint=_HINT)
    if _raw(given) == _raw(expected):
        return
    pairs = enumerate(zip(_read(given), _read(expected), strict=True))
    different = next(((number, one, other) for number, (one, other) in pairs if one != other), None)
    if different is not None:
        number, one, other = different
        raise VocabularyMismatch(f"{both}; its token {number} is {other!r:.60}, expected {one!r:.60}", hint=_HINT)


def _tokens(model: Model) -> ArrayValue | tuple[Any, ...]:
    tokens = model.metadata.get(_TOKENS)
    if not isinstance(tokens, (ArrayValue, tuple)) or not len(tokens):
        raise VocabularyMismatch(
            f"{model.path}: the model has no vocabulary ({_TOKENS}) to compare", hint=f"apex inspect {model.path}"
        )
    return tokens


def _raw(tokens: ArrayValue | tuple[Any, ...]) -> object:
    """Something to compare at once: the 248,320 strings of a large vocabulary take a second to read one by one."""
    if isinstance(tokens, tuple):
        return tokens
    with open_file(tokens.path) as file:
        file.seek(tokens.offset)
        return file.read(tokens.n_bytes)


def _read(tokens: ArrayValue | tuple[Any, ...]) -> tuple[Any, ...]:
    return tokens if isinstance(tokens, tuple) else tokens.read()
