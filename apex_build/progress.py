"""How the rooms report progress without knowing who shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """Where a long piece of work stands. `total` is None while it is not known; `unit` names what is counted."""

    task: str
    done: float
    total: float | None = None
    unit: str = ""


Report = Callable[[Step], None]


def silent(_step: Step) -> None:
    """A `Report` that shows nothing."""
