"""`apex build`: compile the native tools of a pinned source, once for each set of inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import click

from apex_build.cli import packed_builds, show, values
from apex_build.errors import SourceMissing
from apex_build.hookspecs import GpuTarget
from apex_build.native.toolset import find_toolset
from apex_build.places import PIN_VARIABLE, chosen_pin_name, in_checkout
from apex_build.plugins import Plugins, load_plugins
from apex_build.source.fetch import ensure_source
from apex_build.source.pins import DEFAULT_PIN, Pin, load_pin
from apex_build.source.tree import require_tree
from apex_build.stages.build import BuildOptions, check_build
from apex_build.stages.build import plan as plan_tools
from apex_build.toolchain.build import cache
from apex_build.toolchain.build.cmake import default_jobs
from apex_build.toolchain.build.run import BuildPlan, Built, build
from apex_build.toolchain.cuda import toolkit as cuda_toolkit
from apex_build.toolchain.cuda.plan import Toolchain
from apex_build.toolchain.cuda.wheels import pinned_wheels
from apex_build.toolchain.machine.gpus import resolve, survey_gpus, targets_of
from apex_build.toolchain.packed.packing import Packed, check_out, pack


@click.command()
@click.option(
    "--pin",
    "pin_name",
    metavar="NAME",
    shell_complete=values.pins,
    envvar=PIN_VARIABLE,
    default=DEFAULT_PIN,
    show_default=True,
    help="Pin, or a pin's TOML file.",
)
@click.option(
    "--backend",
    type=click.Choice(("auto", "cpu", "cuda")),
    default="auto",
    show_default=True,
    help="auto: CUDA if there is a GPU.",
)
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    metavar="NAME",
    shell_complete=values.gpus,
    help="Build for this GPU, found here or not; may be repeated.",
)
@click.option(
    "--cuda-toolchain",
    type=click.Choice(("auto", "system", "pypi")),
    default="auto",
    show_default=True,
    help="auto: this machine's CUDA toolkit if it is complete and suitable, else wheels from the package index.",
)
@click.option(
    "--ptx", is_flag=True, help="CUDA: also PTX, which GPUs newer than the named ones compile at first start."
)
@click.option("--all-kv-types", is_flag=True, help="CUDA: flash attention for every pair of K and V cache types.")
@click.option(
    "--jobs", "-j", type=click.IntRange(min=1), metavar="N", help="Compilers at once. [default: by CPUs and memory]"
)
@click.option(
    "--native/--no-native", default=True, help="CPU: for this machine's alone (the default), or for any recent one."
)
@click.option("--force", is_flag=True, help="Recompile everything, even if it is in the cache.")
@click.option("--dry-run", is_flag=True, help="Say what would be built, and whether it is in the cache.")
@click.option("--list", "list_", is_flag=True, help="List the builds in the cache.")
@click.option("--list-gpus", is_flag=True, help="List the GPUs that --gpu knows: architecture, memory, CUDA version.")
@click.option("--verify", is_flag=True, help="Hash the files of the current build again.")
@click.option(
    "--export", type=click.Path(path_type=Path), metavar="FILE.tar.zst", help="Pack the build for another machine."
)
@click.option(
    "--cuda-runtime/--no-cuda-runtime", default=True, help="--export: with NVIDIA's libraries (the default), or not."
)
@click.option(
    "--import", "import_", type=click.Path(path_type=Path), metavar="FILE.tar.zst", help="Verify and install one."
)
@click.option("--make-current", is_flag=True, help="--import: let the other verbs use it.")
@click.option(
    "--plugin", "folders", multiple=True, type=click.Path(path_type=Path), help="Load a plugin from this folder (GPUs)."
)
@click.option("--json", "json_", is_flag=True, help="Print JSON: the build's manifest and folder.")
def command(
    pin_name: str,
    backend: str,
    gpus: tuple[str, ...],
    cuda_toolchain: str,
    ptx: bool,
    all_kv_types: bool,
    jobs: int | None,
    native: bool,
    force: bool,
    dry_run: bool,
    list_: bool,
    list_gpus: bool,
    verify: bool,
    export: Path | None,
    cuda_runtime: bool,
    import_: Path | None,
    make_current: bool,
    folders: tuple[Path, ...],
    json_: bool,
) -> None:
    """Compile llama.cpp's tools from a pinned, patched source; fetch the source if it is missing.

    With --gpu, or if this machine has a GPU, the tools can use it, and still run without one. Building needs no GPU
    and no installed CUDA toolkit. The other verbs use the build that was last made or selected.

    The same source, patches, compiler and options are never built twice. An interrupted build resumes where it stopped.
    CC, CXX, CFLAGS, CXXFLAGS and LDFLAGS are used, and are part of a build's identity. Builds of several pins can
    exist side by side: the other verbs use the build of the default pin, or of the pin in APEX_PIN or apex.toml.

    \b
    Examples:
      apex build
      apex build --gpu dgx-spark
      apex build --gpu h100 --gpu rtx4090 --cuda-toolchain pypi --dry-run
      apex build --backend cpu --pin latest --no-native --jobs 2
      apex build --dry-run
      apex build --list --json
      apex build --gpu h100 --export tools-h100.tar.zst
      apex build --import tools-h100.tar.zst --make-current
      CXX=clang++ apex build
    """
    if sum(map(bool, (list_, list_gpus, verify, import_, export or dry_run))) > 1:
        raise click.UsageError("only one of --list, --list-gpus, --verify, --import and --export or --dry-run")
    if make_current and not import_:
        raise click.UsageError("--make-current goes with --import")
    if export:
        check_out(export)  # before an hour of work
    if list_:
        _list(json_)
    elif list_gpus:
        packed_builds.list_gpus(load_plugins(folders), json_)
    elif import_:
        packed_builds.import_build(import_, make_current, json_)
    elif verify:
        toolset = find_toolset()
        count = cache.verify(toolset)
        if json_:
            show.as_json(
                {"root": str(toolset.root), "key": toolset.manifest.get("key"), "files": count, "verified": True}
            )
        else:
            click.echo(f"{count} files of {toolset.root} are unchanged since the build")
    elif dry_run:
        targets = _targets(backend, gpus, load_plugins(folders))
        wanted = BuildOptions(targets, cast(Toolchain, cuda_toolchain), ptx, all_kv_types, native)
        _dry_run(load_pin(pin_name), wanted, jobs, json_)
    else:
        pin = load_pin(pin_name)
        targets = _targets(backend, gpus, load_plugins(folders))
        wanted = BuildOptions(targets, cast(Toolchain, cuda_toolchain), ptx, all_kv_types, native)
        check_build(wanted)  # before anything is fetched
        with show.progress() as report:
            plan = _told(plan_tools(ensure_source(pin, report), pin, wanted))
            built = build(plan, jobs=jobs, force=force, report=report)
            packed = (
                pack(built.toolset, plan.source, export, cuda_runtime=cuda_runtime, report=report) if export else None
            )
        _show(built, packed, json_)


def _targets(backend: str, gpus: tuple[str, ...], plugins: Plugins) -> tuple[GpuTarget, ...]:
    """The GPUs to build for: the named ones, else this machine's; none for a CPU build."""
    if backend == "cpu":
        if gpus:
            raise click.UsageError("--gpu needs --backend cuda, not --backend cpu")
        return ()
    if gpus:
        return resolve(gpus, plugins)
    survey = survey_gpus()
    if survey.gpus:
        return targets_of(survey.gpus, plugins)
    if backend == "cuda":
        raise click.UsageError(
            f"no GPU was found ({survey.reason}): name one with --gpu; apex build --list-gpus lists the names"
        )
    or_make = ", make build GPU=NAME" if in_checkout() else ""
    show.note(f"no GPU was found ({survey.reason}): building for the CPU. For a GPU: apex build --gpu NAME{or_make}")
    return ()


def _told(plan: BuildPlan) -> BuildPlan:
    for note in plan.cuda.notes if plan.cuda else ():
        show.note(f"not used: {note}")
    return plan


def _show(built: Built, packed: Packed | None, json_: bool) -> None:
    toolset = built.toolset
    if json_:
        exported = (
            {"exported": {"path": str(packed.path), "sha256": packed.sha256, "size": packed.size}} if packed else {}
        )
        counts_ = {"compiler_cache_counts": built.counts}
        show.as_json({"root": str(toolset.root), "reused": built.reused, **counts_, **exported, **toolset.manifest})
        return
    counts = (
        f", compiler cache: {', '.join(f'{count} {name}' for name, count in built.counts.items())}"
        if built.counts
        else ""
    )
    how = "already built" if built.reused else f"built in {built.seconds:.0f} s{counts}"
    click.echo(f"{toolset.bin}: {how}")
    pin = (toolset.manifest.get("pin") or {}).get("name")
    if pin != chosen_pin_name():
        click.echo(f'to use these tools: {PIN_VARIABLE}={pin}, or `pin = "{pin}"` in apex.toml')
    if packed:
        packed_builds.show_packed(packed)


def _dry_run(pin: Pin, wanted: BuildOptions, jobs: int | None, json_: bool) -> None:
    try:
        plan = _told(plan_tools(require_tree(pin), pin, wanted))
    except SourceMissing:
        check_build(wanted)
        if json_:
            show.as_json({"pin": pin.name, "source": None, "cached": False})
        else:
            click.echo(
                f"the source of {pin.name} would be fetched first: {pin.carrier}, or its commit {pin.commit[:12]}"
            )
        return
    cached = cache.look_up(plan.key) is not None
    facts: dict[str, Any] = {
        "key": plan.key,
        "root": str(plan.root),
        "cached": cached,
        "source_folder": str(plan.source),
        **plan.ingredients,
    }
    if json_:
        show.as_json({**facts, "jobs": jobs or default_jobs()})
        return
    compiler = plan.compiler
    rows = [
        ("source", f"{plan.source} ({pin.name}, identity {plan.ingredients['source'][:12]})"),
        ("compiler", f"{compiler.cxx} ({compiler.kind} {compiler.version}, {compiler.target})"),
        *_cuda_rows(plan),
        ("options", "\n".join(f"{name}={value}" for name, value in sorted(plan.options.items()))),
        ("targets", "\n".join(plan.backend.targets)),
        ("jobs", jobs or default_jobs()),
        ("result", f"{plan.root} ({'in the cache: nothing to do' if cached else 'to be built'})"),
    ]
    show.table(f"Build {plan.key}", ("what", "value"), rows)


def _cuda_rows(plan: BuildPlan) -> list[tuple[str, str]]:
    if not plan.cuda:
        return []
    toolkit = plan.cuda.toolkit
    if toolkit.parts:
        where = cuda_toolkit.told(toolkit)
    else:
        wheels = pinned_wheels()
        where = (
            f"CUDA {toolkit.version} from the package index: {len(wheels.files)} wheels, {show.size(wheels.size)} "
            "to download"
        )
    return [
        ("GPUs", "\n".join(f"{target.name}: {target.description}" for target in plan.cuda.targets)),
        ("CUDA toolkit", where),
    ]


def _list(json_: bool) -> None:
    builds = cache.all_builds()
    if json_:
        show.as_json([{"root": str(item.root), "current": item.current, **item.manifest} for item in builds])
        return
    if not builds:
        click.echo("nothing has been built yet; apex build builds the tools")
        return
    rows = [
        (
            "*" if item.current else "",
            item.key,
            (item.manifest.get("pin") or {}).get("name", "-"),
            item.manifest.get("backend", "-"),
            " ".join(str(item.manifest.get("compiler", {}).get(name, "-")) for name in ("kind", "version")),
            len(item.manifest.get("patches", ())),
            item.manifest.get("built", "-"),
            f"{item.manifest.get('seconds', 0):.0f} s",
            show.size(
                sum(path.stat().st_size for path in item.root.rglob("*") if path.is_file() and not path.is_symlink())
            ),
        )
        for item in builds
    ]
    columns = ("", "key", "pin", "backend", "compiler", "patches", "built", "took", "size")
    show.table("Builds in the cache (*: the one in use)", columns, rows, right=("patches", "took", "size"))
