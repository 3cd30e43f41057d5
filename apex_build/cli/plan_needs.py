"""`apex plan --hardware`: what each step takes, and whether a machine has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from apex_build.cli import show
from apex_build.plugins import Plugins
from apex_build.stages.machines import Machine, machine
from apex_build.stages.needs import Need

HERE = "here"


def machine_of(
    hardware: str | None, memory: int | None, disk: int | None, folder: Path, plugins: Plugins
) -> Machine | None:
    """The machine that was asked about, if any. Raises GpuUnknown."""
    if hardware is None and memory is None and disk is None:
        return None
    return machine(plugins, folder, gpu=None if hardware == HERE else hardware, memory=memory, disk=disk)


def as_json(asked: Machine, found: Sequence[Need], context: int) -> dict[str, Any]:
    return {
        "machine": asdict(asked),
        "context": context,
        "steps": [{**asdict(need), "memory": need.memory} for need in found],
        "fits": all(need.fits for need in found),
    }


def show_needs(asked: Machine, found: Sequence[Need], context: int) -> None:
    gpu = f", GPU {show.size(asked.gpu)}" if asked.gpu and not asked.shared else ""
    title = f"On {asked.name}: memory {show.size(asked.memory)}{gpu}, disk {show.size(asked.disk)}"
    rows = [
        (need.step, show.size(need.own), show.size(need.mapped), show.size(need.disk), "yes" if need.fits else "NO")
        for need in found
    ]
    columns = ("step", "memory", "mapped file", "writes", "fits")
    show.table(title, columns, rows, right=columns[1:4])
    for need in found:
        for line in need.advice:
            click.echo(f"{need.step}: {line}")
    click.echo(
        f"run: the finished file with {context} tokens of context. The mapped file is read\n"
        "from the disk where memory has no room for it."
    )
