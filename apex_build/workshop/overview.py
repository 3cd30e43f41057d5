"""A pin and its series at a glance: which patches apply, what is in the tree, what builds, which tests pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apex_build.source.pins import Pin
from apex_build.source.series import SeriesStatus, read_series, series_digest, series_status
from apex_build.source.tree import BASE, commit_identity, require_tree
from apex_build.toolchain.build.cache import all_builds
from apex_build.workshop.results import recall
from apex_build.workshop.standing import Standing, stand


@dataclass(frozen=True)
class Known:
    """What is known about a source: `builds` and `tests` are None if it was never built or tested.

    `tests`: `ran`, `runnable`, `passed`, `when`, and `broken`: names of the tests that pass without the series and fail
    with it.
    """

    builds: bool | None
    tests: dict[str, Any] | None
    error: str | None = None


@dataclass(frozen=True)
class Overview:
    """`known`: about the source up to each patch, in the order of `standing`; `whole`: about the source with all
    patches.
    """

    pin: Pin
    digest: str
    series: SeriesStatus
    standing: tuple[Standing, ...]
    known: tuple[Known, ...]
    whole: Known

    @property
    def lacking(self) -> tuple[str, ...]:
        """What is missing for this pin to be green, in words."""
        found = [f"{one.patch.name}: {one.applies}" for one in self.standing if one.applies in ("conflict", "upstream")]
        if not self.series.complete:
            found.append("the tree differs from the series")
        if self.series.edited or self.series.untracked:
            found.append("the tree has uncommitted edits")
        if self.whole.builds is not True:
            found.append("it does not build" if self.whole.builds is False else "it was not built yet")
        if self.whole.tests is None:
            found.append("llama.cpp's tests were not run yet")
        elif self.whole.tests.get("broken"):
            found.append(f"it breaks tests: {', '.join(self.whole.tests['broken'])}")
        elif self.whole.tests["ran"] < self.whole.tests["runnable"]:
            found.append(
                f"only {self.whole.tests['ran']} of {self.whole.tests['runnable']} of llama.cpp's tests were run"
            )
        return tuple(found)


def overview(pin: Pin) -> Overview:
    """Raises SourceMissing if the source of the pin is not fetched."""
    path = require_tree(pin)
    series = series_status(pin)
    standing = tuple(stand(path, read_series(pin)))
    built = {str(build.manifest.get("source")) for build in all_builds()}
    known = tuple(_known(one.identity, built) for one in standing)
    last = next((one.identity for one in reversed(standing) if one.identity), None) or commit_identity(path, BASE)
    return Overview(pin, series_digest(pin), series, standing, known, _known(last, built))


def _known(identity: str | None, built: set[str]) -> Known:
    if identity is None:
        return Known(None, None)
    found = recall(identity)
    builds, tests = found.get("builds"), found.get("tests")
    if identity in built:
        return Known(True, tests)
    return Known(
        None if builds is None else bool(builds.get("ok")), tests, None if builds is None else builds.get("error")
    )
