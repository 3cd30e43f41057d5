"""The headers of safetensors files: names, types, shapes. Sizes are checked before anything is read; tensor data is not
touched.

Format: 8 bytes little-endian length, that much JSON (name -> dtype, shape, data_offsets), then the data; offsets count
from there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_build.errors import CheckpointInvalid

MAX_HEADER = 100_000_000  # bytes; the reference implementation's own limit
MAX_INDEX = 64 << 20
_BLOCK = 16 << 20


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    place: tuple[int, int] = (0, 0)  # of its data in the file: the first byte, and the one after the last

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of `model*.safetensors` in the folder: of the files in the index, else of every such file.

    Raises CheckpointInvalid for files that are missing, cut short or damaged, and where index and files disagree.
    """
    index = folder / "model.safetensors.index.json"
    named: Mapping[str, Any] | None = None
    if index.is_file():
        named = read_json(index, MAX_INDEX).get("weight_map")
        if not isinstance(named, dict) or not named or not all(isinstance(value, str) for value in named.values()):
            raise CheckpointInvalid(f"{index} has no weight_map from tensor names to file names")
        files = sorted(set(named.values()))
        for file in files:
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointInvalid(f"{index} names {file!r}; expected a .safetensors file beside it")
    else:
        files = sorted(path.name for path in folder.glob("model*.safetensors"))
    if not files:
        others = sorted(path.name for path in folder.glob("*.bin"))[:1]
        found = f"; {others[0]} is a pickle, which can run code" if others else ""
        raise CheckpointInvalid(
            f"{folder} has no model*.safetensors{found}",
            hint="download the checkpoint's *.safetensors files"
            if not others
            else "save the checkpoint as safetensors, on a machine that trusts it",
        )
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointInvalid(
            f"{folder} lacks {len(missing)} of the {len(files)} files that its index names: {', '.join(missing[:3])}",
            hint="finish the download",
        )
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        tensors.update(_read_header(folder / file))
    if named is not None and (lost := sorted(set(named) - set(tensors))):
        raise CheckpointInvalid(
            f"{index} names tensors that its files lack: {', '.join(lost[:3])}", hint="download the checkpoint again"
        )
    return tensors


def tensor_bytes(folder: Path, tensor: TensorInfo) -> Iterator[bytes]:
    """The data of a tensor, in blocks."""
    at, end = tensor.place
    with (folder / tensor.file).open("rb") as file:
        file.seek(at)
        while at < end:
            block = file.read(min(_BLOCK, end - at))
            if not block:
                raise CheckpointInvalid(
                    f"{folder / tensor.file} was cut short while it was read", hint="download it again"
                )
            at += len(block)
            yield block


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes. Raises CheckpointInvalid."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise CheckpointInvalid(f"{path} is implausibly large: expected at most {limit} bytes, found {size}")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointInvalid(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise CheckpointInvalid(f"{path} is not valid JSON", hint="download it again") from None
    if not isinstance(value, dict):
        raise CheckpointInvalid(f"{path} is not a JSON object")
    return value


def _read_header(path: Path) -> dict[str, TensorInfo]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER or length > size - 8:
            raise CheckpointInvalid(
                f"{path} is not a safetensors file, or cut short: {size} bytes, header of {length}",
                hint="download it again",
            )
        try:
            entries = json.loads(file.read(length))
        except (ValueError, RecursionError):
            entries = None
    if not isinstance(entries, dict):
        raise CheckpointInvalid(f"{path}: the header is not a JSON object", hint="download it again")
    entries.pop("__metadata__", None)
    tensors: dict[str, TensorInfo] = {}
    end = 0
    for name, entry in entries.items():
        if not _is_entry(entry):
            raise CheckpointInvalid(f"{path}: the entry of {name!r} is not valid")
        begin, after = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]), path.name, (begin, after))
        end = max(end, entry["data_offsets"][1])
    if 8 + length + end > size:
        raise CheckpointInvalid(
            f"{path} is cut short: it has {size} bytes of {8 + length + end}", hint="download it again"
        )
    return tensors


def _is_entry(entry: Any) -> bool:
    def numbers(values: Any) -> bool:
        return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)

    return (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and numbers(entry.get("shape"))
        and len(entry["shape"]) <= 8
        and numbers(entry.get("data_offsets"))
        and len(entry["data_offsets"]) == 2
        and entry["data_offsets"][0] <= entry["data_offsets"][1]
    )
