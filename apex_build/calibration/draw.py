"""Choose documents of a set: no duplicates, a share held out, tokens by weight."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from apex_build.calibration.set_file import CalibrationSet
from apex_build.errors import CalibrationSetInvalid

Count = Callable[[Sequence[bytes]], list[int]]  # tokens of each text
# Bytes read for each token that a part is to give: texts have three to five, so that there is enough after duplicates
# and the held-out share are gone.
BYTES_A_TOKEN = 8
_PERMUTATIONS = 128  # of MinHash: a similarity within a few percent
_SHORT = 64  # bytes: shorter texts, such as headings, may repeat
_WORDS = 5  # in a row, that two texts have in common


@dataclass(frozen=True)
class Drawn:
    """Of one part: the texts to calibrate on and those held out, with their tokens if they were counted; how many were
    left out because the set has them, or nearly, already; and the tokens that there are for the weights to take from.
    """

    texts: tuple[bytes, ...]
    heldout: tuple[bytes, ...] = ()
    tokens: tuple[int, ...] = ()
    heldout_tokens: tuple[int, ...] = ()
    duplicates: int = 0
    near_duplicates: int = 0
    available: int = 0


def draw(
    chosen: CalibrationSet,
    parts: Sequence[Sequence[bytes]],
    weights: Sequence[float | None],
    count: Count | None,
    heldout: float,
) -> list[Drawn]:
    """The texts to take from each part. Raises CalibrationSetInvalid if a library is missing."""
    drawn = _distinct(chosen, parts)
    if chosen.seed is not None:
        drawn = [_shuffled(one, f"{chosen.seed}:{number}") for number, one in enumerate(drawn)]
    if heldout:
        drawn = [_split(one, heldout, chosen.seed or 0) for one in drawn]
    if count is None:
        return drawn
    drawn = _counted(drawn, count)
    return _by_weight(drawn, [weight or 1.0 for weight in weights], chosen) if chosen.weighted else drawn


def budgets(chosen: CalibrationSet) -> list[int | None]:
    """The tokens that each part of the set is to give; None: not known before they are counted."""
    if chosen.tokens is None or not chosen.weighted:
        return [None] * len(chosen.parts)
    total = sum(part.weight or 0 for part in chosen.parts)
    return [round(chosen.tokens * (part.weight or 0) / total) for part in chosen.parts]


def _distinct(chosen: CalibrationSet, parts: Sequence[Sequence[bytes]]) -> list[Drawn]:
    """The first of equal texts and, if the set asks for it, of nearly equal ones; over all parts."""
    seen: set[bytes] = set()
    near = _Near(chosen.near_duplicates) if chosen.near_duplicates else None
    drawn = []
    for texts in parts:
        kept: list[bytes] = []
        exact = alike = 0
        for text in texts:
            if len(text) < _SHORT:
                kept.append(text)
                continue
            digest = hashlib.sha256(text.strip()).digest()
            if digest in seen:
                exact += 1
                continue
            seen.add(digest)
            if near is not None and near.has(text):
                alike += 1
                continue
            kept.append(text)
        drawn.append(Drawn(tuple(kept), duplicates=exact, near_duplicates=alike))
    return drawn


class _Near:
    """The texts so far, by MinHash: whether a text has nearly the same words in a row as one of them."""

    def __init__(self, threshold: float) -> None:
        try:
            import datasketch
        except ImportError:
            raise CalibrationSetInvalid(
                "'near_duplicates' needs the Python package datasketch", hint="pip install 'apex-build[hub]'"
            ) from None
        self._sketch = datasketch.MinHash
        self._index = datasketch.MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS)
        self._threshold = threshold
        self._hashes: list[object] = []

    def has(self, text: bytes) -> bool:
        """Adds it if not."""
        words = text.split()
        rows = {b" ".join(words[at : at + _WORDS]) for at in range(max(1, len(words) - _WORDS + 1))}
        sketch = self._sketch(num_perm=_PERMUTATIONS)
        sketch.update_batch(rows)
        # the index finds candidates; the sketches tell how similar they are
        if any(sketch.jaccard(self._hashes[at]) >= self._threshold for at in self._index.query(sketch)):
            return True
        self._index.insert(len(self._hashes), sketch)
        self._hashes.append(sketch)
        return False


def _shuffled(drawn: Drawn, seed: str) -> Drawn:
    texts = list(drawn.texts)
    random.Random(seed).shuffle(texts)  # noqa: S311  the same draw each time, nothing secret
    return replace(drawn, texts=tuple(texts))


def _split(drawn: Drawn, share: float, seed: int) -> Drawn:
    """Held out is what a digest of the text itself says, whatever else the set has: so it stays when the set grows."""

    def place(text: bytes) -> float:
        return int.from_bytes(hashlib.sha256(b"%d:" % seed + text).digest()[:8], "big") / 2**64

    apart = {text for text in drawn.texts if place(text) < share}
    if not apart and len(drawn.texts) > 1:
        apart = {min(drawn.texts, key=place)}
    if len(apart) == len(drawn.texts):
        apart = set(sorted(apart, key=place)[:-1])
    kept = tuple(text for text in drawn.texts if text not in apart)
    return replace(drawn, texts=kept, heldout=tuple(text for text in drawn.texts if text in apart))


def _counted(drawn: Sequence[Drawn], count: Count) -> list[Drawn]:
    """One call for all of them: loading a vocabulary takes longer than counting."""
    counts = iter(count([text for one in drawn for text in (*one.texts, *one.heldout)]))
    made = []
    for one in drawn:
        tokens = tuple(next(counts) for _ in one.texts)
        apart = tuple(next(counts) for _ in one.heldout)
        made.append(replace(one, tokens=tokens, heldout_tokens=apart, available=sum(tokens)))
    return made


def _by_weight(drawn: Sequence[Drawn], weights: Sequence[float], chosen: CalibrationSet) -> list[Drawn]:
    """Whole documents up to each part's share of the tokens; without a total, of as many as keep all weights true."""
    total = sum(weights)
    if chosen.tokens is not None:
        whole = sum(part.weight or 0 for part in chosen.parts)  # parts that are left out leave their share
        wanted = [round(chosen.tokens * weight / whole) for weight in weights]
    else:
        most = min(sum(one.tokens) * total / weight for one, weight in zip(drawn, weights, strict=True))
        wanted = [round(most * weight / total) for weight in weights]
    made = []
    for one, tokens in zip(drawn, wanted, strict=True):
        texts, counts = _up_to(one.texts, one.tokens, tokens)
        share = sum(one.heldout_tokens) / max(1, sum(one.tokens) + sum(one.heldout_tokens))
        apart, apart_counts = _up_to(one.heldout, one.heldout_tokens, max(1, round(tokens * share)))
        made.append(replace(one, texts=texts, tokens=counts, heldout=apart, heldout_tokens=apart_counts))
    return made


def _up_to(texts: Sequence[bytes], counts: Sequence[int], most: int) -> tuple[tuple[bytes, ...], tuple[int, ...]]:
    """Whole documents while they fit; the first is always kept, and one that does not fit is passed over."""
    kept: list[tuple[bytes, int]] = []
    total = 0
    for text, n in zip(texts, counts, strict=True):
        if not kept or total + n <= most:
            kept.append((text, n))
            total += n
    return tuple(text for text, _ in kept), tuple(n for _, n in kept)
