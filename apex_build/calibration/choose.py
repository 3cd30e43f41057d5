"""Which documents to draw next, so that experts that saw few tokens see more.

What was measured: stretches of text with the tokens that each expert got from them. Experts are chosen by what the text
says, so the words of a stretch, and its domain, tell how often it reaches each starving expert: a ridge regression on
hashed words, made again before each round. It needs no knowledge of models or domains, and where it knows nothing it
falls back on the average, which is drawing blindly. The model's own tokens in place of words, and rates learnt for each
token, were tried and predict no better (docs/long-runs.md).
"""

from __future__ import annotations

import heapq
import re
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Features = npt.NDArray[np.float32]  # of which there are thousands, for each piece of a large set

_BUCKETS = 4096
_WORD = re.compile(rb"\w+|[^\w\s]", re.ASCII)
_RIDGE = 0.3  # of a stretch's own weight: how far the average is trusted over few stretches
_DOMAIN = 0.5  # the length of a document's domain beside that of its words
_EXPERTS = 1024  # starving ones that are looked at: those that blind drawing would take longest to feed
_UNSEEN = 0.5  # tokens: what an expert that was not seen at all counts as
_DOUBT = 2.0  # tokens: an expert that saw this many has half the weight


@dataclass(frozen=True)
class Piece:
    """A document, or a part of a long one."""

    domain: str
    text: bytes


@dataclass
class Measured:
    """Stretches of text: their features, tokens, and the tokens that each expert got."""

    features: list[Features] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    counts: list[Floats] = field(default_factory=list)

    def add(self, features: Features, tokens: int, counts: Floats) -> None:
        self.features.append(features)
        self.tokens.append(tokens)
        self.counts.append(counts)

    @property
    def total(self) -> Floats:
        total: Floats = np.stack(self.counts).sum(axis=0)
        return total


def features_of(parts: Sequence[tuple[Piece, bytes]], domains: Sequence[str]) -> Features:
    """Of a stretch, made of parts of some pieces: its words, and its domains by their share of it."""
    words, places = np.zeros(_BUCKETS), np.zeros(len(domains))
    for piece, text in parts:
        found = [zlib.crc32(word) % _BUCKETS for word in _WORD.findall(text)]
        np.add.at(words, found, 1.0)
        places[domains.index(piece.domain)] += len(text)
    words = np.sqrt(words)  # a word said often says less each time
    words /= np.linalg.norm(words) or 1.0
    places *= _DOMAIN / (np.linalg.norm(places) or 1.0)
    return np.concatenate([words, places]).astype(np.float32)


def choose(
    measured: Measured,
    goal: float,
    pieces: Sequence[Piece],
    features: Sequence[Features],
    tokens: Sequence[float],
    left: Collection[int],
    least: float,
    budget: float,
) -> list[int]:
    """Numbers of pieces to draw next, of those that are left: of `least` tokens or more, and of no more than about
    `budget` together; fewer where those are expected to be enough.
    """
    missing = np.maximum(goal - measured.total, 0)
    mean = (measured.total + _UNSEEN) / sum(measured.tokens)
    needed = missing / mean  # tokens of blind drawing
    starving = np.argsort(-needed, kind="stable")[: min(_EXPERTS, int((missing > 0).sum()))]
    open_, spent = missing[starving], 0.0
    taken: list[int] = []
    order = sorted(left)
    sizes = np.array([tokens[number] for number in order])
    expected = _rates(measured, starving, np.stack([features[number] for number in order])) * sizes[:, None]
    worth = 1 / mean[starving]  # what blind drawing would need for the same: rare experts count for more
    # gains only shrink, as the need does: one that was computed before is a bound
    heap = [(-float(gain), at) for at, gain in enumerate(np.minimum(expected, open_) @ worth / sizes)]
    heapq.heapify(heap)
    while heap and spent < (budget if open_.any() else least):
        _, at = heapq.heappop(heap)
        gain = float(np.minimum(expected[at], open_) @ worth / sizes[at])
        if heap and (-gain, at) > heap[0]:
            heapq.heappush(heap, (-gain, at))
            continue
        open_ = np.maximum(open_ - expected[at], 0)
        spent += sizes[at]
        taken.append(order[at])
    return taken


def _rates(measured: Measured, starving: npt.NDArray[np.intp], wanted: Features) -> Floats:
    """For each wanted document the tokens that each starving expert is expected to get, for each of its tokens."""
    known = np.stack(measured.features)
    seen = np.array(measured.tokens, dtype=np.float64)
    got = np.stack([counts[starving] for counts in measured.counts]) / seen[:, None]
    mean = (got * seen[:, None]).sum(axis=0) / seen.sum()
    kernel = known @ known.T + _RIDGE * np.eye(len(known))
    tokens = mean * seen.sum()
    trust = tokens / (tokens + _DOUBT)
    weights = known.T @ (np.linalg.solve(kernel, got - mean) * trust).astype(np.float32)
    # never less than a part of the average: an expert that was not seen at all must not be given up
    rates: Floats = np.maximum(mean + wanted @ weights, 0.1 * mean + 1e-9)
    return rates


def cut(documents: Sequence[tuple[str, bytes]], longest: int) -> list[Piece]:
    """Documents in pieces of no more than about `longest` bytes, at the ends of paragraphs, or of lines."""
    pieces = []
    for domain, text in documents:
        while len(text) > longest * 3 // 2:
            at = max(text.rfind(b"\n\n", longest // 2, longest) + 2, 2)
            if at == 2:
                at = text.rfind(b"\n", longest // 2, longest) + 1
            if at == 0:
                break
            pieces.append(Piece(domain, text[:at]))
            text = text[at:]
        if text:
            pieces.append(Piece(domain, text))
    return pieces
