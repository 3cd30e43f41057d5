"""How far two imatrices of one model are apart: how each matrix weights its columns, and from how many tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from apex_build.calibration.merge import check_same_model
from apex_build.gguf_model.imatrix import Entry, Imatrix, checked_values, read_imatrix

# name of a weight -> its role, and whether it is the draft head's
PlaceOf = Callable[[str], tuple[str, bool]]


@dataclass(frozen=True)
class MatrixDiff:
    """One matrix (of an expert, or of a dense weight) that has data in both files.

    `distance`: half the sum of the differences between the two shares of each column, 0 where both weigh the columns
    alike and 1 where they have none in common. `relative`: the largest difference of a sum of squares, as a part of the
    larger one.
    """

    tensor: str
    number: int
    distance: float
    relative: float
    tokens: tuple[float, float]


@dataclass(frozen=True)
class RoleDiff:
    """All matrices of one role, in the draft head or outside it. `only`: those that one file alone has data for."""

    role: str
    draft_head: bool
    matrices: int
    equal: int  # counts and sums, to the bit
    counts_equal: int
    mean: float
    worst: MatrixDiff | None
    relative: float
    only: tuple[int, int]


@dataclass(frozen=True)
class Diff:
    one: Imatrix
    two: Imatrix
    roles: tuple[RoleDiff, ...]

    @property
    def equal(self) -> bool:
        return all(role.equal == role.matrices and role.only == (0, 0) for role in self.roles)


def diff(one: Path, two: Path, place_of: PlaceOf) -> Diff:
    """Compare two files, matrix by matrix. Raises ImatrixInvalid, and ImatrixMismatch where they are of different
    models.
    """
    found = read_imatrix(one), read_imatrix(two)
    check_same_model(found)
    names = sorted({name for each in found for name in each.entries})
    groups: dict[tuple[str, bool], list[str]] = {}
    for name in names:
        groups.setdefault(place_of(name), []).append(name)
    ordered = sorted(groups.items(), key=lambda group: (group[0][1], group[0][0]))
    return Diff(*found, tuple(_role(*place, members, *found) for place, members in ordered))


def _role(role: str, draft_head: bool, names: Sequence[str], one: Imatrix, two: Imatrix) -> RoleDiff:
    matrices: list[MatrixDiff] = []
    equal = counts_equal = 0
    only = [0, 0]
    for name in names:
        ours, theirs = one.entries.get(name), two.entries.get(name)
        if ours is None or theirs is None:
            only[ours is None] += sum(count > 0 for count in (ours or theirs).counts)  # type: ignore[union-attr]
            continue
        for found, same in _matrices(name, ours, theirs):
            if found is None:
                continue
            if not all(found.tokens):
                only[not found.tokens[0]] += 1
                continue
            matrices.append(found)
            equal += same
            counts_equal += found.tokens[0] == found.tokens[1]
    return RoleDiff(
        role,
        draft_head,
        len(matrices),
        equal,
        counts_equal,
        float(np.mean([found.distance for found in matrices])) if matrices else 0.0,
        max(matrices, key=lambda found: found.distance, default=None),
        max((found.relative for found in matrices), default=0.0),
        (only[0], only[1]),
    )


def _matrices(name: str, one: Entry, two: Entry) -> Iterator[tuple[MatrixDiff | None, bool]]:
    """Each matrix, and whether it is the same to the bit; None if neither has data."""
    first, second = checked_values(one), checked_values(two)
    for number, tokens in enumerate(zip(one.counts, two.counts, strict=True)):
        if not any(tokens):
            yield None, False
            continue
        ours, theirs = (values[number].astype(np.float64) for values in (first, second))
        larger = np.maximum(ours, theirs)
        apart = np.abs(ours - theirs)
        relative = float(np.max(np.divide(apart, larger, out=np.zeros_like(apart), where=larger > 0)))
        same = tokens[0] == tokens[1] and not apart.any()
        yield MatrixDiff(name, number, _distance(ours, theirs), relative, tokens), same


def _distance(one: npt.NDArray[np.float64], two: npt.NDArray[np.float64]) -> float:
    totals = one.sum(), two.sum()
    if not all(totals):
        return float(totals[0] != totals[1])
    return float(np.abs(one / totals[0] - two / totals[1]).sum() / 2)
