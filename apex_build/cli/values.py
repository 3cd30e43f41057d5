"""Values that a shell completes: names of policies, GPUs, evaluators, calibration sets and pins."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem

from apex_build.errors import ApexError

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _of(names: Callable[[], Iterable[tuple[str, str]]], *, listed: bool = False) -> Complete:
    """Completion by the names that start with the word; `listed`: the word may hold several, separated by commas."""

    def complete(_context: click.Context, _parameter: click.Parameter, word: str) -> list[CompletionItem]:
        before, comma, last = word.rpartition(",") if listed else ("", "", word)
        try:
            found = list(names())
        except ApexError:  # completion never prints an error into the command line
            return []
        return [CompletionItem(f"{before}{comma}{name}", help=about) for name, about in found if name.startswith(last)]

    return complete


def _policies() -> Iterable[tuple[str, str]]:
    from apex_build.plugins import load_plugins

    return [(name, policy.description) for name, policy in load_plugins().policies().items()]


def _gpus() -> Iterable[tuple[str, str]]:
    from apex_build.plugins import load_plugins

    targets = load_plugins().gpu_targets()
    groups = sorted({group for target in targets.values() for group in target.groups})
    return [
        *((name, target.description) for name, target in targets.items()),
        *((group, "a group") for group in groups),
    ]


def _evaluators() -> Iterable[tuple[str, str]]:
    from apex_build.plugins import load_plugins

    return [(name, evaluator.description) for name, evaluator in load_plugins().evaluators().items()]


def _sets() -> Iterable[tuple[str, str]]:
    from apex_build.calibration.sets import known_sets, load_set

    return [(name, load_set(name).about) for name in known_sets()]


def _pins() -> Iterable[tuple[str, str]]:
    from apex_build.source.pins import all_pins

    return [(pin.name, pin.carrier) for pin in all_pins()]


policies = _of(_policies)
gpus = _of(_gpus, listed=True)
evaluators = _of(_evaluators, listed=True)
calibration_sets = _of(_sets)
pins = _of(_pins)
