"""What all verbs share: suggestions for a mistyped name, -q and -v, and defaults from apex.toml."""

from __future__ import annotations

import logging

import click

from apex_build.cli import defaults
from apex_build.near import nearby

QUIET, NORMAL, VERBOSE = -1, 0, 1
_META = "apex_build.verbosity"


class Group(click.Group):
    """A group of verbs."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        command = None if name.startswith("-") else self.get_command(ctx, name)
        if command is None and not ctx.resilient_parsing and not name.startswith("-"):
            ctx.fail(f"No such command '{name}'{nearby(name, self.list_commands(ctx))}")
        if command is not None and ctx.parent is None:
            ctx.default_map = {**(ctx.default_map or {}), name: defaults.defaults(name, command)}
        return super().resolve_command(ctx, args)


def verbosity() -> int:
    """QUIET, NORMAL or VERBOSE, as the command line says."""
    context = click.get_current_context(silent=True)
    return int(context.meta.get(_META, NORMAL)) if context else NORMAL


def with_verbosity(command: click.Command) -> click.Command:
    """The command, and all below it, with the options -q and -v."""
    taken = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    if not taken & {"-q", "--quiet", "-v", "--verbose"}:
        command.params += [
            click.Option(
                ["-q", "--quiet"], is_flag=True, expose_value=False, is_eager=True, callback=_quiet,
                help="Print only results, warnings and errors: no progress, no remarks.",
            ),
            click.Option(
                ["-v", "--verbose"], is_flag=True, expose_value=False, is_eager=True, callback=_verbose,
                help="Also print which programs are run, with all their arguments.",
            ),
        ]  # fmt: skip
    if isinstance(command, click.Group):
        for below in command.commands.values():
            with_verbosity(below)
    return command


def _quiet(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        if context.meta.get(_META) == VERBOSE:
            raise click.UsageError("--quiet and --verbose exclude each other")
        context.meta[_META] = QUIET


def _verbose(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        if context.meta.get(_META) == QUIET:
            raise click.UsageError("--quiet and --verbose exclude each other")
        context.meta[_META] = VERBOSE
        _debug(defaults.told())


class _ToStderr(logging.Handler):
    """Log messages for people: warnings always, programs that are run with -v."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            click.echo(f"warning: {record.getMessage()}", err=True)
        elif verbosity() == VERBOSE:
            _debug([record.getMessage()])


def _debug(lines: list[str]) -> None:
    for line in lines:
        click.echo(line, err=True)


def listen() -> None:
    """Show log messages."""
    logger = logging.getLogger("apex_build")
    if not any(isinstance(handler, _ToStderr) for handler in logger.handlers):
        logger.addHandler(_ToStderr())
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
