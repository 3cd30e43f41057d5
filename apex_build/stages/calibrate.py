"""Stage calibrate: an imatrix of the whole model, draft head included."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from apex_build.calibration.heldout import write_heldout
from apex_build.calibration.run import Calibration, Check, Settings, without_own_arguments
from apex_build.calibration.run import calibrate as run
from apex_build.calibration.sets import CalibrationText, compose, load_set, text_of_file
from apex_build.calibration.shards import Pool, in_shards, local_pool
from apex_build.calibration.until import Goal, until_experts
from apex_build.cluster.connect import connected
from apex_build.cluster.pool import ClusterPool
from apex_build.evaluation.rows_check import CHUNKS, RowsCheck, check_rows
from apex_build.evaluation.task import ToolOptions
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.mtp_rows import AUTO
from apex_build.native.token_counts import count_tokens
from apex_build.native.toolset import Toolset, find_toolset
from apex_build.places import model_stem
from apex_build.plugins import Plugins
from apex_build.stages.given import ModelFile, Workplace, workplace
from apex_build.storage.outputs import check_apart, with_manifest_and_log
from apex_build.toolchain.machine.gpus import survey_gpus

_OF_GPU = 0.8  # of a GPU's memory: a model's share, beside its context and the sums


@dataclass(frozen=True)
class CalibrateOptions:
    """`text`: a file of your own instead of the set. `rows_check`: score the draft head with both kinds of hidden rows
    first.

    `shards`: number of parts of the text, each with a separate run. `devices`: sets of GPUs, as in
    CUDA_VISIBLE_DEVICES, each for one shard at a time; default: each GPU with room for the model. `cluster`: the
    address of a Dask scheduler, or local:N for N processes here; each shard is a task there. `until`: draw text until
    every routed expert has seen this many tokens, instead of running all of the text.

    `force` starts again and replaces existing output; `replace` replaces it only if it was made from other inputs.
    """

    calibration_set: str = "default"
    domains: tuple[str, ...] = ()  # only these of the set
    text: Path | None = None
    chat_template: Path | None = None  # instead of the model's own
    settings: Settings = field(default_factory=Settings)
    rows_check: bool = True
    shards: int = 1
    devices: tuple[str, ...] = ()
    until: Goal | None = None
    cluster: str | None = None
    force: bool = False
    replace: bool = False
    fallback_template: Path | None = None  # for conversations that the other does not take; None: they are left out
    heldout: Path | None = None  # a folder for the text that the set keeps apart
    heldout_share: float | None = None  # instead of the set's


HELDOUT_SHARE = 0.05  # if a held-out text is requested and the set does not specify it


def text_of(
    model: Model, options: CalibrateOptions, plugins: Plugins, tools: Toolset | None = None, *, counted: bool = False
) -> CalibrationText:
    """`counted`: with its tokens, also where no weight needs them. The tools have the tokenizer.

    Raises CalibrationSetInvalid, ChatTemplateFailed, BuildMissing, LoadFailed.
    """
    if options.text is not None:
        return text_of_file(options.text)
    chosen, share = load_set(options.calibration_set), options.heldout_share
    if share is None and options.heldout is not None and not chosen.heldout:
        share = HELDOUT_SHARE
    count = None
    if counted or chosen.weighted:
        toolset = tools or find_toolset()

        def count(texts: Sequence[bytes]) -> list[int]:
            return count_tokens(toolset, model.path, texts)

    return compose(
        chosen,
        plugins.calibration_sources(),
        model,
        domains=options.domains,
        template_file=options.chat_template,
        fallback=options.fallback_template,
        count=count,
        heldout=share,
    )


def keep_heldout(text: CalibrationText, options: CalibrateOptions, inputs: Iterable[Path]) -> CalibrationText:
    """Write what the set keeps apart to the folder that `options` names, if it names one."""
    if options.heldout is None:
        return text
    write_heldout(text, options.heldout, (*text.files, *inputs), force=options.force)
    return replace(text, heldout_folder=options.heldout)


def output_of(model: Model) -> Path:
    return model.path.with_name(f"{model_stem(model.path)}.imatrix.gguf")


def calibrate(
    model: ModelFile,
    out: Path | None = None,
    options: CalibrateOptions = CalibrateOptions(),
    *,
    place: Workplace | None = None,
    text: CalibrationText | None = None,
    on_check: Callable[[RowsCheck], None] = lambda _: None,
) -> Calibration:
    """Run the model, and its draft head, over a diverse text, and write the imatrix to `out` (beside the model).

    An interrupted run is resumed by the same call; a finished one is used again. `text`: composed before, by `text_of`;
    `on_check` is called with the result of the hidden rows check. Raises what `calibration.run.calibrate` raises, and
    HeadRowsDoubtful.
    """
    place = place or workplace()
    found = place.model(model)
    out = out or output_of(found)
    check_apart(with_manifest_and_log(out), place.plugins.files())
    settings, check = options.settings, None
    if options.rows_check and settings.head and found.has_head and settings.rows == AUTO:
        check = _check(found, settings, place, on_check)
    text = text or text_of(found, options, place.plugins, place.tools)
    text = keep_heldout(text, options, (*found.files, *place.plugins.files()))
    with ExitStack() as stack:
        how = _how(found, text, options, place, stack)
        return run(
            found,
            text,
            place.tools,
            out,
            settings,
            force=options.force,
            replace=options.replace,
            check=check,
            report=place.report,
            **how,
        )


def _how(
    model: Model, text: CalibrationText, options: CalibrateOptions, place: Workplace, stack: ExitStack
) -> dict[str, Any]:
    """How the imatrix is made, where it is not by one run of the tool over all of the text."""
    goal, settings = options.until, options.settings
    if options.shards == 1 and goal is None and options.cluster is None:
        return {}
    pool: Pool
    counter = None
    if options.cluster is not None:
        cluster = stack.enter_context(connected(options.cluster, place.tools, place.report))
        shared = ClusterPool(cluster, model, place.tools, settings)
        pool, counter, at_once = shared, shared.count, len(cluster.fit)
    else:
        devices = options.devices or devices_for(model, settings, place.tools)
        pool, at_once = local_pool(model, place.tools, settings, devices), len(devices)
    if goal is None:
        return {"make": in_shards(options.shards, pool, counter), "more": {"shards": options.shards}}
    width = max(options.shards, at_once)

    def count(texts: Sequence[bytes]) -> list[int]:
        return count_tokens(place.tools, model.path, texts)

    make = until_experts(goal, text.documents, pool, width=width, count=count)
    return {"make": make, "more": {"until_experts": goal.tokens, "max_tokens": goal.most, "shards": width}}


def devices_for(model: Model, settings: Settings, tools: Toolset) -> tuple[str | None, ...]:
    """Each GPU by itself, where there are several and each holds the model; else all that there is, together."""
    if tools.manifest.get("backend") != "cuda" or settings.gpu_layers == 0:
        return (None,)
    found = survey_gpus().gpus
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(number) for number in range(len(found))]
    needed = sum(tensor.n_bytes for tensor in model.tensors)
    holds = all(gpu.memory_mib is not None and (gpu.memory_mib << 20) * _OF_GPU > needed for gpu in found)
    return tuple(names) if holds and len(names) > 1 else (None,)


def _check(model: Model, settings: Settings, place: Workplace, on_check: Callable[[RowsCheck], None]) -> Check:
    """Of the text's first chunks: cheap beside the whole of it."""
    chunks = min(CHUNKS, settings.chunks or CHUNKS)
    options = ToolOptions(settings.gpu_layers, without_own_arguments(settings.extra))

    def check(text: Path) -> RowsCheck | None:
        found = check_rows(
            model,
            text,
            place.tools,
            context=settings.context,
            chunks=chunks,
            threads=settings.threads,
            options=options,
            report=place.report,
        )
        if found is not None:
            on_check(found)
        return found

    return check
