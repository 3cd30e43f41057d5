"""The measurement of a model as a file: errors of types, scores of probes, sensitivities. The JSON has the form of a
manifest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from apex_build.plugin_api import API_VERSION, MeasurementUnfit, Model, fingerprint, read_json, sha256_json, write_json

from .errors import TypeLoss

SCHEMA = 1
KIND = "fit-measurement"
_AGAIN = "apex fit MODEL --measurement NEW measures again into another file, and reuses what it measured on this model"


@dataclass(frozen=True)
class Sensitivity:
    """How sensitive the model is to a tensor: a type with relative error e costs `value` times e to the power of
    `exponent`. `low` and `high` bound the 95 % interval of `value`; `group`: the tensors measured together. `measured`:
    the cost of types that were probed themselves, to be used instead.
    """

    value: float
    low: float | None
    high: float | None
    exponent: float
    group: str
    measured: Mapping[str, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Anchor:
    """A whole file, measured: the sum of its tensors' losses, and the divergence of the probe."""

    total: float
    measured: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Score:
    """A probe: its tensors and their types (in words), and its divergence."""

    name: str
    value: float
    low: float | None
    high: float | None
    positions: int


@dataclass(frozen=True)
class HeadPart:
    """A part of the draft head: points of agreement that it costs per unit of error."""

    tensors: tuple[str, ...]
    points: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Measurement:
    """`parts`: digests of its inputs; `errors`: tensor -> type -> relative error."""

    model: str  # the file's name
    shapes: str
    parts: Mapping[str, Any] = field(hash=False)
    errors: Mapping[str, Mapping[str, TypeLoss]] = field(hash=False)
    sensitivities: Mapping[str, Sensitivity] = field(hash=False)
    anchors: tuple[Anchor, ...] = ()
    scores: tuple[Score, ...] = ()
    head: tuple[HeadPart, ...] = ()
    file: Path | None = None

    @property
    def identity(self) -> str:
        return sha256_json(self.parts)

    def loss(self, tensor: str, type_name: str) -> float:
        """The divergence that this type costs on this tensor alone; 0 if the tensor is copied or in the draft head."""
        of = self.errors.get(tensor, {}).get(type_name)
        sensitivity = self.sensitivities.get(tensor)
        if of is None or sensitivity is None:
            return 0.0
        if type_name in sensitivity.measured:
            return sensitivity.measured[type_name]
        return float(sensitivity.value * max(0.0, of.error) ** sensitivity.exponent)

    def divergence(self, total: float) -> float:
        """The divergence of a file whose losses add up to `total`: interpolated between the anchors, in logarithms."""
        known = sorted((one.total, one.measured) for one in self.anchors if one.total > 0 and one.measured > 0)
        if not known or total <= 0:
            return total
        if total <= known[0][0]:
            return total * known[0][1] / known[0][0]
        if total >= known[-1][0]:
            return total * known[-1][1] / known[-1][0]
        for (x0, y0), (x1, y1) in itertools.pairwise(known):
            if x0 <= total <= x1:
                share = math.log(total / x0) / math.log(x1 / x0) if x1 > x0 else 0.0
                return math.exp(math.log(y0) + share * (math.log(y1) - math.log(y0)))
        return total


def shapes_of(model: Model) -> str:
    """A digest that models with the same tensor names and shapes share, such as fine-tunes of one model."""
    return sha256_json([[tensor.name, list(tensor.shape)] for tensor in model.tensors])


def write(found: Measurement, path: Path) -> None:
    write_json(
        path,
        {
            "schema": SCHEMA,
            "kind": KIND,
            "identity": found.identity,
            "from": dict(found.parts),
            "plugin_api": API_VERSION,
            "model": found.model,
            "shapes": found.shapes,
            "tensors": {
                name: {
                    "errors": {kind: [one.error, one.deviation] for kind, one in types.items()},
                    "sensitivity": asdict(found.sensitivities[name]) if name in found.sensitivities else None,
                }
                for name, types in found.errors.items()
            },
            "anchors": [asdict(one) for one in found.anchors],
            "probes": [asdict(one) for one in found.scores],
            "draft_head": [{**asdict(one), "tensors": list(one.tensors)} for one in found.head],
        },
    )


def read(path: Path) -> Measurement:
    """Read a measurement, ignoring keys added by later versions. Raises MeasurementUnfit if the file is something else
    or is cut short.
    """
    try:
        value = read_json(path)
    except OSError as error:
        raise MeasurementUnfit(f"{path}: cannot be read: {error.strerror or error}", hint=_AGAIN) from None
    except ValueError as error:
        raise MeasurementUnfit(f"{path}: cut short or damaged: {error}", hint=_AGAIN) from None
    if not isinstance(value, dict) or value.get("kind") != KIND:
        raise MeasurementUnfit(
            f"{path}: not a measurement of apex fit", hint="apex fit MODEL --imatrix FILE writes one"
        )
    if not isinstance(value.get("schema"), int) or value["schema"] > SCHEMA:
        raise MeasurementUnfit(
            f"{path}: unsupported schema: expected {SCHEMA} or lower, found {value.get('schema')}",
            hint="upgrade apex-build",
        )
    try:
        return _parsed(value, path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MeasurementUnfit(f"{path}: damaged: {type(error).__name__}: {error}", hint=_AGAIN) from None


def check(found: Measurement, model: Model, build: str) -> list[str]:
    """Warn about a measurement of another model with the same shapes. Raises MeasurementUnfit if the shapes or the
    tools differ.
    """
    where = found.file or "the measurement"
    if build and found.parts.get("tools") != build:
        raise MeasurementUnfit(
            f"{where} was made with another build of the tools, whose quantizers may make different errors: expected "
            f"{build[:12]}, found {str(found.parts.get('tools'))[:12]}",
            hint="apex fit MODEL --measurement NEW measures again; or --tools FOLDER, the build of that file",
        )
    if found.shapes != shapes_of(model):
        raise MeasurementUnfit(
            f"{where} belongs to another model, {found.model}: its tensors differ from those of {model.path}",
            hint=_AGAIN,
        )
    if found.parts.get("model") != fingerprint(model):
        return [f"{where} was measured on another model with the same tensor shapes, {found.model}"]
    return []


def differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What two measurements of a model by one build differ in, given their inputs: the options, in words."""
    said = []
    for name, option in (("chunks", "--chunks"), ("budget", "--probe-budget")):
        if found.get(name) != wanted.get(name):
            said.append(f"{option} {found.get(name)}, not {wanted.get(name)}")
    same_data = found.get("imatrix") == wanted.get("imatrix")  # without it types and errors differ by themselves
    for name, option in (("imatrix", "--imatrix"), ("texts", "--text"), ("types", "--types")):
        if found.get(name) != wanted.get(name) and (same_data or name != "types"):
            said.append(f"another {option}")
    if found.get("head") != wanted.get("head"):
        said.append("with --head-score" if found.get("head") else "with --no-head-score")
    if any(found.get(name) != wanted.get(name) for name in ("context", "probing")):
        said.append("another version of apex fit")
    elif same_data and found.get("errors") != wanted.get("errors"):
        said.append("another --sample")
    return said or ["other inputs"]


def _parsed(value: Mapping[str, Any], path: Path) -> Measurement:
    errors = {
        name: {kind: TypeLoss(_number(pair[0]), _number(pair[1])) for kind, pair in one["errors"].items()}
        for name, one in value["tensors"].items()
    }
    sensitivities = {
        name: Sensitivity(
            _number(one["value"]),
            one.get("low"),
            one.get("high"),
            _number(one["exponent"]),
            str(one.get("group", "")),
            {kind: _number(cost) for kind, cost in one.get("measured", {}).items()},
        )
        for name, tensor in value["tensors"].items()
        if (one := tensor.get("sensitivity")) is not None
    }
    anchors = tuple(
        Anchor(_number(one["total"]), _number(one["measured"]), one.get("low"), one.get("high"))
        for one in value.get("anchors", ())
    )
    scores = tuple(
        Score(str(one["name"]), _number(one["value"]), one.get("low"), one.get("high"), int(one.get("positions", 0)))
        for one in value.get("probes", ())
    )
    head = tuple(
        HeadPart(tuple(map(str, one["tensors"])), _number(one["points"]), one.get("low"), one.get("high"))
        for one in value.get("draft_head", ())
    )
    if not isinstance(value["from"], dict):
        raise ValueError("'from' is not an object")
    return Measurement(
        str(value["model"]), str(value["shapes"]), value["from"], errors, sensitivities, anchors, scores, head, path
    )


def _number(value: Any) -> float:
    found = float(value)
    if not math.isfinite(found):
        raise ValueError(f"{value!r} is not a finite number")
    return found
