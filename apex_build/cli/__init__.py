"""The command line: one file per verb, loaded when it is used."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from apex_build import __version__
from apex_build.cli import defaults, streams
from apex_build.cli.groups import Group, listen, with_verbosity
from apex_build.cli.verbs import VERBS, all_verbs
from apex_build.errors import ApexError, DiskTooSmall, OutputUnwritable
from apex_build.printable import printable


class Verbs(Group):
    """Imports a verb's module only when it is used, so that `apex --help` and small verbs start fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return all_verbs()

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in VERBS:
            command: click.Command = importlib.import_module(f"apex_build.cli.{VERBS[name]}").command
            return with_verbosity(command)
        from apex_build.plugins import command_summaries, load_plugins

        found = load_plugins().commands().get(name) if name in command_summaries() else None
        return with_verbosity(found) if found else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Like click's, but without importing the verbs: their help is read from their files."""
        from apex_build.plugins import command_summaries

        others = command_summaries()
        room = formatter.width - 6 - max(map(len, (*VERBS, *others)))
        rows = [(name, summary(name) if name in VERBS else others[name]) for name in all_verbs()]
        with formatter.section("Commands"):
            formatter.write_dl([(name, click.Command(name, help=text).get_short_help_str(room)) for name, text in rows])

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        listen()
        if not extra.get("resilient_parsing"):
            defaults.apply()
        return super().make_context(info_name, args, parent, **extra)


def summary(verb: str) -> str:
    """The first sentence of a verb's help."""
    from apex_build.plugin_finding import summary_in

    return summary_in(Path(__file__).with_name(f"{VERBS[verb]}.py").read_text(encoding="utf-8"))


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="apex")
def apex() -> None:
    """Calibrate and quantize mixture-of-experts models, MTP draft head included, on a patched llama.cpp.

    The stages, in order: source, patch, build, convert, calibrate, plan, quantize. Each verb has --help with examples.
    """


with_verbosity(apex)

# What the machine says no to, wherever it does; any other OSError is a mistake of ours, and shows a traceback.
_REFUSALS: dict[int, type[ApexError]] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), DiskTooSmall),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR), OutputUnwritable),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `apex`; errors a user can meet become one message and their exit code, never a traceback."""
    streams.prepare()
    words = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in words
    for word in words:
        if word != word.encode(errors="replace").decode():
            click.echo(
                f"error: {os.fsencode(word)!r}: a name that is not UTF-8, which model files cannot record", err=True
            )
            sys.exit(2)
    try:
        code: Any = apex.main(args=arguments, prog_name="apex", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        if as_json:
            _json_line("UsageError", error.exit_code, error.format_message(), None)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except ApexError as error:
        _say(type(error).__name__, error.exit_code, error.message, error.hint, as_json=as_json)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader closed the pipe; exit as click does
        streams.discard()
        sys.exit(1)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        streams.discard()
        refusal = _REFUSALS[error.errno]
        _say(
            refusal.__name__,
            refusal.exit_code,
            f"{error.filename or _file_of(error)}: {error.strerror}",
            None,
            as_json=as_json,
        )
        sys.exit(refusal.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def _file_of(error: OSError) -> str:
    """The file whose writing failed. The system does not name it: it is the one that was open at that point."""
    name = "a file"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for value in frame.f_locals.values():
            found = getattr(value, "name", None) if isinstance(value, io.IOBase) else None
            name = os.fsdecode(found) if isinstance(found, (str, bytes)) else name
    return name


def _say(kind: str, code: int, message: str, hint: str | None, *, as_json: bool) -> None:
    """Of an error, on stderr: for people, and with --json for scripts too."""
    click.echo(f"error: {printable(message)}", err=True)  # a model file can put anything into a message
    if hint:
        click.echo(f"try:   {printable(hint)}", err=True)
    if as_json:
        _json_line(kind, code, message, hint)


def _json_line(kind: str, code: int, message: str, hint: str | None) -> None:
    """The last line on stderr."""
    told = {"error": {"class": kind, "exit_code": code, "message": message, "hint": hint}}
    click.echo(
        json.dumps(told, ensure_ascii=True), err=True
    )  # no control character of a file's name reaches a terminal
