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

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from apex_build.parameters import Parameter as Parameter

if TYPE_CHECKING:
    import click

    from apex_build.evaluation.task import Task

hookspec = pluggy.HookspecMarker("apex_build")
hookimpl = pluggy.HookimplMarker("apex_build")


@dataclass(frozen=True)
class PolicySpec:
    """A named way to give each tensor a type.

    The template renders `pattern=type`, one a line; `base_type` is llama-quantize's own type argument, whose mixture decides
    for every tensor that no line names (`{name}` stands for the value of a parameter); `calibrated` says that the policy is
    meant for use with an imatrix; `fit` that a tensor whose rows cannot hold its type gets the nearest that they can, instead of
    a refusal; `needs` what a model must have: 'head'.

    A line `# warning: TEXT` of the rendered rules is shown to the user.
    """

    name: str
    template: Path
    base_type: str
    calibrated: bool = False
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    description: str = ""
    fit: bool = False
    needs: tuple[str, ...] = ()
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
    """Where documents come from. `read` gets the options that a calibration set gives it and the folder of that set's file.

    `options`: their names, so that others are refused; None for a source that takes any.
    """

    name: str
    read: Callable[[Mapping[str, Any], Path], Iterator[Document]]
    options: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Figure:
    """One number about a model file. `low` and `high` bound its 95 % interval, in the unit of `value`.

    `name` is for scripts, dotted and stable: `depth1.agreement`. `domain` is that of the text or prompts it was taken over, empty
    for all of them. `n` counts what it was taken over: positions, prompts, tasks. Where `value` is None, `note` says why.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    unit: str = ""  # %, nats, tokens/s, ...
    n: int | None = None
    domain: str = ""
    note: str = ""


@dataclass(frozen=True)
class Evaluator:
    """A named way to measure a model file.

    `needs` is what it cannot go without, of 'text', 'prompts', 'reference', 'head' and 'data' (a file that the user gives under the
    evaluator's name); `uses` what it takes where it is given. `timed`: its figures are times, so it never shares the machine and
    its results hold for one machine only. Parameters are set with `--set NAME.parameter=value`.
    """

    name: str
    evaluate: Callable[[Task], Sequence[Figure]]
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    timed: bool = False
    description: str = ""
    # what stands for it in a table of a line a file: the name of a figure, or a pattern (greedy.n*.acceptance), and its heading;
    # of those with one heading the first that is there counts. Without any it is the evaluator's first figure
    headline: tuple[tuple[str, str], ...] = ()
    # for the time left: the tasks that it will report (Step.task), in order, and about how many tokens the model reads in each (one
    # that it writes counts as apex_build.evaluation.pace.GENERATED of them)
    runs: Callable[[Task], Mapping[str, float]] | None = None
    version: int = 1  # to be raised when it gives other figures for the same: what an earlier one recorded is measured again
    # filled in when the plugin is loaded: its name, and what tells its code from another (empty for a built-in one)
    plugin: str = ""
    code: str = ""


@dataclass(frozen=True)
class GpuTarget:
    """A GPU, by a name that people know it under, and what the CUDA compiler is asked for.

    `architecture` is a value of CMAKE_CUDA_ARCHITECTURES (121a-real); `memory_gib` what its driver reports, rounded, 0 where that
    is not known; `minimum_cuda` the first CUDA toolkit that knows the architecture (12.9), empty where that is not known.
    `groups`: further names, each of which stands for all targets that have it (all-common). `aliases`: what else it is called, such
    as nvidia-smi's name of it (GB10); 'NVIDIA', 'GeForce' and the like need not be in it.
    """

    name: str
    architecture: str
    memory_gib: float
    description: str
    minimum_cuda: str
    groups: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


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
def apex_gpu_targets() -> list[GpuTarget]:  # type: ignore[empty-body]
    """GPUs to build for, by name."""


@hookspec
def apex_commands() -> list[click.Command]:  # type: ignore[empty-body]
    """Further verbs for the command line."""


@hookspec
def apex_evaluators() -> list[Evaluator]:  # type: ignore[empty-body]
    """Evaluators, by name. What they are given is an `apex_build.evaluation.task.Task`."""
