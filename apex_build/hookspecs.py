"""The plugin API: the hooks, and the data that crosses them. Built-in plugins use nothing else.

A plugin is a folder with a `plugin.py`, or a module that a package names in the entry-point group `apex_build`. It writes a
function of a hook's name, marked with `@hookimpl`:

    from apex_build.hookspecs import PolicySpec, hookimpl

    @hookimpl
    def apex_policies() -> list[PolicySpec]:
        return [PolicySpec(name="mine", template=Path(__file__).with_name("mine.jinja"), base_type="Q4_K_M")]

Hooks give data and do no work until they are asked. Each hook function is called on its own, so that an error in it can be
reported under its plugin's name; pluggy's wrappers have no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pluggy

if TYPE_CHECKING:
    import click

hookspec = pluggy.HookspecMarker("apex_build")
hookimpl = pluggy.HookimplMarker("apex_build")


@dataclass(frozen=True)
class Parameter:
    """What a user may set with `--set name=value`. A template sees it as a variable, with `_` for each dot of its name.

    kind 'type' takes a GGUF tensor type (Q4_K), 'int' a whole number >= 0, 'flag' yes or no, 'text' anything.
    `words` are further values of a 'type' parameter, to which the template gives a meaning of its own.
    """

    default: str | int | bool
    kind: Literal["type", "int", "flag", "text"] = "type"
    help: str = ""
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class PolicySpec:
    """A named way to give each tensor a type.

    The template renders `pattern=type`, one a line; `base_type` is llama-quantize's own type argument, whose mixture decides
    for every tensor that no line names (`{name}` stands for the value of a parameter); `calibrated` says that the policy is
    meant for use with an imatrix.
    """

    name: str
    template: Path
    base_type: str
    calibrated: bool = False
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    description: str = ""
    # filled in when the plugin is loaded: its name, and where the templates of all plugins lie, for include and extends
    plugin: str = ""
    library: Mapping[str, tuple[Path, ...]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Document:
    """One piece of calibration material: a conversation (`messages`, as chat templates take them) or raw `text`, never both."""

    domain: str
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    origin: str = ""  # file and line, or row: for messages about it


@dataclass(frozen=True)
class Source:
    """Where documents come from. `read` gets the options that a calibration set gives it and the folder of that set's file."""

    name: str
    read: Callable[[Mapping[str, Any], Path], Iterator[Document]]


@hookspec
def apex_policies() -> list[PolicySpec]:  # type: ignore[empty-body]
    """Named policies."""


@hookspec
def apex_tensor_roles(architecture: str) -> Callable[[str], str | None] | None:
    """The role of each tensor name of this architecture, or None for an architecture the plugin does not know.

    The function gives None for a tensor it does not know; the next plugin is asked then, the last loaded first.
    """


@hookspec
def apex_calibration_sources() -> list[Source]:  # type: ignore[empty-body]
    """Sources of calibration documents, by name."""


@hookspec
def apex_commands() -> list[click.Command]:  # type: ignore[empty-body]
    """Further verbs for the command line."""
