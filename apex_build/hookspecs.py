"""The hooks of the plugin API, and the data that crosses them. Plugins import both from `apex_build.plugin_api`.

A plugin is a folder with a `plugin.py`, or a module that a package names in the entry-point group `apex_build`. It
writes a function of a hook's name, marked with `@hookimpl`:

    from apex_build.plugin_api import PolicySpec, hookimpl

    @hookimpl
    def apex_policies() -> list[PolicySpec]:
        return [PolicySpec(name="mine", template=Path(__file__).with_name("mine.jinja"), base_type="Q4_K_M")]

Hooks return data and do no work until it is used. Each hook function is called on its own, so that an error in it can
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
# 1. It grows with each addition that a plugin may rely on; OLDEST_API grows when something that plugins rely on is
# removed.
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
    """A tensor's role, and whether it belongs to the draft head, if its block does not show that.

    Without this, the draft head is the blocks after the trunk's (`nextn_predict_layers` of them), as llama.cpp lays it
    out.
    """

    role: str
    draft_head: bool


@dataclass(frozen=True)
class PolicyTask:
    """Input of a policy that computes. `parameters`: all of them, with their values; `quantizable`: names of the
    tensors that llama-quantize converts, all others are copied; `calibrated`: there will be an imatrix;
    `other_bytes`: an upper bound of the file's bytes besides tensor data (header, metadata, vocabulary).
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
    """Output of a policy that computes: a type for each tensor by name; tensors not named get the base type.

    `warnings` are for the user; `predicted`: figures expected of the file, by the evaluators' names (kld.mean),
    shown with the plan.
    """

    types: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    predicted: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PolicySpec:
    """A named way to assign each tensor a type, by a template or a function.

    The template renders `pattern=type`, one a line; `compute` gives the types itself. `base_type` is llama-quantize's
    own type argument, whose mixture decides for every tensor that is not named (`{name}` stands for the value of a
    parameter); `calibrated`: the policy is meant for use with an imatrix; `fit`: a tensor whose rows cannot hold its
    type gets the nearest type that they can, instead of being refused; `needs`: what a model must have: 'head';
    `otherwise`: the policy to use for a model without it. `sweeps`: the default policy of apex sweep. `predict`: what
    the policy expects of a file with any given types; apex plan --compare shows it for all plans.

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
    """A source of documents. `read` gets the options from the calibration set and the folder of the set's file.

    `options`: the names it accepts, others are refused; None accepts any. `pin`: for a source whose data may change:
    gets the same two, and returns the options to add so that it reads the same tomorrow.
    """

    name: str
    read: Callable[[Mapping[str, Any], Path], Iterator[Document]]
    options: tuple[str, ...] | None = None
    pin: Callable[[Mapping[str, Any], Path], Mapping[str, str]] | None = None


@dataclass(frozen=True)
class Figure:
    """One number about a model file. `low` and `high` bound its 95 % interval, in the unit of `value`.

    `name` is for scripts, dotted and stable: `depth1.agreement`. `domain` is the domain of its text or prompts, empty
    for all of them. `n` counts the positions, prompts or tasks that it is over. If `value` is None, `note` says why.

    `better` says whether lower or higher values are better; without it nothing counts as a gain or a loss, and a
    sweep has no knee. `paired` names the figure that is this one's paired difference from the reference (file
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
    """What apex uses an evaluator for by default, without being asked for it by name.

    purpose   used by                                         figures that it must name
    sweep     apex sweep, if no evaluator is asked for        -
    head      the same, if the files differ in the            -
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

    `needs` lists required inputs, of 'text', 'prompts', 'reference', 'head' and 'data' (a file that the user gives
    under the evaluator's name); `uses` lists optional ones. `timed`: its figures are times, so it
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
    # its columns in the table of one line a file: the name of a figure, or a pattern (greedy.n*.acceptance), and a
    # heading; of those with the same heading the first that exists is shown. Empty: the evaluator's first figure
    headline: tuple[tuple[str, str], ...] = ()
    # for the time left: the tasks that it will report (Step.task), in order, and about how many tokens the model reads
    # in each (one that it writes counts as GENERATED of them)
    runs: Callable[[Task], Mapping[str, float]] | None = None
    version: int = (
        # raise it when the figures for the same input change: results recorded by an earlier version are measured again
        1
    )
    serves: tuple[Service, ...] = ()


@dataclass(frozen=True)
class GpuTarget:
    """A GPU, by a common name, and what to ask the CUDA compiler for.

    `architecture` is a value of CMAKE_CUDA_ARCHITECTURES (121a-real); `memory_gib` what its driver reports, rounded, or
    0 if unknown; `minimum_cuda` the first CUDA toolkit that knows the architecture (12.9), or empty if unknown.
    `groups`: further names, each of which stands for all targets that have it (all-common). `aliases`: other names,
    such as nvidia-smi's (GB10); 'NVIDIA', 'GeForce' and the like can be left out. `shares_memory`: its memory is the
    machine's.
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
    """Roles in addition to `ROLES`, for policies that know them; other policies leave their tensors to the base
    type's mixture.
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
    """Evaluators, by name. They get a `Task`."""
