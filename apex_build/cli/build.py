"""`apex build`: compile the native tools of a pinned source, once for each set of inputs."""

from __future__ import annotations

from typing import Any

import click

from apex_build.cli import show
from apex_build.errors import SourceMissing
from apex_build.native.toolset import find_toolset
from apex_build.source.fetch import ensure_source
from apex_build.source.pins import DEFAULT_PIN, Pin, load_pin
from apex_build.source.tree import require_tree
from apex_build.toolchain import cache
from apex_build.toolchain.backends import BACKENDS
from apex_build.toolchain.build import BuildPlan, Built, build, plan_build
from apex_build.toolchain.cmake import default_jobs
from apex_build.toolchain.compilers import find_compiler


@click.command()
@click.option("--pin", "pin_name", metavar="NAME", default=DEFAULT_PIN, show_default=True, help="Pin, or a pin's TOML file.")
@click.option("--backend", type=click.Choice(sorted(BACKENDS)), default="cpu", show_default=True, help="What to compute on.")
@click.option("--jobs", "-j", type=click.IntRange(min=1), metavar="N", help="Compilers at once. [default: by CPUs and memory]")
@click.option("--native/--no-native", default=True, show_default=True, help="For this machine's CPU alone, or for any recent one.")
@click.option("--force", is_flag=True, help="Compile everything anew, even if it is in the cache.")
@click.option("--dry-run", is_flag=True, help="Say what would be built, and whether it is in the cache.")
@click.option("--list", "list_", is_flag=True, help="List the builds in the cache.")
@click.option("--verify", is_flag=True, help="Hash the files of the current build again.")
@click.option("--json", "json_", is_flag=True, help="Print JSON: the build's manifest and folder.")
def command(
    pin_name: str,
    backend: str,
    jobs: int | None,
    native: bool,
    force: bool,
    dry_run: bool,
    list_: bool,
    verify: bool,
    json_: bool,
) -> None:
    """Compile llama.cpp's tools from a pinned, patched source; fetch the source if it is not there.

    The same source, patches, compiler and options are never built twice. An interrupted build goes on where it stopped. CC, CXX,
    CFLAGS, CXXFLAGS and LDFLAGS count, and are part of a build's identity. A build that is not of the default pin is used with
    APEX_TOOLS=<its folder>.

    \b
    Examples:
      apex build
      apex build --pin latest --no-native --jobs 2
      apex build --dry-run
      apex build --list --json
      CXX=clang++ apex build
    """
    if list_:
        _list(json_)
    elif verify:
        toolset = find_toolset()
        count = cache.verify(toolset)
        click.echo(f"{count} files of {toolset.root} are as they were built")
    elif dry_run:
        _dry_run(load_pin(pin_name), backend, native, jobs, json_)
    else:
        pin = load_pin(pin_name)
        find_compiler()  # before anything is fetched
        with show.progress() as report:
            plan = plan_build(ensure_source(pin, report), BACKENDS[backend], pin, native=native)
            built = build(plan, jobs=jobs, force=force, report=report)
        _show(built, json_)


def _show(built: Built, json_: bool) -> None:
    toolset = built.toolset
    if json_:
        show.as_json({"root": str(toolset.root), "reused": built.reused, "compiler_cache_counts": built.counts, **toolset.manifest})
        return
    counts = f", compiler cache: {built.counts['hits']} hits, {built.counts['misses']} misses" if built.counts else ""
    how = "already built" if built.reused else f"built in {built.seconds:.0f} s{counts}"
    click.echo(f"{toolset.bin}: {how}")
    if toolset.manifest["pin"]["name"] != DEFAULT_PIN:
        click.echo(f"to use these tools: APEX_TOOLS={toolset.root}")


def _dry_run(pin: Pin, backend: str, native: bool, jobs: int | None, json_: bool) -> None:
    try:
        plan: BuildPlan = plan_build(require_tree(pin), BACKENDS[backend], pin, native=native)
    except SourceMissing:
        if json_:
            show.as_json({"pin": pin.name, "source": None, "cached": False})
        else:
            click.echo(f"the source of {pin.name} would be fetched first: {pin.requirement}, or its commit {pin.commit[:12]}")
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
        ("options", "\n".join(f"{name}={value}" for name, value in sorted(plan.options.items()))),
        ("targets", "\n".join(plan.backend.targets)),
        ("jobs", jobs or default_jobs()),
        ("result", f"{plan.root} ({'in the cache: nothing to do' if cached else 'to be built'})"),
    ]
    show.table(f"Build {plan.key}", ("what", "value"), rows)


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
            (item.manifest["pin"] or {}).get("name", "-"),
            item.manifest["backend"],
            f"{item.manifest['compiler']['kind']} {item.manifest['compiler']['version']}",
            len(item.manifest["patches"]),
            item.manifest["built"],
            f"{item.manifest['seconds']:.0f} s",
            show.size(sum(path.stat().st_size for path in item.root.rglob("*") if path.is_file() and not path.is_symlink())),
        )
        for item in builds
    ]
    columns = ("", "key", "pin", "backend", "compiler", "patches", "built", "took", "size")
    show.table("Builds in the cache (*: the one in use)", columns, rows, right=("patches", "took", "size"))
