"""Stage check: does a file write text, and is its draft head accepted?"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from apex_build.errors import EvaluationRefused
from apex_build.evaluation.built_in import built_in_prompts
from apex_build.evaluation.check import Bounds, Checked
from apex_build.evaluation.check import check as run
from apex_build.evaluation.task import ToolOptions, read_prompts
from apex_build.stages.given import ModelFile, Workplace, texts_apart, workplace

PROMPTS = 4  # of each domain


@dataclass(frozen=True)
class CheckOptions:
    """`reference`: a file to compare with, such as the F16. Prompts default to the built-in ones; texts to
    those that were kept apart from the file's calibration, or the built-in ones."""

    reference: Path | None = None
    prompts: Path | None = None
    texts: tuple[Path, ...] = ()
    prompts_per_domain: int = PROMPTS  # of the built-in ones
    chat_template: Path | None = None  # for these, instead of the model's own
    bounds: Bounds = field(default_factory=Bounds)
    threads: int | None = None
    tools: ToolOptions = field(default_factory=ToolOptions)


def check(
    file: ModelFile,
    options: CheckOptions = CheckOptions(),
    *,
    place: Workplace | None = None,
) -> Checked:
    """Load the file in llama-server with drafting and check that it writes text. The result's `refuse` raises
    CheckFailed.

    Raises EvaluationRefused, and what evaluators raise if the file cannot be measured.
    """
    place = place or workplace()
    model = place.model(file)
    reference = place.model(options.reference) if options.reference else None
    if reference and model.has_head and not reference.has_head:
        raise EvaluationRefused(
            f"{reference.path} has no draft head to compare with {model.path}'s", hint="leave out --reference"
        )
    sources, template = place.plugins.calibration_sources(), options.chat_template
    if options.prompts is not None:
        prompts = read_prompts(options.prompts)
    else:
        prompts = built_in_prompts(model, sources, options.prompts_per_domain, template)
    apart = {} if options.texts else texts_apart([model])
    done = run(
        model,
        place.plugins.evaluators(),
        place.tools,
        prompts,
        apart or place.texts(options.texts, model, template),
        reference=reference,
        bounds=options.bounds,
        threads=options.threads,
        options=options.tools,
        report=place.report,
    )
    return replace(done, heldout=next((text.parent for text in apart.values()), None))
