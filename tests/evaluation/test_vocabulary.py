"""A reference must have the same vocabulary as the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_edit import copy

from apex_build.errors import VocabularyMismatch
from apex_build.evaluation.vocabulary import check_same_vocabulary
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.model import read_model
from apex_build.plugins import load_plugins

TOKENS = "tokenizer.ggml.tokens"


def edited(testbed: Path, out: Path, tokens: Any) -> Model:
    return read_model(copy(testbed, out, keys={TOKENS: tokens}), load_plugins().role_of)


def test_the_same_tokens_pass_in_any_file(testbed: Path, tmp_path: Path) -> None:
    model = read_model(testbed, load_plugins().role_of)
    check_same_vocabulary(model, model)
    other = read_model(
        copy(testbed, tmp_path / "other.gguf", keys={"qwen35moe.context_length": 2048}), load_plugins().role_of
    )
    check_same_vocabulary(model, other)


def test_other_tokens_are_refused(testbed: Path, tmp_path: Path) -> None:
    model = read_model(testbed, load_plugins().role_of)
    tokens = gguf.GGUFReader(testbed).fields[TOKENS].contents()
    changed = [*tokens[:700], "\x1b[2Jfoo", *tokens[701:]]
    for other, said in (
        (edited(testbed, tmp_path / "longer.gguf", [*tokens, "more"]), "of 2049 tokens; expected 2048"),
        (edited(testbed, tmp_path / "short.gguf", tokens[:40]), "of 40 tokens; expected 2048"),
        (
            edited(testbed, tmp_path / "changed.gguf", changed),
            f"its token 700 is '\\x1b[2Jfoo', expected {tokens[700]!r}",
        ),
        (edited(testbed, tmp_path / "none.gguf", None), "no vocabulary (tokenizer.ggml.tokens) to compare"),
    ):
        with pytest.raises(VocabularyMismatch) as caught:
            check_same_vocabulary(model, other)
        assert said in caught.value.message and str(other.path) in caught.value.message and caught.value.hint
        assert "no vocabulary" in said or str(testbed) in caught.value.message
        with pytest.raises(VocabularyMismatch):
            check_same_vocabulary(other, model)


def test_short_vocabularies_are_compared_too(testbed: Path, tmp_path: Path) -> None:
    """Arrays up to 1,024 elements are read with the header, longer ones stay in the file."""
    one, same, other = (edited(testbed, tmp_path / f"{name}.gguf", list(name)) for name in ("abc", "ab" + "c", "abd"))
    check_same_vocabulary(one, same)
    with pytest.raises(VocabularyMismatch, match="its token 2 is 'd', expected 'c'"):
        check_same_vocabulary(one, other)
