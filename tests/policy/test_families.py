"""In every architecture that a pin loads or converts, the tiers' rules cover all large tensors: see families.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from families import families, model_of, unexplained

from apex_build.plugins import load_plugins
from apex_build.source.fetch import ensure_source
from apex_build.source.pins import load_pin
from apex_build.source.tree import tree_path

_MUCH = 0.01  # what `apex plan` warns of


def tree_of(pin: str) -> Path:
    tree = tree_path(load_pin(pin)) if pin == "latest" else ensure_source(load_pin(pin))
    if not (tree / "src" / "llama-arch.cpp").is_file():
        pytest.skip("the newest pin's source has not been fetched: apex source fetch --pin latest")
    return tree


@pytest.mark.slow
@pytest.mark.parametrize("pin", ["pr-22673", "latest"])
def test_tiers_name_what_every_architecture_is_made_of(pin: str) -> None:
    """By bytes, for tiers with many bits and with few."""
    tree = tree_of(pin)
    found = families(tree)
    text = (tree / "src" / "llama-arch.cpp").read_text()
    listed = set(re.findall(r'"([^"(]+)"', text[text.index("LLM_ARCH_NAMES = {") :].partition("};")[0]))
    assert len(listed) > 120 and listed <= found.keys(), "all are read from the sources"
    for arch, tensors in found.items():
        model = model_of(arch, tensors)
        for policy in ("i-quality", "i-nano"):
            share, names = unexplained(model, load_plugins().policy(policy))
            assert share <= _MUCH, (arch, policy, share, names)


def test_shapes_are_the_loaders() -> None:
    """The catalogue of the family that this project is about, compared with its known shapes."""
    shapes = {tensor.name: tensor.shape for tensor in families(tree_of("pr-22673"))["qwen35moe"]}
    assert shapes["blk.0.ffn_down_exps.weight"] == (768, 2048, 64)
    assert shapes["blk.2.nextn.eh_proj.weight"] == (4096, 2048)
    assert shapes["token_embd.weight"] == (2048, 131072)
    assert "blk.0.nextn.eh_proj.weight" not in shapes
