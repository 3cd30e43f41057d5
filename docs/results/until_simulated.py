"""How many tokens `--until-experts` needs, over many orders of the text, from one run of the tool over all of it.

    python docs/results/until_simulated.py MODEL TOKENS [TOKENS...] [--calibration-set SET] [--orders 16]

The tool says what each chunk of the text gave each expert. Rounds are then drawn from the chunks, in random orders of
their documents, by the chooser of `--until-experts` and blindly. `--keep FILE.npz` keeps the counts, and uses what is
there. Needs the tools; threads 1.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apex_build import api
from apex_build.calibration.choose import Features, Floats, Measured, Piece, choose, features_of
from apex_build.calibration.run import Settings
from apex_build.calibration.shards import Shard, Task, counts_file, make_shard
from apex_build.native.token_counts import count_tokens
from apex_build.stages.calibrate import CalibrateOptions, text_of

CONTEXT = 512
FIRST, FEWEST, GROWTH, MOST = 8, 4, 0.25, 256  # chunks of a round, as of a small model


@dataclass(frozen=True)
class Chunks:
    counts: Floats  # chunks x experts
    features: list[Features]
    pieces: list[Piece]
    documents: list[list[int]]  # the chunks of each: of a chunk that has several, the first


def counts_of(place: api.Workplace, model: api.Model, text: bytes) -> Floats:
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "text").mkdir()
        (Path(scratch) / "text" / "text.txt").write_bytes(text)
        sha256 = hashlib.sha256(text).hexdigest()
        task = Task(Path(scratch) / "text" / "text.txt", sha256, Shard(0, 1 << 20), Path(scratch) / "all.gguf", every=1)
        make_shard(model, task, place.tools, Settings(threads=1))
        counts: Floats = np.diff(np.load(counts_file(task.out))["counts"], axis=0, prepend=0)
    return counts


def chunks_of(documents: Sequence[tuple[str, bytes]], counts: Floats, count: Callable[..., list[int]]) -> Chunks:
    """The text of each chunk: every line's place is known in tokens, to one or two."""
    lines = [(domain, line) for domain, text in documents for line in text.splitlines(keepends=True)]
    ends = np.cumsum(count([line for _, line in lines]), dtype=np.float64)
    ends *= count([b"".join(text for _, text in documents)])[0] / ends[-1]
    held: list[list[tuple[Piece, bytes]]] = [[] for _ in counts]
    start, of = 0.0, [number for number, (_, text) in enumerate(documents) for _ in text.splitlines()]
    first: dict[int, int] = {}
    for (domain, line), end, document in zip(lines, ends, of, strict=True):
        for number in range(int(start) // CONTEXT, min(len(counts), int(end) // CONTEXT + 1)):
            cuts = [(at * CONTEXT - start) / (end - start) for at in (number, number + 1)]
            part = line[round(max(0.0, cuts[0]) * len(line)) : round(min(1.0, cuts[1]) * len(line))]
            held[number].append((Piece(domain, part), part))
            first.setdefault(number, document)
        start = float(end)
    domains = sorted({domain for domain, _ in documents})
    pieces = [Piece(parts[0][0].domain, b"".join(part for _, part in parts)) for parts in held]
    grouped = [[number for number in first if first[number] == document] for document in sorted({*first.values()})]
    return Chunks(counts, [features_of(parts, domains) for parts in held], pieces, grouped)


def blindly(chunks: Chunks, order: Sequence[int], goal: int) -> int | None:
    reached = np.flatnonzero(np.cumsum(chunks.counts[order], axis=0).min(axis=1) >= goal)
    return (int(reached[0]) + 1) * CONTEXT if len(reached) else None


def rounds(chunks: Chunks, order: Sequence[int], goal: int) -> int | None:
    """Tokens that were run when the goal is reached."""
    measured, at = Measured(), list(order)
    pieces, features = [chunks.pieces[one] for one in at], [chunks.features[one] for one in at]
    left, chosen = set(range(len(at))), list(range(FIRST))
    while chosen:
        for one in chosen:
            measured.add(features[one], CONTEXT, chunks.counts[at[one]])
        left -= set(chosen)
        spent = sum(measured.tokens)
        if measured.total.min() >= goal:
            return spent
        wanted = max(FEWEST * CONTEXT, min(MOST * CONTEXT, GROWTH * spent))
        chosen = left and choose(
            measured, goal, pieces, features, [CONTEXT] * len(at), left, FEWEST * CONTEXT, wanted
        )  # fmt: skip
    return None


def both(chunks: Chunks, goal: int, orders: int) -> Iterator[tuple[int, int]]:
    for seed in range(orders):
        documents = np.random.default_rng(seed).permutation(len(chunks.documents))
        order = [number for at in documents for number in chunks.documents[at]]
        tokens, blind = rounds(chunks, order, goal), blindly(chunks, order, goal)
        if tokens and blind:
            yield tokens, blind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=int, nargs="+")
    parser.add_argument("--calibration-set", default="default")
    parser.add_argument("--orders", type=int, default=16)
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    place = api.workplace()
    model = place.model(given.model)
    text = text_of(model, CalibrateOptions(given.calibration_set), place.plugins, place.tools)
    if given.keep and given.keep.exists():
        counts = np.load(given.keep)["counts"].astype(np.float64)
    else:
        counts = counts_of(place, model, text.data)
        if given.keep:
            np.savez_compressed(given.keep, counts=counts.astype(np.float32))
    chunks = chunks_of(text.documents, counts, lambda texts: count_tokens(place.tools, model.path, texts))
    print(f"all of the text: {len(counts) * CONTEXT} tokens, least seen {counts.sum(axis=0).min():.0f}")
    for goal in given.tokens:
        found = np.array([*both(chunks, goal, given.orders)], dtype=np.float64).reshape(-1, 2)
        if not len(found):
            print(f"until {goal}: not reached with all of the text")
            continue
        ratio = found[:, 0] / found[:, 1]
        print(
            f"until {goal}: {found[:, 0].mean():.0f} tokens, blindly {found[:, 1].mean():.0f}: "
            f"{found[:, 0].sum() / found[:, 1].sum():.2f} of it; ratios {ratio.min():.2f} to {ratio.max():.2f}, "
            f"mean {ratio.mean():.2f}, in {len(found)} orders"
        )


if __name__ == "__main__":
    main()
