"""Merge imatrices, and convert between formats: counts and sums of squares, without running anything.

Sums are added in double precision and rounded once. The format before GGUF (.dat) keeps means instead of sums, one
count for all experts, and not how many tokens a chunk had: what it cannot hold is lost, with a warning.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import numpy.typing as npt

from apex_build.errors import ImatrixInvalid, ImatrixMismatch
from apex_build.gguf_model.imatrix import HEAD_ROWS, HEAD_TOKENS, Entry, Imatrix, check_values, read_imatrix
from apex_build.storage.artifacts import Artifact, Replace, making
from apex_build.storage.digests import sha256_file
from apex_build.storage.manifest import MERGED, Manifest, manifest_of
from apex_build.storage.outputs import MANIFEST, beside, check_apart, check_place, with_manifest_and_log

_CHUNK_SIZE = 512  # llama-imatrix's default, for the format that does not record it
_MAX_COUNT = 1 << 24  # whole numbers up to here are exact in the counts' F32

Sums = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SourceRecord:
    name: str
    sha256: str


@dataclass(frozen=True)
class MergedRecord:
    """The manifest of a merged or converted imatrix, beyond its head."""

    merged: tuple[SourceRecord, ...]
    format: str
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int
    head_tokens: int | None


@dataclass(frozen=True)
class Merged:
    """The data to write: name -> sums [matrices, row length] and counts [matrices], computed on demand."""

    sources: tuple[Imatrix, ...]
    chunk_size: int
    chunk_count: int
    datasets: tuple[str, ...]
    head_tokens: int | None
    head_rows: Any
    notes: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return sorted({name for source in self.sources for name in source.entries})

    def sums(self, name: str) -> tuple[Sums, Sums]:
        """Sums of squares and counts of one weight, over all files that have it."""
        parts = [
            _as_sums(source, source.entries[name], self.chunk_size) for source in self.sources if name in source.entries
        ]
        return sum((part[0] for part in parts[1:]), parts[0][0]), sum((part[1] for part in parts[1:]), parts[0][1])


def plan_merge(paths: Sequence[Path], chunk_size: int | None = None) -> Merged:
    """Read and compare the files. `chunk_size`: tokens of a chunk of those in the older format.

    Raises ImatrixInvalid, and ImatrixMismatch where they are not of one model or their heads were not run over the same
    rows.
    """
    found = tuple(read_imatrix(path) for path in paths)
    for one in found:
        check_values(one)
    check_same_model(found)
    _heads_in_all(found)
    notes = list(_differences(found))
    sizes = [one.chunk_size for one in found if one.chunk_size]
    legacy = any(one.format == "legacy" for one in found)
    size = math.gcd(*sizes, *([chunk_size or _CHUNK_SIZE] if legacy else [])) or _CHUNK_SIZE
    if legacy and chunk_size and size != chunk_size:
        raise ImatrixMismatch(
            f"chunks of {chunk_size} tokens, and of {sizes[0]} in {found[0].path}: no size of chunk fits both"
        )
    counted = [one.chunk_count for one in found if one.chunk_count is not None]
    chunks = sum((one.chunk_count or 0) * (one.chunk_size or size) // size for one in found) if counted else 0
    silent = [one for one in found if one.format == "legacy" and any(".nextn." in name for name in one.entries)]
    notes += [
        f"{one.path} has data of a draft head: the older format does not say over which hidden rows of the trunk it "
        "was run, "
        "so apex quantize will not use it for the head"
        for one in silent
    ]
    heads = [one for one in found if one.head_tokens]
    tokens = sum(one.head_tokens or 0 for one in heads) if heads else None
    rows = _head_rows([*heads, *silent])
    datasets = tuple(dict.fromkeys(name for one in found for name in one.datasets)) or ("unknown",)
    return Merged(found, size, chunks, datasets, tokens, rows, tuple(notes))


def write_gguf(merged: Merged, part: Path, keys: Mapping[str, int] | None = None) -> None:
    """Write as llama-imatrix does: entries by name. `keys`: additional numbers."""
    writer = gguf.GGUFWriter(part, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(merged.datasets))
    writer.add_uint32("imatrix.chunk_count", merged.chunk_count)
    writer.add_uint32("imatrix.chunk_size", merged.chunk_size)
    if merged.head_tokens:
        writer.add_uint64(HEAD_TOKENS, merged.head_tokens)
    if merged.head_rows is not None:
        writer.add_string(HEAD_ROWS, str(merged.head_rows))
    writer.add_key_value("apex.imatrix.merged", len(merged.sources), gguf.GGUFValueType.UINT32)
    for key, number in (keys or {}).items():
        writer.add_uint32(key, number)
    for name in merged.names:
        sums, counts = merged.sums(name)
        if counts.max() > _MAX_COUNT:
            raise ImatrixInvalid(
                f"{name}: {counts.max():.0f} tokens are more than an imatrix can count exactly ({_MAX_COUNT})"
            )
        writer.add_tensor(f"{name}.in_sum2", sums.astype(np.float32))
        writer.add_tensor(f"{name}.counts", counts.astype(np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_legacy(merged: Merged, part: Path) -> list[str]:
    """Write as llama-imatrix --output-format dat does. Returns what the format could not hold."""
    stored = [name for name in merged.names if merged.sums(name)[1].any()]
    partial = 0
    with part.open("wb") as file:
        file.write(struct.pack("<i", len(stored)))
        for name in stored:
            sums, counts = merged.sums(name)
            partial += bool((counts == 0).any())
            _write_entry(file, name, sums.astype(np.float32), counts, merged.chunk_size)
        dataset = merged.datasets[-1].encode()
        file.write(struct.pack("<ii", merged.chunk_count, len(dataset)) + dataset)
    lost = ["each expert's own count: one number of calls for all of them"] if _has_experts(merged) else []
    if merged.head_tokens:
        lost.append("how many tokens the draft head was run over, and on which rows")
    if dropped := len(merged.names) - len(stored):
        lost.append(f"{dropped} entries without a token")
    if partial:
        lost.append(f"which experts saw no token, in {partial} entries: they count as average")
    return lost


def _write_entry(file: BinaryIO, name: str, sums: npt.NDArray[np.float32], counts: Sums, chunk_size: int) -> None:
    calls = -(-int(counts.max()) // chunk_size)
    tokens = counts.astype(np.float32)[:, None]
    means = np.where(tokens > 0, sums / np.where(tokens > 0, tokens, np.float32(1)), np.float32(1)) * np.float32(calls)
    raw = name.encode()
    file.write(struct.pack("<i", len(raw)) + raw + struct.pack("<ii", calls, means.size))
    file.write(means.astype("<f4").tobytes())


def _as_sums(source: Imatrix, entry: Entry, chunk_size: int) -> tuple[Sums, Sums]:
    scale = chunk_size if source.format == "legacy" else 1
    return entry.values().astype(np.float64) * scale, np.array(entry.counts, dtype=np.float64) * scale


def check_same_model(found: Sequence[Imatrix]) -> None:
    """Raises ImatrixMismatch, saying how the models differ."""
    first = found[0]
    models = {fingerprint: one.path for one in reversed(found) if (fingerprint := _model_of(one.path))}
    if len(models) > 1:
        paths = " and ".join(str(path) for path in models.values())
        raise ImatrixMismatch(
            f"{paths} were made from different models, according to their manifests", hint="apex inspect FILE"
        )
    for one in found[1:]:
        shared = first.entries.keys() & one.entries.keys()
        if len(shared) * 2 < min(len(first.entries), len(one.entries)):
            raise ImatrixMismatch(
                f"{one.path} belongs to another model than {first.path}: {len(shared)} of their entries have the same "
                "name"
            )
        for name in sorted(shared):
            ours, theirs = first.entries[name], one.entries[name]
            if ours.n_values != theirs.n_values:
                raise ImatrixMismatch(
                    f"{one.path} belongs to another model than {first.path}: {name} has {theirs.n_values} values, "
                    "expected "
                    f"{ours.n_values}"
                )
            if len(ours.counts) != len(theirs.counts):
                raise ImatrixMismatch(
                    f"{one.path} and {first.path} cannot be added exactly: {name} has {len(theirs.counts)} and "
                    f"{len(ours.counts)} "
                    "counts: the older format does not tell experts apart",
                    hint="merge files of the older format with each other, and those in GGUF",
                )


def merge(
    paths: Sequence[Path], out: Path, form: str = "gguf", *, chunk_size: int | None = None, force: bool = False
) -> tuple[Merged, Manifest, list[str]]:
    """Write the files' data to `out`, as 'gguf' or 'dat'. Returns also what the format does not keep.

    Raises as `plan_merge`, and OutputUnwritable, DiskTooSmall.
    """
    digests = {path: sha256_file(path) for path in paths if path.is_file()}
    artifact = Artifact(out, MERGED, {"files": list(digests.values()), "format": form, "chunk_size": chunk_size})
    check_place(out)
    check_apart(with_manifest_and_log(out), paths)
    may: Replace = "anything" if force else "nothing"
    merged = plan_merge(paths, chunk_size)
    room = 2 * max(path.stat().st_size for path in paths)
    with making(artifact, inputs=paths, reuse=not force, replace=may, n_bytes=room) as draft:
        if draft.found:
            return merged, draft.found, []
        lost: Sequence[str] = ()
        if form == "dat":
            lost = write_legacy(merged, draft.part)
        else:
            write_gguf(merged, draft.part)
        sources = tuple(SourceRecord(one.path.name, digests[one.path]) for one in merged.sources)
        record = MergedRecord(sources, form, merged.datasets, merged.chunk_count, merged.chunk_size, merged.head_tokens)
        return merged, draft.done(record), list(lost)


def _heads_in_all(found: Sequence[Imatrix]) -> None:
    """Refuse a merge where the head's data would come from less text than the trunk's: the file would not show it."""
    with_head = [one for one in found if one.head_tokens]
    without = [one for one in found if not one.head_tokens and one.format == "gguf"]
    if with_head and without:
        raise ImatrixMismatch(
            f"{without[0].path} was made without the draft head, {with_head[0].path} with it, over "
            f"{with_head[0].head_tokens} tokens: the head would have data of a part of the text alone",
            hint="calibrate all parts alike: apex calibrate MODEL, or with --no-mtp",
        )


def _model_of(path: Path) -> str | None:
    manifest = manifest_of(path, beside(path, MANIFEST))
    model = manifest.parts.get("model") if manifest else None
    return model if isinstance(model, str) else None


def _differences(found: Sequence[Imatrix]) -> Iterator[str]:
    everything = {name for one in found for name in one.entries}
    for one in found:
        if lacking := sorted(everything - one.entries.keys()):
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            yield f"{one.path} has no data for {lacking[0]}{more}: there the others count alone"


def _head_rows(heads: Sequence[Imatrix]) -> Any:
    rows = {one.head_rows: one.path for one in heads}
    if len(rows) > 1:
        said = ", ".join(f"{path}: {row or 'unknown'}" for row, path in rows.items())
        raise ImatrixMismatch(
            f"the draft head was not run over the same rows of the trunk ({HEAD_ROWS}): {said}",
            hint="calibrate again with one build: apex calibrate MODEL",
        )
    return next(iter(rows), None)


def _has_experts(merged: Merged) -> bool:
    return any(len(entry.counts) > 1 for one in merged.sources for entry in one.entries.values())
