"""Render a policy for a model, and match its rules with tensors. Both happen in a child process with limits
(sandbox.py).
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_build.errors import TemplateFailed, TemplateUnsafe
from apex_build.gguf_model.catalogue import Model, Tensor
from apex_build.gguf_model.imatrix import LeastTokens
from apex_build.hookspecs import PolicySpec
from apex_build.loaded import library_of
from apex_build.native import sandbox_child
from apex_build.policy import sandbox
from apex_build.printable import printable

_WALL_SECONDS = 60.0
_EXACT = re.compile(r"\^((?:[0-9A-Za-z_-]|\\[^0-9A-Za-z_])+)\$")  # see sandbox.exactly


@dataclass(frozen=True)
class Rendered:
    """A rendered template. `lines`: each with where it was rendered, `FILE:LINE`; `idle`: the user's parameters
    without effect: with any other value, the policy renders the same rules.
    """

    lines: list[tuple[str, str]]
    idle: list[str]


def render_each(
    policy: PolicySpec,
    wanted: Sequence[tuple[Mapping[str, Any], Collection[str]]],
    model: Model,
    quantizable: Collection[str],
    tokens: LeastTokens | None = None,
) -> list[Rendered]:
    """The policy rendered with each of these parameters (`parameters.resolve`), with the names of those that the
    user gave.

    `tokens`: the imatrix's, if there is one. All in one child process. Raises TemplateFailed
    and TemplateUnsafe, naming the template's file and line.
    """
    assert policy.template is not None, "a policy that computes has nothing to render"
    source = "".join(file.read_text("utf-8") for file in template_files(policy))
    tried = [_tried(policy, values, names, source) for values, names in wanted]
    renders = [
        {
            "parameters": {name.replace(".", "_"): value for name, value in values.items()},
            "variants": [{name.replace(".", "_"): other} for name, other in others],
        }
        for (values, _), others in zip(wanted, tried, strict=True)
    ]
    request = {**_request(policy, model, quantizable, tokens), "renders": renders}
    answer = _run(request, f"template of policy '{policy.name}', {policy.template}")
    literal: dict[str, dict[str, list[int]]] = {}
    found = []
    for rendered, others in zip(answer["rendered"], tried, strict=True):
        if "error" in rendered:
            error = TemplateUnsafe if rendered["error"] == "unsafe" else TemplateFailed
            where = f"{rendered['file']}:{rendered['line']}" if rendered["file"] else str(policy.template)
            raise error(f"template of policy '{policy.name}', {where}: {printable(rendered['message'])}")
        for file in {file for file, _ in rendered["places"] if file} - literal.keys():
            literal[file] = _lines_of(Path(file))
        lines = rendered["text"].split("\n")
        placed = [
            (line, _where(line, file, at, literal)) for line, (file, at) in zip(lines, rendered["places"], strict=False)
        ]
        names = [name for name, _ in others] if len(rendered["same"]) == len(others) else []
        reached = {name for name, same in zip(names, rendered["same"], strict=False) if not same}
        found.append(Rendered(placed, [name for name in dict.fromkeys(names) if name not in reached]))
    return found


def render(
    policy: PolicySpec, values: Mapping[str, Any], model: Model, quantizable: Collection[str]
) -> list[tuple[str, str]]:
    """Only the lines, of one rendering."""
    return render_each(policy, [(values, ())], model, quantizable)[0].lines


def template_files(policy: PolicySpec) -> Iterator[Path]:
    """A policy's template, and those that it may include."""
    if policy.template is not None:
        yield policy.template
    for folders in library_of(policy)[1].values():
        for folder in folders:
            yield from folder.glob("*.jinja")


def _tried(policy: PolicySpec, values: Mapping[str, Any], names: Iterable[str], source: str) -> list[tuple[str, Any]]:
    """For parameters that may have no effect, other values to try, each with the parameter's name.

    Not for texts, of which a template may accept few, nor for parameters that the template does not read
    (draft_loss).
    """
    return [
        (name, other)
        for name in names
        if name in policy.parameters and re.search(rf"\b{name.replace('.', '_')}\b", source)
        for other in _others(policy.parameters[name].kind, values[name])
    ]


def _others(kind: str, value: Any) -> tuple[Any, ...]:
    """Values of which at least one changes the rules, if any can: for a number of layers, minimum and maximum + 1."""
    if kind == "type":
        return ("F32" if value != "F32" else "Q8_0",)
    if kind == "flag":
        return (not value,)
    return (0, 1 << 19) if kind in ("int", "number") else ()


def _request(
    policy: PolicySpec, model: Model, quantizable: Collection[str], tokens: LeastTokens | None
) -> dict[str, Any]:
    assert policy.template is not None
    folder = policy.template.resolve().parent
    own, folders = library_of(policy)
    library = {plugin: [str(path) for path in paths] for plugin, paths in folders.items()}
    library[own] = [str(folder), *(path for path in library.get(own, ()) if path != str(folder))]
    seen = catalogue(model, quantizable, tokens)
    return {"library": library, "template": f"{own}/{policy.template.name}", "catalogue": seen}


def catalogue(model: Model, quantizable: Collection[str], tokens: LeastTokens | None = None) -> dict[str, Any]:
    """What a template gets about a model, as JSON: plain values only."""
    return {
        "model": {name: getattr(model, name) for name in sandbox.ModelView.__dataclass_fields__},
        "tensors": [
            {
                "name": tensor.name,
                "layer": tensor.layer,
                "role": tensor.role,
                "shape": tensor.shape,
                "type": tensor.type,
                "depth": depth(model, tensor),
                "draft_head": tensor.draft_head,
                "quantizable": tensor.name in quantizable,
                "tokens_min": tokens.by_name.get(tensor.name, 0) if tokens and tokens.by_name else None,
            }
            for tensor in model.tensors
        ],
    }


def depth(model: Model, tensor: Tensor) -> int | None:
    """Layers between a tensor and the nearest end of the trunk, 0 in the first and the last layer. None outside its
    blocks.
    """
    if tensor.layer is None or tensor.draft_head:
        return None
    return min(tensor.layer, model.trunk_layers - 1 - tensor.layer)


Places = list[tuple[int, int, int]]


def find(patterns: Iterable[str], names: Sequence[str]) -> dict[str, Places]:
    """For each pattern, (index of the name, start, end) in each name that it is found in. The patterns must compile.

    Patterns made by `exactly` are looked up directly: tiers need nothing else, and no process.
    """
    places: dict[str, Places] = {}
    numbers = {name: index for index, name in enumerate(names)}
    others: list[str] = []
    for pattern in dict.fromkeys(patterns):
        if (name := only_name(pattern)) is not None:
            places[pattern] = [(numbers[name], 0, len(name))] if name in numbers else []
        else:
            others.append(pattern)
    if others:
        answer = _run({"patterns": others, "names": names}, "the patterns of the rules")
        if "error" in answer:
            raise TemplateFailed(f"the patterns of the rules: {answer['message']}")
        found = ([(index, start, end) for index, start, end in each] for each in answer["found"])
        places |= dict(zip(others, found, strict=True))
    return places


def only_name(pattern: str) -> str | None:
    """The one name that a pattern made by `exactly` matches; None for any other pattern."""
    literal = _EXACT.fullmatch(pattern)
    return re.sub(r"\\(.)", r"\1", literal[1]) if literal else None


def _run(request: Mapping[str, Any], about: str) -> dict[str, Any]:
    try:
        return sandbox_child.ask(sandbox.__name__, request, wall_seconds=_WALL_SECONDS)
    except sandbox_child.OutOfBounds as error:
        raise TemplateFailed(f"{about}: {printable(str(error))}") from None


def _lines_of(file: Path) -> dict[str, list[int]]:
    """Each line of a template, stripped, and its line numbers."""
    found: dict[str, list[int]] = {}
    for number, line in enumerate(file.read_text("utf-8").split("\n"), 1):
        found.setdefault(line.strip(), []).append(number)
    return found


def _where(line: str, file: str, number: int, literal: Mapping[str, Mapping[str, Sequence[int]]]) -> str:
    """Jinja knows the statement a line came from; for a line that is in the template literally, its own number is
    better.
    """
    if line.strip() and file:
        numbers = literal[file].get(line.strip(), ())
        at = bisect.bisect_left(numbers, number)
        number = numbers[at] if at < len(numbers) else number
    return f"{file}:{number}"
