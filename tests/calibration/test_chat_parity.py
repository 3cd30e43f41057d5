"""Conversations are rendered like transformers' `apply_chat_template` does, with every template of the pinned trees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import chat_parity
import pytest

from apex_build.calibration.chat import chat_template, try_render
from apex_build.gguf_model.model import read_model
from apex_build.plugins import load_plugins

pytest.importorskip("transformers", reason="the extra test has transformers")


@pytest.mark.network
def test_every_template_of_the_trees_as_transformers_renders_it() -> None:
    compared = [chat_parity.compare(pin, path) for pin, path in chat_parity.templates()]
    unequal = {f"{one.pin}: {one.name}": one.unequal[:2] for one in compared if one.unequal}
    assert not unequal
    assert len(compared) >= 57 and sum(one.rendered > 0 for one in compared) >= 55
    assert sum(one.refused for one in compared) > 100  # and so are the words of what raises


def test_a_template_of_its_own_for_tools(testbed: Path) -> None:
    """Like transformers chooses among the templates of a tokenizer."""
    from transformers import PreTrainedTokenizerFast

    plain, tools = "{{ messages[0].content }}", "{{ tools | length }} {{ messages[0].content }}"
    model = read_model(testbed, load_plugins().role_of)
    named = {"tokenizer.chat_template": plain, "tokenizer.chat_template.tool_use": tools}
    documents = [case.document for case in chat_parity.cases()[:12]]
    found = try_render(chat_template(replace(model, metadata={**model.metadata, **named})), documents)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=chat_parity.tokenizer())
    tokenizer.chat_template = {"default": plain, "tool_use": tools}
    expected = [
        tokenizer.apply_chat_template(list(one.messages), list(one.tools) or None, tokenize=False) for one in documents
    ]
    assert [one.text for one in found] == expected and len({bool(one.tools) for one in documents}) == 2
