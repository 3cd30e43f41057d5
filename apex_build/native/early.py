"""Report a tool's early warnings at once, and only once."""

from __future__ import annotations

from collections.abc import Callable

from apex_build.native import output
from apex_build.printable import printable
from apex_build.progress import Report, Step


def warnings_of(report: Report, name: str) -> Callable[[str], None]:
    """A watcher for a tool's lines: reports each warning once, as soon as its line appears."""
    told: set[str] = set()

    def watch(line: str) -> None:
        if (words := output.warning(line)) and words not in told:
            told.add(words)
            report(Step(f"{name}: {printable(words)}", 0, said=True))

    return watch
