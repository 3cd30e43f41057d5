"""Split a finished file into shards with llama-gguf-split: all of them in place, or the whole file as it was."""

from __future__ import annotations

import mmap
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apex_build.errors import OutputUnwritable, ParameterUnknown, VerificationFailed
from apex_build.gguf_model.header import ArrayValue, Header, read_header
from apex_build.native.run import run_tool, unwinding_signals
from apex_build.native.toolset import Toolset
from apex_build.progress import Report, Step, silent
from apex_build.storage.artifacts import Artifact
from apex_build.storage.digests import sha256_file
from apex_build.storage.json_files import write_json
from apex_build.storage.manifest import Manifest, details_of, read_manifest
from apex_build.storage.outputs import MANIFEST, beside, locked_output, put

_SIZE = re.compile(r"([1-9]\d{0,5})([MG])")
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
_BLOCK = 64 << 20


@dataclass(frozen=True)
class Shard:
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitRecord:
    """Additional manifest fields of a file that was split."""

    split_size: str
    shards: tuple[Shard, ...]


def parse_size(text: str) -> int:
    """Bytes of 500M or 40G, in powers of 1000 as llama-gguf-split counts. Raises ParameterUnknown."""
    found = _SIZE.fullmatch(text.strip().upper())
    if found is None:
        raise ParameterUnknown(f"--split-size {text}: expected a number of M or G", hint="--split-size 40G")
    return int(found[1]) * {"M": 10**6, "G": 10**9}[found[2]]


def shards_of(out: Path) -> list[Path]:
    """Existing shards of `out`, for any count."""
    pattern = re.compile(re.escape(out.stem) + r"-\d{5}-of-\d{5}\.gguf")
    return sorted(path for path in out.parent.glob("*.gguf") if pattern.fullmatch(path.name))


def recorded_shards(artifact: Artifact, size: str) -> tuple[Path, ...] | None:
    """The shards of an earlier run, if they are complete, and from the same parts and size according to the
    manifest.
    """
    found = read_manifest(artifact.manifest_path)
    if found is None or found.identity != artifact.identity or found.details.get("split_size") != size.upper():
        return None
    shards = _named(found, artifact.out)
    try:
        same = bool(shards) and all(sha256_file(path) == sha256 for path, sha256 in shards.items())
    except OSError:
        return None
    return tuple(shards) if same else None


def check_shards_free(out: Path) -> None:
    """Raises OutputUnwritable if there are shards of this name that the manifest beside does not name."""
    found = read_manifest(beside(out, MANIFEST))
    ours = _named(found, out) if found else {}
    if odd := [path for path in shards_of(out) if path not in ours]:
        raise OutputUnwritable(
            f"{odd[0]} exists and was made from something else", hint="another name, or --force to replace it"
        )


def split(
    artifact: Artifact, size: str, tools: Toolset, *, force: bool = False, report: Report = silent
) -> tuple[Path, ...]:
    """Replace the finished file with shards; the manifest beside it names them. A small enough file stays whole.

    The manifest names them before the first exists: the next run resumes an interrupted one from the whole file,
    which is removed last. Raises OutputUnwritable, ToolFailed, ToolKilled, VerificationFailed; then the file is
    unchanged.
    """
    out = artifact.out
    if out.stat().st_size <= parse_size(size):
        return (out,)
    with locked_output(out), unwinding_signals(), _folder_beside(out) as folder:
        report(Step(f"splitting {out.name}", 0))
        command: list[str | Path] = [tools.tool("llama-gguf-split"), "--split", "--split-max-size", size.upper()]
        command += [out.absolute(), folder / out.stem]
        run_tool(command, cwd=folder)
        made = sorted(folder.glob("*.gguf"))
        _verify(out, made, report)
        places = [out.with_name(path.name) for path in made]
        if not force:
            check_shards_free(out)
        there = set(shards_of(out))
        whole = artifact.found()
        if whole is None:
            raise OutputUnwritable(f"{out} was replaced while it was being split")
        shards = SplitRecord(
            size.upper(), tuple(Shard(path.name, path.stat().st_size, sha256_file(path)) for path in made)
        )
        write_json(artifact.manifest_path, replace(whole, details={**whole.details, **details_of(shards)}).json())
        try:
            for path, place in reversed(
                list(zip(made, places, strict=True))
            ):  # the first last: nothing loads the others without
                put(path, place)
        except BaseException:
            for place in set(places) - there:
                place.unlink(missing_ok=True)
            write_json(artifact.manifest_path, whole.json())
            raise
        for old in there - set(places):  # of another count
            old.unlink()
        out.unlink()
    return tuple(places)


def _named(manifest: Manifest, out: Path) -> dict[Path, str]:
    """The shards that a manifest names, with their sha256."""
    shards = manifest.details.get("shards")
    try:
        return {out.with_name(one["name"]): str(one["sha256"]) for one in shards or ()}
    except (TypeError, KeyError, ValueError):
        return {}


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """On the disk of the output, so that files are renamed and not copied."""
    folder = Path(tempfile.mkdtemp(prefix=f".{out.stem[:64]}.split-", dir=out.parent)).absolute()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _verify(whole: Path, shards: list[Path], report: Report) -> None:
    """Check that every tensor and key of the whole file is in the shards, once and with the same bytes."""
    before = read_header(whole)
    headers = [read_header(path) for path in shards]
    if not headers or [one.metadata.get("split.count") for one in headers] != [len(headers)] * len(headers):
        raise VerificationFailed(f"{whole}: llama-gguf-split left {len(headers)} files, and they name another number")
    if _told(headers[0]) != _told(before):
        raise VerificationFailed(f"{shards[0]}: other metadata than {whole}")
    there = [(header, tensor.name) for header in headers for tensor in header.tensors]
    if sorted(name for _, name in there) != sorted(tensor.name for tensor in before.tensors):
        raise VerificationFailed(f"{whole}: its shards hold {len(there)} tensors, expected {len(before.tensors)}")
    done = 0
    for header in headers:
        with _mapped(header) as ours, _mapped(before) as theirs:
            places = {tensor.name: tensor for tensor in before.tensors}
            for tensor in header.tensors:
                other = places[tensor.name]
                same = (tensor.type, tensor.shape, tensor.n_bytes) == (other.type, other.shape, other.n_bytes)
                if not same or not _equal(
                    ours, header.data_offset + tensor.offset, theirs, before.data_offset + other.offset, tensor.n_bytes
                ):
                    raise VerificationFailed(f"{header.path}: {tensor.name} differs from {whole}")
                done += tensor.n_bytes
                report(Step(f"comparing shards of {whole.name}", done / 1e6, before.file_size / 1e6, "MB"))


def _told(header: Header) -> dict[str, Any]:
    """The metadata without the split's keys; long arrays by their bytes."""
    with _mapped(header) as data:
        return {
            key: bytes(data[value.offset : value.offset + value.n_bytes]) if isinstance(value, ArrayValue) else value
            for key, value in header.metadata.items()
            if key not in _SPLIT_KEYS
        }


def _equal(one: mmap.mmap, at: int, two: mmap.mmap, other: int, n_bytes: int) -> bool:
    return all(
        one[at + done : at + min(done + _BLOCK, n_bytes)] == two[other + done : other + min(done + _BLOCK, n_bytes)]
        for done in range(0, n_bytes, _BLOCK)
    )


@contextmanager
def _mapped(header: Header) -> Iterator[mmap.mmap]:
    with header.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data
