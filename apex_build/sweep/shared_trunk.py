"""Files that differ only in the draft head: the trunk is quantized once, and each file is made from that by
quantizing the head.

llama-quantize copies a tensor that has the wanted type already, so the files are bit-identical to those made in one run
(tests/sweep/test_shared_trunk.py); on a large model that saves nearly all of the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.fused import crossed
from apex_build.gguf_model.imatrix import read_imatrix
from apex_build.policy.plan import KEPT, Entry, Plan
from apex_build.policy.sandbox import exactly
from apex_build.policy.size import file_size
from apex_build.quantization.run import Job, added_keys
from apex_build.storage.digests import sha256_json

# Keys that not all files made from one trunk have: what a trunk says would stay in the files made from it.
_OF_THE_HEAD = ("apex.parameters", "apex.head_rows", "apex.imatrix.examined")


def same_trunk(jobs: Sequence[Job]) -> bool:
    """Whether the files differ only in types of the draft head. The caller must know that the trunk has the same
    data.
    """
    return len({_types(job.plan, head=False) for job in jobs}) == 1


def only_head_differs(plans: Sequence[Plan]) -> bool:
    """Whether the files differ, and in types of the draft head alone."""
    return len({_types(plan, head=False) for plan in plans}) == 1 < len({_types(plan, head=True) for plan in plans})


def _types(plan: Plan, *, head: bool) -> tuple[str, tuple[tuple[str, str], ...]]:
    return plan.base_type, tuple((entry.name, entry.type) for entry in plan.entries if entry.draft_head == head)


def trunk_job(job: Job, out: Path) -> Job:
    """The file with the trunk as `job` has it, and the head as it is in the model."""
    sizes = {tensor.name: tensor.n_bytes for tensor in job.model.tensors}
    entries = tuple(
        replace(entry, type=entry.from_type, n_bytes=sizes[entry.name], fallback=None, needs_data=False)
        if entry.draft_head
        else entry
        for entry in job.plan.entries
    )
    plan = _pinned(job.plan, entries)
    keys = {key: value for key, value in job.keys.items() if key not in _OF_THE_HEAD} | {"apex.plan": plan.identity}
    trunk = replace(job, plan=plan, out=out, keys=keys, warnings=())
    found = crossed(read_imatrix(job.imatrix), job.model)[0] if job.imatrix is not None else None
    return replace(trunk, n_bytes=file_size(plan, job.model, added_keys(trunk, found)))


def head_job(job: Job, trunk: Model) -> Job:
    """`job`, from the file that `trunk_job` made."""
    types = {tensor.name: tensor.type for tensor in trunk.tensors}
    entries = tuple(replace(entry, from_type=types[entry.name]) for entry in job.plan.entries)
    return replace(job, model=trunk, plan=replace(job.plan, entries=entries, rules=_pinned(job.plan, entries).rules))


def _pinned(plan: Plan, entries: tuple[Entry, ...]) -> Plan:
    """The plan with a rule for every tensor that llama-quantize would change, so its mixture decides nothing."""
    rules = "".join(f"{exactly(entry.name)}={entry.type}\n" for entry in entries if entry.source != KEPT)
    identity = sha256_json(
        {"base_type": plan.base_type, "rules": rules, "types": [[entry.name, entry.type] for entry in entries]}
    )
    return replace(plan, rules=rules, entries=entries, identity=identity)
