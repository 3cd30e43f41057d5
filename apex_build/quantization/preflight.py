"""What is checked in seconds before hours of work: calibration data, shapes, the input's types, the output's folder, the disk."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from apex_build.errors import AlreadyQuantized, DataMissing, HeadRowsMismatch, ShapeUnfit
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.coverage import Coverage
from apex_build.gguf_model.mtp_rows import CHOICE_OF, Rows, trained_on
from apex_build.hookspecs import PolicySpec
from apex_build.native.ggml import Ggml
from apex_build.outputs import check_apart, check_free, check_place, check_room, with_manifest_and_log
from apex_build.places import model_stem
from apex_build.policy.plan import Entry, Plan

# llama-quantize makes no use of calibration data for these (src/llama-quant.cpp: ggml_quantize_chunk passes it on, they ignore it)
_DATA_UNUSED = frozenset({"F32", "F16", "BF16", "Q8_0"})


@dataclass(frozen=True)
class Allowed:
    """What the user takes upon himself. `head_rows`: that the draft head was trained on these, whatever is known of its kind."""

    uncalibrated: bool = False
    fallback: bool = False
    requantize: bool = False
    head_rows: Rows | None = None


def check_policy(policy: PolicySpec, model: Model, imatrix: Path | None) -> None:
    """A calibrated policy without an imatrix is refused before anything is planned."""
    if policy.calibrated and imatrix is None:
        raise DataMissing(
            f"policy '{policy.name}' is made for calibrated models, and no imatrix was given",
            hint=f"{_calibrate(model)}, then --imatrix {_quoted(model.path.with_name(f'{model_stem(model.path)}.imatrix.gguf'))}",
        )


def check_plan(plan: Plan, model: Model, covered: Coverage | None, ggml: Ggml, allowed: Allowed) -> list[str]:
    """Raises AlreadyQuantized, ShapeUnfit, DataMissing, HeadRowsMismatch; returns warnings for what is allowed and worth a word."""
    warnings: list[str] = []
    changed = [entry for entry in plan.entries if entry.type != entry.from_type]
    for entry in changed:
        if ggml.type_traits(entry.from_type).quantized and not allowed.requantize:
            raise AlreadyQuantized(
                f"{model.path} is quantized already: {entry.name} is {entry.from_type}, and the plan wants {entry.type}",
                hint="start from the F16 or BF16 file, or accept the loss with --allow-requantize",
            )
    for entry in plan.fallbacks:
        said = f"{entry.name}: rows of {entry.shape[0]} cannot be {entry.fallback}; llama-quantize would write {entry.type}"
        if not allowed.fallback:
            raise ShapeUnfit(said, hint="give the tensor a type that fits, or accept it with --allow-fallback")
        warnings.append(said)
    if covered is not None:
        warnings += check_head_rows(plan.entries, model, covered, allowed.head_rows)
    return warnings + list(_data(plan, changed, model, covered, allowed))


def check_head_rows(entries: Iterable[Entry], model: Model, covered: Coverage, given: Rows | None) -> list[str]:
    """Raises HeadRowsMismatch where data of the draft head would be used that is not of the rows that it was trained on.

    Such data is no gap that a --allow-* could be for: nothing of it shows. `given`: rows that the user knows the head to be trained
    on, instead of what is known of its architecture. Returns a warning where nothing is.
    """
    with_data = {tensor.name for tensor in covered.head if tensor.has_data}
    used = [entry for entry in entries if entry.name in with_data and entry.type not in (*_DATA_UNUSED, entry.from_type)]
    if not used:
        return []
    known, found = trained_on(model.architecture), covered.imatrix.head_rows
    expected = given or (known.rows if known else None)
    what = f"{covered.imatrix.path}: the data of the draft head ({used[0].name} -> {used[0].type})"
    if expected is None:
        said = f"is of {found} rows" if found else "does not say of which hidden rows it is"
        return [f"{what} {said}; what heads of {model.architecture} were trained on is not known"]
    if found == expected:
        return []
    again = f"{_calibrate(model)} --force" + (f" --mtp-rows {CHOICE_OF[given]}" if given in CHOICE_OF else "")
    if found is None:
        raise HeadRowsMismatch(
            f"{what} does not say of which hidden rows of the trunk it is: expected {expected}. Tools that do not record it "
            "feed the heads of some models with the wrong ones",
            hint=again,
        )
    why = "as --mtp-rows says" if given else f"what heads of {model.architecture} were trained on"
    trust = f"; or, if this model's head was trained on those: --mtp-rows {CHOICE_OF[found]}" if found in CHOICE_OF else ""
    raise HeadRowsMismatch(f"{what} is of {found} rows: expected {expected}, {why}", hint=again + trust)


def _data(plan: Plan, changed: list[Entry], model: Model, covered: Coverage | None, allowed: Allowed) -> Iterator[str]:
    missing = set(covered.missing) if covered else {entry.name for entry in changed}
    for entry in changed:
        if entry.needs_data and entry.name in missing:
            raise _refusal(entry, model, covered, f"its type {entry.type} cannot be written without")
    if covered is None:
        return
    blind = [entry for entry in changed if entry.name in missing and entry.type not in _DATA_UNUSED]
    if blind and not allowed.uncalibrated:
        others = f" (and {len(blind) - 1} others)" if len(blind) > 1 else ""
        raise _refusal(blind[0], model, covered, f"it{others} would be quantized blindly, without a word from llama-quantize")
    if blind:
        yield f"{len(blind)} tensors are quantized without calibration data, {blind[0].name} ({blind[0].type}) among them"
    using = {entry.name for entry in changed if entry.type not in _DATA_UNUSED}
    unseen = [tensor for tensor in covered.partial if tensor.without_tokens and tensor.name in using]
    if unseen:  # one line: a large model has hundreds of such tensors when the text was short
        worst = max(unseen, key=lambda tensor: len(tensor.without_tokens))
        most = f"{worst.name} has most, {len(worst.without_tokens)} of {worst.experts}"
        yield f"{len(unseen)} tensors have experts that saw no calibration token: {most}"


def _refusal(entry: Entry, model: Model, covered: Coverage | None, why: str) -> DataMissing:
    where = f"{covered.imatrix.path} holds no calibration data for it" if covered else "no imatrix was given"
    head = " of the draft head" if entry.draft_head else ""
    mend = _calibrate(model) + (", which runs the draft head too" if entry.draft_head else "")
    if entry.draft_head:
        mend += "; or a type that needs none: --set draft_head=Q8_0"
    elif not entry.needs_data:
        mend += "; or --allow-uncalibrated"
    return DataMissing(f"{entry.name}{head} -> {entry.type}: {where}; {why}", hint=mend)


def _calibrate(model: Model) -> str:
    return f"apex calibrate {_quoted(model.path)}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def check_output(
    out: Path, inputs: Iterable[Path], n_bytes: int, *, force: bool = False, replace: bool = False, before: int = 0
) -> None:
    """Raises OutputUnwritable and DiskTooSmall. `before`: bytes that are to be written there earlier; the rest: `check_free`."""
    check_place(out)
    check_apart(with_manifest_and_log(out), inputs)
    check_free(out, "policy", force=force, replace=replace)
    check_room(out.parent, n_bytes, out.name, before=before)
