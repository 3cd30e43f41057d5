"""The files of calibration sets: TOML with parts, each from a source."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_build.errors import CalibrationSetInvalid
from apex_build.hookspecs import Source
from apex_build.near import nearby, no_such
from apex_build.places import data_root

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PART_KEYS = {"domain", "source", "bytes", "weight", "origin", "licence"}
_SET_KEYS = ("part", "name", "about", "tokens", "seed", "near_duplicates", "heldout")


@dataclass(frozen=True)
class Part:
    """One part of a set. `max_bytes`: of its rendered text, None for all there is; `weight`: its share of the set's
    tokens, beside the other parts' weights. `options` go to the source as they are. `origin` and `licence` are for
    people, and for manifests.
    """

    domain: str
    source: str
    max_bytes: int | None
    options: Mapping[str, Any]
    weight: float | None = None
    origin: str = ""
    licence: str = ""


@dataclass(frozen=True)
class CalibrationSet:
    """`tokens`: of all parts, by the model's own tokenizer; None: as many as the weights allow. `seed`: documents are
    drawn in an order that it decides, without one in their own. `near_duplicates`: documents whose words are the same
    to that share count as one. `heldout`: the share of the documents that is kept apart.
    """

    name: str
    path: Path
    parts: tuple[Part, ...]
    about: str = ""
    tokens: int | None = None
    seed: int | None = None
    near_duplicates: float | None = None
    heldout: float = 0.0

    @property
    def weighted(self) -> bool:
        return self.parts[0].weight is not None


def known_sets(folder: str = "calibration_sets") -> list[str]:
    return sorted(path.stem for path in (data_root() / folder).glob("*.toml"))


def load_set(name: str, folder: str = "calibration_sets") -> CalibrationSet:
    """A built-in set by name, or the set of a TOML file. Raises CalibrationSetInvalid."""
    path = Path(name) if name.endswith(".toml") else data_root() / folder / f"{name}.toml"
    if not path.is_file():
        known = known_sets(folder)
        raise CalibrationSetInvalid(
            f"{path}: no such file" if name.endswith(".toml") else no_such("calibration set", name, known),
            hint="apex calibrate --calibration-set FILE.toml, or --text FILE",
        )
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CalibrationSetInvalid(f"{path}: not TOML: {error}") from None
    except OSError as error:
        raise CalibrationSetInvalid(f"{path}: cannot be read: {error.strerror}") from None
    for key in given:
        if key not in _SET_KEYS:
            raise CalibrationSetInvalid(
                f"{path}: a set has no key '{key}'{nearby(key, _SET_KEYS)}. It takes: {', '.join(_SET_KEYS)}"
            )
    parts = given.get("part")
    if not isinstance(parts, list) or not parts:
        raise CalibrationSetInvalid(f"{path}: expected at least one [[part]]")
    made = tuple(_part(path, number, part) for number, part in enumerate(parts, 1))
    _check_weights(path, made, given)
    return CalibrationSet(
        path.stem,
        path,
        made,
        str(given.get("about", "")).strip(),
        _whole(path, given, "tokens", 1),
        _whole(path, given, "seed", 0),
        _share(path, given, "near_duplicates"),
        _share(path, given, "heldout") or 0.0,
    )


def check_part(chosen: CalibrationSet, part: Part, sources: Mapping[str, Source]) -> Source:
    """The part's source. Raises CalibrationSetInvalid for one that is not there, and for a key that neither a part nor
    its source has: a misspelt limit would be none.
    """
    if part.source not in sources:
        raise CalibrationSetInvalid(f"{chosen.path}, domain {part.domain}: {no_such('source', part.source, sources)}")
    source = sources[part.source]
    for name in part.options if source.options is not None else ():
        if name not in (known := source.options or ()):
            number = next(number for number, one in enumerate(chosen.parts, 1) if one is part)
            raise CalibrationSetInvalid(
                f"{chosen.path}: part {number} has no key '{name}'{nearby(name, (*PART_KEYS, *known))}. "
                f"The source '{source.name}' takes: {', '.join(known)}; any part: {', '.join(sorted(PART_KEYS))}"
            )
    return source


def _part(path: Path, number: int, given: Any) -> Part:
    if not isinstance(given, dict):
        raise CalibrationSetInvalid(f"{path}: part {number} is {given!r}, expected a table: [[part]]")
    for key in ("domain", "source"):
        if not isinstance(given.get(key), str) or not given[key]:
            raise CalibrationSetInvalid(f"{path}: part {number}: '{key}' is {given.get(key)!r}, expected a text")
    limit, weight = given.get("bytes"), given.get("weight")
    if limit is not None and (type(limit) is not int or limit <= 0):
        raise CalibrationSetInvalid(f"{path}: part {number}: 'bytes' is {limit!r}, expected a whole number above 0")
    if weight is not None and (type(weight) not in (int, float) or not 0 < weight < math.inf):
        raise CalibrationSetInvalid(
            f"{path}: part {number}: 'weight' is {weight!r}, expected a number above 0", hint="leave the part out"
        )
    if weight is not None and limit is not None:
        raise CalibrationSetInvalid(f"{path}: part {number} has 'bytes' and 'weight', expected one of them")
    options = {key: value for key, value in given.items() if key not in PART_KEYS}
    texts = {key: str(given.get(key, "")) for key in ("origin", "licence")}
    return Part(given["domain"], given["source"], limit, options, weight, **texts)


def _check_weights(path: Path, parts: tuple[Part, ...], given: Mapping[str, Any]) -> None:
    without = [number for number, part in enumerate(parts, 1) if part.weight is None]
    if without and len(without) < len(parts):
        raise CalibrationSetInvalid(f"{path}: part {without[0]} has no 'weight', and others have: expected all or none")
    if without and "tokens" in given:
        raise CalibrationSetInvalid(f"{path}: 'tokens' is given, and no part has a 'weight': expected one in each")


def _whole(path: Path, given: Mapping[str, Any], key: str, least: int) -> int | None:
    value = given.get(key)
    if value is not None and (type(value) is not int or value < least):
        raise CalibrationSetInvalid(f"{path}: '{key}' is {value!r}, expected a whole number from {least}")
    return value


def _share(path: Path, given: Mapping[str, Any], key: str) -> float | None:
    value = given.get(key)
    if value is not None and (type(value) not in (int, float) or not 0 < value < 1):
        raise CalibrationSetInvalid(f"{path}: '{key}' is {value!r}, expected a number between 0 and 1")
    return value
