"""Output of `apex build` about packed builds, and about the GPUs it knows by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from apex_build.cli import show
from apex_build.places import chosen_pin_name
from apex_build.plugins import Plugins
from apex_build.toolchain.machine.gpus import runs_on, survey_gpus
from apex_build.toolchain.packed.packing import Packed
from apex_build.toolchain.packed.unpacking import take_in


def list_gpus(plugins: Plugins, json_: bool) -> None:
    targets = plugins.gpu_targets().values()
    if json_:
        show.as_json([asdict(target) for target in targets])
        return
    rows = [
        (target.name, target.architecture, f"{target.memory_gib:.0f} GiB", target.minimum_cuda, target.description)
        for target in targets
    ]
    show.table(
        "GPUs by name", ("--gpu", "architecture", "memory", "from CUDA", ""), rows, right=("memory", "from CUDA")
    )
    groups = sorted({group for target in targets for group in target.groups})
    for group in groups:
        click.echo(f"{group}: {', '.join(target.name for target in targets if group in target.groups)}")
    survey = survey_gpus()
    for gpu in survey.gpus:
        click.echo(f"in this machine: {gpu.name}, {gpu.architecture}")
    click.echo(
        "or a CUDA architecture: sm_120, 90a, compute_90 (PTX), 8.9" + (f"\n{survey.reason}" if survey.reason else "")
    )


def import_build(archive: Path, make_current: bool, json_: bool) -> None:
    with show.progress() as report:
        taken = take_in(archive, make_current=make_current, report=report)
    toolset = taken.toolset
    if json_:
        show.as_json(
            {"root": str(toolset.root), "reused": taken.reused, "left_out": list(taken.left_out), **toolset.manifest}
        )
        return
    click.echo(f"{toolset.bin}: {'already in the cache' if taken.reused else 'verified, tried and installed'}")
    _say_gpus(toolset.manifest.get("cuda") or {})
    if taken.left_out:
        click.echo(f"not included, and needed from this machine for its GPU: {', '.join(taken.left_out)}")
    if not make_current or (toolset.manifest["pin"] or {}).get("name") != chosen_pin_name():
        current = ", or import it with --make-current" if not make_current else ""
        click.echo(f"to use these tools: APEX_TOOLS={toolset.root}{current}")


def _say_gpus(cuda: Mapping[str, Any]) -> None:
    architectures = [str(name) for name in cuda.get("architectures", ())]
    if not architectures:
        return
    click.echo(f"it has code for GPUs of {', '.join(architectures)}")
    for gpu in survey_gpus().gpus:
        if not any(runs_on(name, gpu.capability) for name in architectures):
            click.echo(f"but none for {gpu.name}, which needs {gpu.architecture}: on this machine it runs on the CPU")


def show_packed(packed: Packed) -> None:
    click.echo(
        f"{packed.path}: {len(packed.manifest['files'])} files, {show.size(packed.size)}, sha256 {packed.sha256}"
    )
    if packed.left_out:
        click.echo(f"left out, and needed on the other machine: {', '.join(packed.left_out)}")
    if packed.manifest["cpu"]:
        click.echo("it needs every instruction set of this CPU; --no-native builds for any recent CPU")
