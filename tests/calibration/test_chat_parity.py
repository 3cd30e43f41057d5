"""Conversations come out as transformers' `apply_chat_template` makes them, on every template of the pinned trees."""

from __future__ import annotations

import chat_parity
import pytest

pytest.importorskip("transformers", reason="the extra test has transformers")


@pytest.mark.network
def test_every_template_of_the_trees_as_transformers_renders_it() -> None:
    compared = [chat_parity.compare(pin, path) for pin, path in chat_parity.templates()]
    unequal = {f"{one.pin}: {one.name}": one.unequal[:2] for one in compared if one.unequal}
    assert not unequal
    assert len(compared) >= 57 and sum(one.rendered > 0 for one in compared) >= 55
    assert sum(one.refused for one in compared) > 100  # and so are the words of what raises
