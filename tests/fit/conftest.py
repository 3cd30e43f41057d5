"""A hand-made measurement of the testbed: errors fall by a factor of four per bit, and the output is sensitive."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.fingerprint import fingerprint
from apex_build.gguf_model.model import read_model
from apex_build.native.ggml import Ggml
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins
from apex_build.policy.dry_run import quantizable_tensors

sys.path.insert(0, str(Path(__file__).parents[2] / "plugins"))
measurement: Any = importlib.import_module("fit.measurement")
errors: Any = importlib.import_module("fit.errors")

NEEDLESS = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")  # types that need no data
TRUNK = ("IQ2_XXS", "IQ2_S", "IQ3_XXS", *NEEDLESS)


@pytest.fixture(scope="session")
def model(testbed: Path) -> Model:
    return read_model(testbed, load_plugins().role_of)


@pytest.fixture(scope="session")
def by_hand(model: Model, tools: Toolset) -> Any:
    ggml = Ggml(tools)
    names = quantizable_tensors(model, tools)
    tensors = [tensor for tensor in model.tensors if tensor.name in names]

    def error(kind: str) -> Any:
        return errors.TypeLoss(4 ** -ggml.type_traits(kind).bits_per_weight, 0.0)

    known = {
        tensor.name: {kind: error(kind) for kind in (TRUNK if tensor.role not in ("embedding", "output") else NEEDLESS)}
        for tensor in tensors
    }
    weights = {
        tensor.name: measurement.Sensitivity(20.0 if tensor.role == "output" else 0.1, 0.05, 0.2, 1.0, tensor.role)
        for tensor in tensors
        if not tensor.draft_head
    }
    heads = tuple(tensor.name for tensor in tensors if tensor.draft_head)
    return measurement.Measurement(
        model.path.name,
        measurement.shapes_of(model),
        {"model": fingerprint(model), "tools": tools.identity},
        known,
        weights,
        (measurement.Anchor(0.01, 0.02), measurement.Anchor(0.1, 0.15)),
        (),
        (measurement.HeadPart(heads, 150.0, None, None),),
    )


@pytest.fixture
def measured(by_hand: Any, tmp_path: Path) -> Path:
    path = tmp_path / "testbed.measurement.json"
    measurement.write(by_hand, path)
    return path


@pytest.fixture
def other(by_hand: Any, tmp_path: Path) -> Any:
    """other(model="...", tools="..."): a measurement with other inputs."""

    def make(**parts: Any) -> Path:
        path = tmp_path / "other.measurement.json"
        shapes = parts.pop("shapes", by_hand.shapes)
        measurement.write(
            replace(by_hand, parts={**by_hand.parts, **parts}, shapes=shapes, model="another-F16.gguf"), path
        )
        return path

    return make
