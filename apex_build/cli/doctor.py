"""`apex doctor`: what this machine has and lacks for building, and what can be built."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from apex_build.cli import show
from apex_build.cli.options import json_option
from apex_build.errors import ApexError
from apex_build.plugins import load_plugins
from apex_build.source.pins import load_pin
from apex_build.toolchain.cuda.toolkit import CudaToolkit, host_limits, system_toolkits
from apex_build.toolchain.cuda.wheels import Wheels, pinned_wheels, planned
from apex_build.toolchain.doctor.feasibility import BuildOption, build_options
from apex_build.toolchain.doctor.host import CachedBuild, Machine, cache_sizes, cached_builds, examine
from apex_build.toolchain.machine.compilers import install_hint
from apex_build.toolchain.machine.gpus import Survey, survey_gpus


@click.command()
@json_option
def command(json_: bool) -> None:
    """Show what this machine has for building the tools, and what can be built.

    It lists compilers, build tools, each part of every CUDA toolkit, driver and GPUs, disk, memory and the cache; and
    for each build whether it can be made here, and about how long it takes without a compiler cache. Nothing is built,
    fetched or written. The exit code is 0 even if something is missing.

    \b
    Examples:
      apex doctor
      apex doctor --json
      CUDA_HOME=/opt/cuda apex doctor
    """
    machine, survey = examine(), survey_gpus()
    toolkits = list(system_toolkits())
    wheels: Wheels | None = None
    no_wheels = ""
    try:
        wheels = pinned_wheels()
        if (installed := planned(wheels)).parts:
            toolkits.append(installed)
    except ApexError as error:
        no_wheels = error.message
    builds, sizes = cached_builds(), cache_sizes()
    coming: tuple[BuildOption, ...] = ()
    unknown = ""
    try:
        coming = build_options(load_pin(), survey, load_plugins())
    except ApexError as error:
        unknown = error.message
    if json_:
        _json(machine, survey, toolkits, wheels, builds, sizes, coming, unknown)
        return
    _machine(machine, toolkits, wheels)
    _toolkits(toolkits, wheels, no_wheels)
    _gpus(survey)
    _cache(builds, sizes)
    _coming(coming, unknown)


def _machine(machine: Machine, toolkits: list[CudaToolkit], wheels: Wheels | None) -> None:
    chosen = machine.compiler
    used = f"{chosen.cxx}: {chosen.kind} {chosen.version}, {chosen.target}" if chosen else machine.compiler_error
    if not chosen:
        used += f"\ntry: {install_hint()}"
    rows = [
        ("system", f"{machine.system}, {machine.architecture}"),
        ("processor", f"{machine.cpu}, {machine.cpus} usable"),
        ("memory", f"{show.size(machine.memory)}, {show.size(machine.memory_available)} available"),
        *(
            (f"disk: {disk.what}", f"{disk.path}: {show.size(disk.free)} free of {show.size(disk.total)}")
            for disk in machine.disks
        ),
        ("compiler", used),
        *(("in PATH", _compiler_line(item.path, item.kind, item.version, wheels)) for item in machine.compilers),
        *((name, said or "missing") for name, said in machine.tools.items()),
    ]
    show.table("This machine", ("what", "found"), rows)


def _compiler_line(path: object, kind: str, version: str, wheels: Wheels | None) -> str:
    line = f"{path}: {kind or 'unknown'} {version}"
    newest = wheels.newest_host.get(kind) if wheels else None
    if newest and wheels and version.partition(".")[0].isdigit():
        fits = int(version.partition(".")[0]) <= newest
        line += f"; nvcc {wheels.version} {'accepts it' if fits else f'rejects it: newest accepted is {newest}'}"
    return line


def _toolkits(toolkits: list[CudaToolkit], wheels: Wheels | None, no_wheels: str) -> None:
    rows = []
    for toolkit in toolkits:
        limits = ", ".join(f"{kind} up to {newest}" for kind, newest in host_limits(toolkit).items())
        rows.append(
            (
                f"{toolkit.root}{' (from the package index)' if toolkit.origin == 'pypi' else ''}",
                toolkit.version or "-",
                limits or "-",
                ", ".join(name for name, path in toolkit.parts.items() if path) or "nothing",
                ", ".join(toolkit.missing) or "nothing: it is complete",
            )
        )
    if rows:
        show.table("CUDA toolkits", ("toolkit", "nvcc", "accepts", "present", "missing"), rows)
    else:
        click.echo("CUDA toolkits: none on this machine")
    if wheels is None:
        click.echo(f"from the package index: {no_wheels}")
    elif not any(toolkit.origin == "pypi" for toolkit in toolkits):
        sizes = f"{show.size(wheels.size)} to download, {show.size(wheels.unpacked)} on the disk"
        click.echo(f"from the package index: CUDA {wheels.version}, not fetched yet: {sizes}")


def _gpus(survey: Survey) -> None:
    if not survey.gpus:
        click.echo(f"GPUs: none ({survey.reason})")
        return
    rows = [
        (
            gpu.name,
            gpu.architecture,
            "the machine's" if gpu.memory_mib is None else f"{gpu.memory_mib / 1024:.0f} GiB",
            gpu.driver,
        )
        for gpu in survey.gpus
    ]
    show.table("GPUs", ("GPU", "architecture", "memory", "driver"), rows)


def _cache(builds: tuple[CachedBuild, ...], sizes: dict[str, int]) -> None:
    rows = [
        (
            "*" if build.current else "",
            build.key,
            "damaged: not used" if build.damaged else build.of,
            show.size(build.size),
        )
        for build in builds
    ]
    if rows:
        show.table("Builds in the cache (*: in use)", ("", "key", "of", "size"), rows, right=("size",))
    else:
        click.echo("builds in the cache: none")
    if sizes:
        click.echo(f"the cache holds {', '.join(f'{name} {show.size(size)}' for name, size in sizes.items())}")
        click.echo("these folders can be deleted while apex is not running; they are recreated when needed")


def _coming(coming: tuple[BuildOption, ...], unknown: str) -> None:
    if unknown:
        click.echo(f"what can be built is unknown: {unknown}")
        return
    rows = []
    for item in coming:
        when = f"yes, about {item.minutes:.0f} minutes" if item.possible else "no"
        why = [item.why_not, f"try: {item.hint}" if item.hint else ""] if item.why_not else []
        rows.append(
            (
                item.name,
                item.command,
                "in the cache" if item.cached else when,
                "\n".join(line for line in (*why, *item.notes) if line),
            )
        )
    show.table("What can be built here", ("build", "command", "possible", ""), rows)


def _json(
    machine: Machine,
    survey: Survey,
    toolkits: list[CudaToolkit],
    wheels: Wheels | None,
    builds: tuple[CachedBuild, ...],
    sizes: dict[str, int],
    coming: tuple[BuildOption, ...],
    unknown: str,
) -> None:
    value: dict[str, Any] = {
        "machine": asdict(machine),
        "gpus": [{**asdict(gpu), "architecture": gpu.architecture} for gpu in survey.gpus],
        "no_gpus": survey.reason,
        "cuda_toolkits": [
            {**asdict(toolkit), "missing": list(toolkit.missing), "host_compilers": host_limits(toolkit)}
            for toolkit in toolkits
        ],
        "cuda_wheels": {"version": wheels.version, "download": wheels.size, "unpacked": wheels.unpacked}
        if wheels
        else None,
        "builds": [asdict(build) for build in builds],
        "cache": sizes,
        "could_be_built": [{**asdict(item), "possible": item.possible} for item in coming],
        "error": unknown,
    }
    show.as_json(_plain(value))


def _plain(value: Any) -> Any:
    """Paths as text, wherever they are."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, (str, int, float)) else str(value)
