"""Runs a policy's template and patterns in a child process: `python -m apex_build.policy.sandbox`, see
sandbox_child.py.

A template is untrusted, and so are the patterns that it renders: a regular expression can backtrack for years.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import FrameType, GeneratorType
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from apex_build.native import sandbox_child

CPU_SECONDS = 5
OUTPUT_CHARACTERS = 1 << 22


@dataclass(frozen=True)
class ModelView:
    """What a template sees as `model`."""

    name: str
    architecture: str
    trunk_layers: int
    head_layers: int
    n_expert: int
    n_expert_used: int


@dataclass(frozen=True)
class TensorView:
    """What a template sees of a tensor. `depth`: layers between it and the nearest end of the trunk, 0 for the first
    and the last layer; None outside the trunk's blocks. `quantizable`: llama-quantize would change its type. `shape`:
    row length first. `tokens_min`: tokens of the calibration text that its least seen matrix (expert) saw, 0 where
    there is no data of it; None without an imatrix.
    """

    name: str
    layer: int | None
    role: str
    shape: tuple[int, ...]
    type: str
    depth: int | None
    draft_head: bool
    quantizable: bool
    tokens_min: int | None = None


@dataclass(frozen=True)
class LayerView:
    """What a template sees of a block: its number, depth (None in the draft head), and tensors."""

    number: int
    depth: int | None
    draft_head: bool
    tensors: tuple[TensorView, ...]


class _Library(jinja2.BaseLoader):
    """Templates by `plugin/file`, from the template folders of the plugins' policies; nothing outside those."""

    def __init__(self, folders: Mapping[str, Sequence[str]]) -> None:
        self._folders = {plugin: [Path(folder).resolve() for folder in given] for plugin, given in folders.items()}

    def get_source(self, environment: jinja2.Environment, template: str) -> tuple[str, str, Callable[[], bool]]:
        plugin, _, name = template.partition("/")
        parts = PurePosixPath(name).parts
        if ".." in parts or "\\" in name or "\0" in name or name.startswith("/") or plugin in (".", "..", ""):
            raise SecurityError(f"a template may include templates of the policies only, not '{template}'")
        for folder in self._folders.get(plugin, ()):
            path = folder.joinpath(*parts).resolve() if parts else folder
            if not path.is_relative_to(folder):
                raise SecurityError(f"'{template}' is a link that leads out of its plugin")
            if path.is_file() and path.suffix == ".jinja":
                return path.read_text(encoding="utf-8"), str(path), lambda: True
        known = ", ".join(self.list_templates()) or "none"
        raise jinja2.TemplateNotFound(template, f"there is no template '{template}'; there are: {known}")

    def list_templates(self) -> list[str]:
        found = (
            (plugin, path)
            for plugin, given in self._folders.items()
            for folder in given
            for path in folder.glob("*.jinja")
        )
        return sorted(f"{plugin}/{path.name}" for plugin, path in found)


class _Environment(ImmutableSandboxedEnvironment):
    def join_path(self, template: str, parent: str) -> str:
        """A name without a plugin is a file beside the including template."""
        return template if "/" in template else f"{parent.rpartition('/')[0]}/{template}"

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            # the sandbox itself returns an undefined value here, which some templates hide (`is defined`,
            # `default`): raise instead
            raise SecurityError(f"access to attribute '{attr}' of a '{type(obj).__name__}' is not allowed")
        return True


def exactly(name: str) -> str:
    """A pattern that matches this tensor name and no other: `^blk\\.3\\.attn_q\\.weight$`."""
    return "^" + re.sub(r"([^0-9A-Za-z_-])", r"\\\1", str(name)) + "$"


def environment(library: Mapping[str, Sequence[str]]) -> ImmutableSandboxedEnvironment:
    made = _Environment(
        loader=_Library(library),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the output is not HTML
    )
    made.filters["exactly"] = exactly
    for name in ("lipsum", "cycler", "joiner"):  # objects that rules do not need
        del made.globals[name]
    return made


def render(made: jinja2.Environment, template: str, context: Mapping[str, Any]) -> tuple[str, list[tuple[str, int]]]:
    """The rendered text, and for each of its lines the file and line of the template statement that ended it."""
    text: list[str] = []
    places: list[tuple[str, int]] = []
    length = 0
    stream = made.get_template(template).generate(context)
    for chunk in filter(None, stream):
        length += len(chunk)
        if length > OUTPUT_CHARACTERS:
            raise TooMuch(f"it renders more than {OUTPUT_CHARACTERS >> 20} MiB")
        place = _place(stream)
        places += [place] * chunk.count("\n")
        text.append(chunk)
    if text:
        places.append(place)  # of what follows the last line's end
    return "".join(text), places


class TooMuch(Exception):
    """More output than any set of rules needs."""


def _place(stream: Iterator[str]) -> tuple[str, int]:
    """File and line of the innermost template where a suspended rendering is, through includes, blocks and extends."""
    place = ("", 0)
    following: Any = stream
    while isinstance(following, GeneratorType):
        frame: FrameType | None = following.gi_frame
        if frame is None:
            break
        template = frame.f_globals.get("__jinja_template__")
        if isinstance(template, jinja2.Template):
            place = (template.filename or "", template.get_corresponding_lineno(frame.f_lineno))
        following = following.gi_yieldfrom or frame.f_locals.get(
            "gen"
        )  # 'gen' is how compiled templates name an include
    return place


def views(catalogue: Mapping[str, Any]) -> dict[str, Any]:
    """`model`, `layers` and `tensors` from the JSON that the parent sends."""
    tensors = tuple(TensorView(**{**given, "shape": tuple(given["shape"])}) for given in catalogue["tensors"])
    layers = []
    for number in sorted({tensor.layer for tensor in tensors if tensor.layer is not None}):
        own = tuple(tensor for tensor in tensors if tensor.layer == number)
        layers.append(LayerView(number, own[0].depth, own[0].draft_head, own))
    return {"model": ModelView(**catalogue["model"]), "layers": tuple(layers), "tensors": tensors}


def find(patterns: Sequence[str], names: Sequence[str]) -> list[list[tuple[int, int, int]]]:
    """For each pattern, (index of the name, start, end) of the first place in each name where it is found."""
    compiled = [re.compile(pattern) for pattern in patterns]
    return [
        [(index, *match.span()) for index, name in enumerate(names) if (match := one.search(name))] for one in compiled
    ]


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    if "patterns" in request:
        try:
            return {"found": find(request["patterns"], request["names"])}
        except Exception as error:
            return _failed("failed", error)
    made, seen = environment(request["library"]), views(request["catalogue"])
    return {
        "rendered": [
            _rendered(made, request["template"], {**seen, **one["parameters"]}, one) for one in request["renders"]
        ]
    }


def _rendered(
    made: jinja2.Environment, template: str, context: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """`text` and `places`, and `same`: for each variant of the parameters, whether it renders the rules that they do
    without it.
    """
    try:
        text, places = render(made, template, context)
    except SecurityError as error:
        return _failed("unsafe", error)
    except MemoryError:
        return {
            "error": "failed",
            "message": f"it needs more than {sandbox_child.MEMORY_BYTES >> 30} GiB of memory",
            "file": "",
            "line": 0,
        }
    except Exception as error:
        return _failed("failed", error)
    try:
        same = [
            _rules(render(made, template, {**context, **variant})[0]) == _rules(text) for variant in wanted["variants"]
        ]
    except Exception:  # with an arbitrary value
        same = []
    return {"text": text, "places": places, "same": same}


def _rules(text: str) -> list[str]:
    """The lines that decide, without comments."""
    return [line for line in text.splitlines() if line.partition("#")[0].strip()]


def _failed(kind: str, error: Exception) -> dict[str, Any]:
    if isinstance(error, jinja2.TemplateSyntaxError):
        return {
            "error": kind,
            "message": error.message or str(error),
            "file": error.filename or error.name or "",
            "line": error.lineno,
        }
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(".jinja")]
    message = (error.message if isinstance(error, jinja2.TemplateError) else None) or f"{type(error).__name__}: {error}"
    return {
        "error": kind,
        "message": message,
        "file": frames[-1].filename if frames else "",
        "line": frames[-1].lineno if frames else 0,
    }


if __name__ == "__main__":
    sandbox_child.serve(_answer, cpu_seconds=lambda request: CPU_SECONDS + len(request.get("renders", ())))
