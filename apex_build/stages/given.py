"""Inputs of all stages, given or found: the model, tools, plugins, texts, prompts and data files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from apex_build.calibration.heldout import heldout_of, heldout_of_imatrix
from apex_build.errors import CalibrationSetInvalid, ParameterUnknown
from apex_build.evaluation.built_in import built_in_texts
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.model import read_model
from apex_build.hookspecs import Evaluator
from apex_build.native.toolset import Toolset, find_toolset
from apex_build.plugins import Plugins, load_plugins
from apex_build.progress import Report, silent

ModelFile = Model | str | os.PathLike[str]


@dataclass(frozen=True)
class Workplace:
    """What a stage works with: the plugins, a progress report, and the built tools. `toolset` None: found on first

    use, in the folder `tools_at` or the current build.
    """

    plugins: Plugins
    report: Report = silent
    toolset: Toolset | None = None
    tools_at: Path | None = None

    @cached_property
    def tools(self) -> Toolset:
        """Raises BuildMissing."""
        return self.toolset or find_toolset(self.tools_at)

    def model(self, given: ModelFile) -> Model:
        """Raises ModelMissing, ModelInvalid."""
        return given if isinstance(given, Model) else read_model(Path(given), self.plugins.role_of)

    def texts(self, given: Sequence[Path], model: Model, template: Path | None = None) -> dict[str, Path]:
        """The texts by domain; the built-in ones if none are given."""
        return texts_by_domain(given) if given else built_in_texts(model, self.plugins.calibration_sources(), template)


def workplace(tools: Path | None = None, plugins: Sequence[Path] = (), *, report: Report = silent) -> Workplace:
    """A workplace with the tools in that folder, or the current ones; the built-in and installed plugins, and those in
    these folders.

    Raises PluginFailed; later, BuildMissing if a stage needs tools and there are none.
    """
    return Workplace(load_plugins(tuple(plugins)), report, tools_at=tools)


def texts_by_domain(paths: Sequence[Path]) -> dict[str, Path]:
    """Texts by the names of their files; of a folder, its .txt files. Raises CalibrationSetInvalid for one that cannot
    be read, is empty, or shares a name.
    """
    found: dict[str, Path] = {}
    for path in dict.fromkeys(one for given in paths for one in (sorted(given.glob("*.txt")) or [given])):
        if not path.is_file():
            raise CalibrationSetInvalid(f"{path}: no such file", hint="--text FILE, a UTF-8 text")
        try:
            with path.open(encoding="utf-8") as file:
                empty = not file.read(1 << 20).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationSetInvalid(f"{path}: cannot be read as UTF-8 text: {error}") from None
        if empty:
            raise CalibrationSetInvalid(f"{path}: the text is empty")
        if path.stem in found:
            raise CalibrationSetInvalid(
                f"{path} and {found[path.stem]} would both be the domain '{path.stem}'", hint="rename one"
            )
        found[path.stem] = path
    return found


def texts_apart(models: Sequence[Model], imatrix: Path | None = None) -> dict[str, Path]:
    """What to measure on where no text is given: the texts kept apart from the calibration of this imatrix, or of the
    first of the files that has some. Empty if there are none.
    """
    found = heldout_of_imatrix(imatrix) if imatrix else {}
    return texts_by_domain(tuple((found or next(filter(None, map(heldout_of, models)), {})).values()))


def check_data_files(found: Mapping[str, Path], evaluators: Mapping[str, Evaluator]) -> Mapping[str, Path]:
    """Evaluator -> its data file. Raises ParameterUnknown, CalibrationSetInvalid."""
    takers = [name for name, evaluator in evaluators.items() if "data" in (*evaluator.needs, *evaluator.uses)]
    for name, path in found.items():
        if name not in takers:
            raise ParameterUnknown(
                f"--data {name}: no evaluator of this name takes a data file. These do: {', '.join(takers)}"
            )
        if not path.is_file():
            raise CalibrationSetInvalid(f"{path}: no such data file for {name}", hint=f"--data {name}=FILE")
    return found
