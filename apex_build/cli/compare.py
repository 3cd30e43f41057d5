"""What `apex plan --compare` shows."""

from __future__ import annotations

from typing import Any

import click

from apex_build.cli import show
from apex_build.stages.compare import Compared

_SHOWN = 20  # differing tensors to show, unless all are requested


def as_json(compared: Compared) -> dict[str, Any]:
    return {
        "model": str(compared.model.path),
        "plans": [
            {
                "policy": one.plan.policy,
                "identity": one.plan.identity,
                "bytes": one.plan.n_bytes,
                "bits_per_weight": one.plan.bits_per_weight,
                "bytes_by_role": dict(one.plan.bytes_by_role),
                "predicted": dict(one.predicted),
            }
            for one in compared.plans
        ],
        "different": [
            {
                "name": one.name,
                "types": dict(zip((each.plan.policy for each in compared.plans), one.types, strict=True)),
            }
            for one in compared.differences
        ],
    }


def print_compared(compared: Compared, *, tensors: bool) -> None:
    plans = [one.plan for one in compared.plans]
    names = [plan.policy for plan in plans]
    figures = list(dict.fromkeys(name for one in compared.plans for name in one.predicted))
    columns = ("policy", "bytes", "bits per weight", *(f"{name} predicted" for name in figures))
    rows = [
        (
            one.plan.policy,
            one.plan.n_bytes,
            f"{one.plan.bits_per_weight:.3f}",
            *(f"{one.predicted[name]:.4f}" if name in one.predicted else "" for name in figures),
        )
        for one in compared.plans
    ]
    show.table("Plans", columns, rows, right=columns[1:])
    roles = list(dict.fromkeys(role for plan in plans for role in plan.bytes_by_role))
    by_role = [(role, *(show.size(plan.bytes_by_role.get(role, 0)) for plan in plans)) for role in roles]
    show.table("Bytes by role", ("role", *names), by_role, right=names)
    differences = compared.differences
    shown = differences if tensors else differences[:_SHOWN]
    if shown:
        title = f"{len(differences)} of {len(plans[0].entries)} tensors differ"
        rows_ = [(one.name, "head" if one.draft_head else "", *one.types) for one in shown]
        show.table(title, ("tensor", "part", *names), rows_)
    else:
        click.echo("all tensors have the same types")
    if len(shown) < len(differences):
        click.echo(f"and {len(differences) - len(shown)} more: --tensors lists all")
    for plan in plans:
        for warning in plan.warnings:
            click.echo(f"warning: {plan.policy}: {warning}", err=True)
