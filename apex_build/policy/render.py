"""A policy and a model give the lines of the rules; the rules find tensors. Both in a child process with limits (sandbox.py)."""

from __future__ import annotations

import bisect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from apex_build.errors import TemplateFailed, TemplateUnsafe
from apex_build.gguf_model.catalogue import Model, Tensor
from apex_build.hookspecs import PolicySpec
from apex_build.loaded import library_of
from apex_build.native import sandbox_child
from apex_build.policy import sandbox
from apex_build.printable import printable

_WALL_SECONDS = 60.0


def render(policy: PolicySpec, values: Mapping[str, Any], model: Model, quantizable: Collection[str]) -> list[tuple[str, str]]:
    """Lines of the rendered template, each with where it was rendered: `FILE:LINE`.

    `values`: the parameters (`parameters.resolve`). Raises TemplateFailed and TemplateUnsafe, naming the template's file and line.
    """
    answer = _run(_request(policy, values, model, quantizable), about=f"template of policy '{policy.name}', {policy.template}")
    if "error" in answer:
        error = TemplateUnsafe if answer["error"] == "unsafe" else TemplateFailed
        where = f"{answer['file']}:{answer['line']}" if answer["file"] else str(policy.template)
        raise error(f"template of policy '{policy.name}', {where}: {printable(answer['message'])}")
    literal = {file: _lines_of(Path(file)) for file in {file for file, _ in answer["places"] if file}}
    lines = answer["text"].split("\n")
    return [(line, _where(line, file, number, literal)) for line, (file, number) in zip(lines, answer["places"], strict=False)]


def template_files(policy: PolicySpec) -> Iterator[Path]:
    """A policy's template, and those that it may include."""
    yield policy.template
    for folders in library_of(policy)[1].values():
        for folder in folders:
            yield from folder.glob("*.jinja")


def idle_settings(
    policy: PolicySpec, values: Mapping[str, Any], model: Model, quantizable: Collection[str], names: Iterable[str]
) -> list[str]:
    """Those of these parameters whose value decides for no tensor: with any other value, the policy renders the same rules.

    A text, which may have few values that a template takes, is not tried, nor what the template does not read at all (draft_loss).
    """
    source = "".join(file.read_text("utf-8") for file in template_files(policy))
    tried = [
        (name, {name.replace(".", "_"): other})
        for name in names
        if name in policy.parameters and re.search(rf"\b{name.replace('.', '_')}\b", source)
        for other in _others(policy.parameters[name].kind, values[name])
    ]
    if not tried:
        return []
    request = {**_request(policy, values, model, quantizable), "variants": [variant for _, variant in tried]}
    answer = _run(request, about=f"template of policy '{policy.name}', {policy.template}")
    reached = {name for (name, _), same in zip(tried, answer.get("same", ()), strict=False) if not same}
    return [name for name in dict.fromkeys(name for name, _ in tried) if name not in reached] if "same" in answer else []


def _others(kind: str, value: Any) -> tuple[Any, ...]:
    """Values of which at least one gives other rules, if any does: a number of layers has its least and one over all."""
    if kind == "type":
        return ("F32" if value != "F32" else "Q8_0",)
    if kind == "flag":
        return (not value,)
    return (0, 1 << 19) if kind in ("int", "number") else ()


def _request(policy: PolicySpec, values: Mapping[str, Any], model: Model, quantizable: Collection[str]) -> dict[str, Any]:
    folder = policy.template.resolve().parent
    own, folders = library_of(policy)
    library = {plugin: [str(path) for path in paths] for plugin, paths in folders.items()}
    library[own] = [str(folder), *(path for path in library.get(own, ()) if path != str(folder))]
    return {
        "library": library,
        "template": f"{own}/{policy.template.name}",
        "catalogue": catalogue(model, quantizable),
        "parameters": {name.replace(".", "_"): value for name, value in values.items()},
    }


def catalogue(model: Model, quantizable: Collection[str]) -> dict[str, Any]:
    """What a template is given of a model, as JSON: plain values only."""
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
            }
            for tensor in model.tensors
        ],
    }


def depth(model: Model, tensor: Tensor) -> int | None:
    """Layers between a tensor and the nearest end of the trunk, 0 in the first and the last layer. None outside its blocks."""
    if tensor.layer is None or tensor.draft_head:
        return None
    return min(tensor.layer, model.trunk_layers - 1 - tensor.layer)


def find(patterns: Sequence[str], names: Sequence[str]) -> list[list[tuple[int, int, int]]]:
    """For each pattern, (index of the name, start, end) in each name that it is found in. The patterns must compile."""
    answer = _run({"patterns": patterns, "names": names}, about="the patterns of the rules")
    if "error" in answer:
        raise TemplateFailed(f"the patterns of the rules: {answer['message']}")
    return [[(index, start, end) for index, start, end in places] for places in answer["found"]]


def _run(request: Mapping[str, Any], about: str) -> dict[str, Any]:
    try:
        return sandbox_child.ask(sandbox.__name__, request, wall_seconds=_WALL_SECONDS)
    except sandbox_child.OutOfBounds as error:
        raise TemplateFailed(f"{about}: {printable(str(error))}") from None


def _lines_of(file: Path) -> dict[str, list[int]]:
    """Each line of a template without the blanks around it, and the numbers it stands at."""
    found: dict[str, list[int]] = {}
    for number, line in enumerate(file.read_text("utf-8").split("\n"), 1):
        found.setdefault(line.strip(), []).append(number)
    return found


def _where(line: str, file: str, number: int, literal: Mapping[str, Mapping[str, Sequence[int]]]) -> str:
    """Jinja knows the statement a line came from; for a line that stands in the template as it is, its own number is better."""
    if line.strip() and file:
        numbers = literal[file].get(line.strip(), ())
        at = bisect.bisect_left(numbers, number)
        number = numbers[at] if at < len(numbers) else number
    return f"{file}:{number}"
