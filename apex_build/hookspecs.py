"""The hooks of the plugin API, and the data that crosses them. Plugins import both from `apex_build.plugin_api`.

A plugin is a folder with a `plugin.py`, or a module that a package names in the entry-point group `apex_build`. It
writes a function of a hook's name, marked with `@hookimpl`:

    from apex_build.plugin_api import PolicySpec, hookimpl

    @hookimpl
    def apex_policies() -> list[PolicySpec]:
        return [PolicySpec(name="mine", template=Path(__file__).with_name("mine.jinja"), base_type="Q4_K_M")]

Hooks give data and do no work until they are asked. Each hook function is called on its own, so that an error in it can
be reported under its plugin's name; pluggy's wrappers have no effect. docs/plugins.md has an example of each hook.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pluggy

from apex_build.parameters import Parameter as Parameter

if TYPE_CHECKING:
    import click

    from apex_build.evaluation.task import Task
    from apex_build.gguf_model.catalogue import Model, Tensor
    from apex_build.native.ggml import Ggml
    from apex_build.parameters import Value

hookspec = pluggy.HookspecMarker("apex_build")
hookimpl = pluggy.HookimplMarker("apex_build")

# The version of this API. A plugin says which it was made for with a line `APEX_API = 3`; without one it was made for
# 1. It grows with each addition that a plugin may rely on; OLDEST_API is raised where something that plugins rely on is
# taken away.
API_VERSION = 3
OLDEST_API = 1


@dataclass(frozen=True)
class Role:
    """What a tensor is for. Policies assign types by role; `ROLES` lists the built-in ones, `apex_roles` adds more."""

    name: str
    description: str


ROLES = (
    Role("routed", "experts that a router chooses for each token"),
    Role("shared", "an expert beside the routed ones that every token passes"),
    Role("dense", "feed-forward that every token passes"),
    Role("attention", "attention: queries, keys, values, output"),
    Role("ssm", "what stands in attention's place: state-space models, delta nets, short convolutions"),
    Role("router", "the choice among experts"),
    Role("conv", "kernels of short convolutions"),
    Role("norm", "normalization"),
    Role("nextn", "parts that only a draft head has: joining token and hidden state, its own embeddings and output"),
    Role("embedding", "rows that are looked up by token or position"),
    Role("output", "the output matrix"),
    Role("vision", "parts that see: towers and projectors"),
    Role("audio", "parts that hear or speak"),
    Role("other", "none of these: biases, scalars, and what no plugin knows"),
)


@dataclass(frozen=True)
class Part:
    """A tensor's role, and whether it belongs to the draft head, where its block does not tell.

    Without this, the draft head is the blocks after the trunk's (`nextn_predict_layers` of them), as llama.cpp lays it
    out.
    """

    role: str
    draft_head: bool


@dataclass(frozen=True)
class PolicyTask:
    """What a policy that computes is given. `parameters`: all of them, with their values; `quantizable`: the names of
    the tensors that llama-quantize converts, all others stay as they are; `calibrated`: there will be an imatrix;
    `other_bytes`: what the file takes beside its tensors' data, at most (header, metadata, vocabulary).
    """

    policy: str
    model: Model
    parameters: Mapping[str, Value]
    quantizable: Collection[str]
    ggml: Ggml
    calibrated: bool = True
    other_bytes: int = 0
    build: str = ""  # the identity of the tools

    def n_bytes(self, tensor: Tensor, type_name: str) -> int:
        """Bytes of the tensor's data in this type. Raises ShapeUnfit."""
        if type_name == tensor.type:
            return tensor.n_bytes
        return tensor.n_elements // tensor.shape[0] * self.ggml.row_bytes(type_name, tensor.shape[0])


@dataclass(frozen=True)
class Computed:
    """What a policy computed: a type for each tensor by its name; those that are not named are left to the base type.

    `warnings` are for the user; `predicted` has figures that the file is expected to have, by the names that
    evaluators give them (kld.mean), shown with the plan.
    """

    types: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    predicted: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PolicySpec:
    """A named way to give each tensor a type, by a template or by a function.

    The template renders `pattern=type`, one a line; `compute` gives the types itself. `base_type` is llama-quantize's
    own type argument, whose mixture decides for every tensor that is not named (`{name}` stands for the value of a
    parameter); `calibrated` says that the policy is meant for use with an imatrix; `fit` that a tensor whose rows
    cannot hold its type gets the nearest that they can, instead of a refusal; `needs` what a model must have: 'head';
    `otherwise` the policy to take for a model without it. `sweeps`: apex sweep takes this policy where no other is
    asked for. `predict`: what the policy expects of a file with these types, whoever chose them; apex plan --compare
    shows it of all plans.

    A line `# warning: TEXT` of the rendered rules is shown to the user.
    """

    name: str
    template: Path | None
    base_type: str
    calibrated: bool = False
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    description: str = ""
    fit: bool = False
    needs: tuple[str, ...] = ()
    otherwise: str = ""
    sweeps: bool = False
    compute: Callable[[PolicyTask], Computed] | None = None
    predict: Callable[[PolicyTask, Mapping[str, str]], Mapping[str, float]] | None = None


@dataclass(frozen=True)
class Document:
    """One piece of calibration material: a conversation (`messages`, as chat templates take them) or raw `text`, never
    both.
    """

    domain: str
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    origin: str = ""  # file and line, or row: for messages about it


@dataclass(frozen=True)
class Source:
    """Where documents come from. `read` gets the options that a calibration set gives it and the folder of that set's
    file.

    `options`: their names, so that others are refused; None for a source that takes any.
    """

    name: str
    read: Callable[[Mapping[str, Any], Path], Iterator[Document]]
    options: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Figure:
    """One number about a model file. `low` and `high` bound its 95 % interval, in the unit of `value`.

    `name` is for scripts, dotted and stable: `depth1.agreement`. `domain` is the domain of its text or prompts, empty
    for all of them. `n` counts what it was taken over: positions, prompts, tasks. Where `value` is None, `note` says
    why.

    `better` says whether a lower or a higher value is the better one; without it nothing is called a gain or a loss,
    and a sweep has no knee. `paired` names the figure that is this one's paired difference from the reference (file
    minus reference, on the same positions), by custom `NAME.difference`; a figure that is such a difference itself, as
    a divergence is, names itself. `label` is the figure in words, for a plot; of an evaluator's figures a sweep shows
    the first one with `plot`.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    unit: str = ""  # %, nats, tokens/s, ...
    n: int | None = None
    domain: str = ""
    note: str = ""
    better: Literal["", "lower", "higher"] = ""
    paired: str = ""
    label: str = ""
    plot: bool = False


@dataclass(frozen=True)
class Service:
    """What apex takes an evaluator for by itself, without its being asked for by name.

    purpose   taken by                                        figures that it must name
    sweep     apex sweep, where no evaluator is asked for     -
    head      the same, where the files differ in the         -
              draft head alone
    auto      a parameter at 'auto' (Parameter.measured)      agreement (in %), tokens (for each step of the trunk)
    check     apex check                                      perplexity; or acceptance (in %),
    and perhaps same_text (in %),
                                                              drafted and accepted (tokens)

    `figures`: meaning -> name of the figure; `settings`: its parameters for the purpose. For 'auto', apex also sets the
    parameters `rows` and `chunks` of an evaluator that has them.
    """

    purpose: Literal["sweep", "head", "auto", "check"]
    figures: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluator:
    """A named way to measure a model file.

    `needs` is what it cannot go without, of 'text', 'prompts', 'reference', 'head' and 'data' (a file that the user
    gives under the evaluator's name); `uses` what it takes where it is given. `timed`: its figures are times, so it
    never shares the machine and its results hold for one machine only. Parameters are set with `--set
    NAME.parameter=value`.
    """

    name: str
    evaluate: Callable[[Task], Sequence[Figure]]
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    timed: bool = False
    description: str = ""
    # what stands for it in a table of a line a file: the name of a figure, or a pattern (greedy.n*.acceptance), and its
    # heading; of those with one heading the first that is there counts. Without any it is the evaluator's first figure
    headline: tuple[tuple[str, str], ...] = ()
    # for the time left: the tasks that it will report (Step.task), in order, and about how many tokens the model reads
    # in each (one that it writes counts as GENERATED of them)
    runs: Callable[[Task], Mapping[str, float]] | None = None
    version: int = (
        1  # to be raised when it gives other figures for the same: what an earlier one recorded is measured again
    )
    serves: tuple[Service, ...] = ()


@dataclass(frozen=True)
class GpuTarget:
    """A GPU, by a name that people know it under, and what the CUDA compiler is asked for.

    `architecture` is a value of CMAKE_CUDA_ARCHITECTURES (121a-real); `memory_gib` what its driver reports, rounded, 0
    where that is not known; `minimum_cuda` the first CUDA toolkit that knows the architecture (12.9), empty where that
    is not known. `groups`: further names, each of which stands for all targets that have it (all-common). `aliases`:
    what else it is called, such as nvidia-smi's name of it (GB10); 'NVIDIA', 'GeForce' and the like need not be in it.
    `shares_memory`: its memory is the machine's.
    """

    name: str
    architecture: str
    memory_gib: float
    description: str
    minimum_cuda: str
    groups: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    shares_memory: bool = False


@hookspec
def apex_policies() -> list[PolicySpec]:  # type: ignore[empty-body]
    """Named policies."""


@hookspec
def apex_roles() -> list[Role]:  # type: ignore[empty-body]
    """Roles beside `ROLES`, for policies that know them; every other policy leaves their tensors to its base type's
    mixture.
    """


@hookspec
def apex_tensor_roles(architecture: str) -> Callable[[str], str | Part | None] | None:
    """The role of each tensor name of this architecture, or None for an architecture the plugin does not know.

    The function gives None for a tensor it does not know; the next plugin is asked then, the last loaded first. A role
    is one of `ROLES` or of `apex_roles`; a `Part` also says whether the tensor belongs to the draft head.
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
    """Evaluators, by name. What they are given is a `Task`."""
