"""Checks that take seconds, before hours of work: calibration data, shapes, the input's types, the output's folder,
the disk.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from apex_build.errors import AlreadyQuantized, DataMissing, HeadRowsMismatch, ShapeUnfit
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.coverage import Coverage, can_have_data, disagreements
from apex_build.gguf_model.mtp_rows import CHOICE_OF, Rows, trained_on
from apex_build.gguf_model.runnable import trunk_blocks
from apex_build.gguf_model.soundness import unsound
from apex_build.hookspecs import PolicySpec
from apex_build.native.ggml import Ggml
from apex_build.places import model_stem
from apex_build.policy.plan import Entry, Plan
from apex_build.policy.remarks import remarks
from apex_build.storage.artifacts import Artifact, Replace, check_free
from apex_build.storage.disk import check_room
from apex_build.storage.outputs import check_apart, check_place, with_manifest_and_log

# llama-quantize makes no use of calibration data for these (src/llama-quant.cpp: ggml_quantize_chunk passes it on, they
# ignore it)
_DATA_UNUSED = frozenset({"F32", "F16", "BF16", "Q8_0"})


@dataclass(frozen=True)
class Allowed:
    """Risks explicitly accepted. `head_rows`: the rows that the head was trained on, whatever its architecture uses."""

    uncalibrated: bool = False
    fallback: bool = False
    requantize: bool = False
    head_rows: Rows | None = None


def check_policy(policy: PolicySpec, model: Model, imatrix: Path | None) -> None:
    """A calibrated policy without an imatrix is refused before anything is planned."""
    if policy.calibrated and imatrix is None:
        raise DataMissing(
            f"policy '{policy.name}' is for calibrated models, but no imatrix was given",
            hint=f"{_calibrate(model)}, then --imatrix "
            f"{_quoted(model.path.with_name(f'{model_stem(model.path)}.imatrix.gguf'))}",
        )


def check_data(covered: Coverage, borrowed: Sequence[str]) -> list[str]:
    """Oddities of the calibration data, and how they are handled. `borrowed`: tensors that use others' data."""
    words = covered.examined.lines()
    if borrowed:
        many = f" and {len(borrowed) - 1} others" if len(borrowed) > 1 else ""
        words.append(
            f"{borrowed[0]}{many}: the imatrix has the experts fused where the model has them separate, or the "
            "reverse; used"
        )
    return words + disagreements(covered)


def check_plan(
    plan: Plan, model: Model, covered: Coverage | None, policy: PolicySpec, ggml: Ggml, allowed: Allowed
) -> list[str]:
    """Raises AlreadyQuantized, ShapeUnfit, DataMissing, HeadRowsMismatch; returns warnings about what was allowed."""
    changed = [entry for entry in plan.entries if entry.type != entry.from_type]
    for entry in changed:
        if ggml.type_traits(entry.from_type).quantized and not allowed.requantize:
            raise AlreadyQuantized(
                f"{model.path} is already quantized: {entry.name} is {entry.from_type}, the plan wants {entry.type}",
                hint="start from the F16 or BF16 file, or accept the loss with --allow-requantize",
            )
    if plan.fallbacks and not (allowed.fallback or policy.fit):
        entry = plan.fallbacks[0]
        raise ShapeUnfit(
            f"{entry.name}: rows of {entry.shape[0]} cannot be {entry.fallback}; llama-quantize would write "
            f"{entry.type}",
            hint=f"accept that with --allow-fallback (it concerns {len(plan.fallbacks)} tensors), or plan another type",
        )
    rows = check_head_rows(plan.entries, model, covered, allowed.head_rows) if covered is not None else []
    doubts = [f"llama.cpp cannot load {model.path} or files made from it: {reason}" for reason in unsound(model)]
    if not trunk_blocks(model):
        doubts.append(
            f"{model.path} holds a draft head alone: the tools load it beside its model only, so loading is not tested"
        )
    return [*doubts, *plan.warnings, *remarks(plan, ggml), *rows, *_data(changed, model, covered, policy, allowed)]


def check_head_rows(entries: Iterable[Entry], model: Model, covered: Coverage, given: Rows | None) -> list[str]:
    """Raises HeadRowsMismatch if the draft head's data would be used but is from other rows than it was trained on.

    No --allow-* option covers this: such a file looks fine but is not. `given`: rows that the user says the head was
    trained on, instead of those known for its architecture. Returns a warning if none are known.
    """
    with_data = {tensor.name for tensor in covered.head if tensor.has_data}
    used = [
        entry for entry in entries if entry.name in with_data and entry.type not in (*_DATA_UNUSED, entry.from_type)
    ]
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
            f"{what} does not name the trunk's hidden rows that it is from: expected {expected}. Tools that do not "
            "record it "
            "feed the heads of some models with the wrong ones",
            hint=again,
        )
    why = "as --mtp-rows says" if given else f"what heads of {model.architecture} were trained on"
    trust = (
        f"; or, if this model's head was trained on those: --mtp-rows {CHOICE_OF[found]}" if found in CHOICE_OF else ""
    )
    raise HeadRowsMismatch(f"{what} is from {found} rows: expected {expected}, {why}", hint=again + trust)


def _data(
    changed: list[Entry], model: Model, covered: Coverage | None, policy: PolicySpec, allowed: Allowed
) -> Iterator[str]:
    for entry in changed:
        if entry.needs_data and not (covered and covered.has_data(entry.name)):
            raise _refusal(entry, model, covered, policy, f"its type {entry.type} cannot be written without")
    if covered is None:
        return
    blind = without_data(changed, covered)
    if blind and not allowed.uncalibrated:
        others = f" (and {len(blind) - 1} others)" if len(blind) > 1 else ""
        raise _refusal(
            blind[0],
            model,
            covered,
            policy,
            f"it{others} would silently be quantized without data",
        )
    if blind:
        yield (
            f"{len(blind)} tensors are quantized without calibration data, {blind[0].name} ({blind[0].type}) among them"
        )
    using = {entry.name for entry in changed if entry.type not in _DATA_UNUSED}
    partial = [tensor for tensor in covered.partial if tensor.name in using]
    # one line for each kind: a large model has hundreds of such tensors when the text was short
    if unseen := [tensor for tensor in partial if tensor.without_tokens]:
        worst = max(unseen, key=lambda tensor: len(tensor.without_tokens))
        most = f"{worst.name} has most, {len(worst.without_tokens)} of {worst.experts}"
        yield f"{len(unseen)} tensors have experts that saw no calibration token: {most}"
    if scarce := [tensor for tensor in partial if tensor.few_tokens]:
        least = min(scarce, key=lambda tensor: tensor.fewest)
        few = sum(len(tensor.few_tokens) for tensor in scarce)
        yield (
            f"{len(scarce)} tensors have experts that saw few calibration tokens, {few} experts in all: "
            f"{least.fewest:.0f} tokens is the least, in {least.name}"
        )


def without_data(entries: Iterable[Entry], covered: Coverage | None) -> list[Entry]:
    """Tensors of a plan that are quantized without data, though their type would use some and an imatrix is given."""
    missing = set(covered.missing) if covered else set()
    changed = (entry for entry in entries if entry.type != entry.from_type)
    return [entry for entry in changed if entry.name in missing and entry.type not in _DATA_UNUSED]


def _refusal(entry: Entry, model: Model, covered: Coverage | None, policy: PolicySpec, why: str) -> DataMissing:
    where = f"{covered.imatrix.path} has no calibration data for it" if covered else "no imatrix was given"
    head = " of the draft head" if entry.draft_head else ""
    tries = []
    if can_have_data(entry.name, entry.shape, entry.layer):
        tries.append(_calibrate(model) + (", which runs the draft head too" if entry.draft_head else ""))
    else:
        why += ", and calibration cannot record any: it is looked up by token, or outside the blocks"
    if setting := _setting(entry, policy):
        tries.append(f"a type that needs none: --set {setting}")
    if not entry.needs_data:
        tries.append("--allow-uncalibrated")
    return DataMissing(f"{entry.name}{head} -> {entry.type}: {where}; {why}", hint="; or ".join(tries) or None)


def _setting(entry: Entry, policy: PolicySpec) -> str | None:
    """A setting of this policy that gives the tensor a type that needs no data."""
    if entry.draft_head:
        by_row = entry.role == "nextn" and not entry.name.endswith("eh_proj.weight")
        wanted = ["draft_head.other"] * by_row + ["draft_head"]
    else:
        wanted = {"embedding": ["token_embd"], "ssm": ["attention"]}.get(entry.role, [entry.role])
    name = next((name for name in (*wanted, "type") if name in policy.parameters), None)
    return name and f"{name}={'Q8_0' if entry.draft_head else 'Q6_K' if entry.role == 'output' else 'Q4_K'}"


def _calibrate(model: Model) -> str:
    return f"apex calibrate {_quoted(model.path)}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def check_output(
    artifact: Artifact, inputs: Iterable[Path], n_bytes: int, *, replace: Replace = "nothing", before: int = 0
) -> None:
    """Raises OutputUnwritable and DiskTooSmall. `before`: bytes that will be written there earlier."""
    out = artifact.out
    check_place(out)
    check_apart(with_manifest_and_log(out), inputs)
    check_free(artifact, replace)
    check_room(out.parent, n_bytes, out.name, before=before)
