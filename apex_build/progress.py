"""How the rooms report progress without knowing who shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """Where a long piece of work stands. `total` is None while it is not known; `unit` names what is counted.

    `said`: no work, but a warning to be shown at once and to stay.
    """

    task: str
    done: float
    total: float | None = None
    unit: str = ""
    said: bool = False


Report = Callable[[Step], None]


def silent(_step: Step) -> None:
    """A `Report` that shows nothing."""
