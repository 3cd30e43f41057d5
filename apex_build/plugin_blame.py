"""Errors inside a plugin name the plugin, and the line of its code."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apex_build.errors import ApexError, PluginFailed, Terminated
from apex_build.hookspecs import Document, Evaluator, Figure

if TYPE_CHECKING:
    from apex_build.evaluation.task import Task

Read = Callable[[Mapping[str, Any], Path], Iterator[Document]]
Pin = Callable[[Mapping[str, Any], Path], Mapping[str, str]]


def blaming(plugin: str, read: Read) -> Read:
    def blamed(options: Mapping[str, Any], folder: Path) -> Iterator[Document]:
        with blame(plugin):
            yield from read(options, folder)

    return blamed


def blaming_pin(plugin: str, pin: Pin) -> Pin:
    def blamed(options: Mapping[str, Any], folder: Path) -> Mapping[str, str]:
        with blame(plugin):
            return pin(options, folder)

    return blamed


def blaming_evaluator(plugin: str, evaluator: Evaluator) -> Callable[[Task], Sequence[Figure]]:
    def blamed(task: Task) -> Sequence[Figure]:
        with blame(plugin):
            figures = list(evaluator.evaluate(task))
        if not all(isinstance(figure, Figure) for figure in figures):
            raise PluginFailed(
                f"plugin '{plugin}': evaluator '{evaluator.name}' must give a list of Figure, not {figures!r:.200}"
            )
        return figures

    return blamed


@contextmanager
def blame(plugin: str, origin: str = "") -> Iterator[None]:
    """Turn whatever a plugin raises into PluginFailed. Its own ApexErrors pass: they are meant for the user."""
    try:
        yield
    except (ApexError, Terminated):
        raise
    except (Exception, SystemExit) as error:
        source = f" ({origin})" if origin else ""
        raise PluginFailed(f"plugin '{plugin}'{source}: {type(error).__name__}: {error}{_where(error)}") from error


def _where(error: BaseException) -> str:
    """', at FILE:LINE' of the innermost frame in the plugin's code."""
    if isinstance(error, SyntaxError) and error.filename:
        return f", at {error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = (str(Path(__file__).parent), str(Path(traceback.__file__).parent), "<frozen")
    theirs = [frame for frame in frames if not frame.filename.startswith(own)] or frames
    return f", at {theirs[-1].filename}:{theirs[-1].lineno}" if theirs else ""
