"""The command line: one file a verb, loaded when it is asked for."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from apex_build import __version__
from apex_build.errors import ApexError, DiskTooSmall, OutputUnwritable
from apex_build.native.lines import printable

# verb -> module of this folder; its click command is named `command`
VERBS = {
    "build": "build",
    "calibrate": "calibrate",
    "convert": "convert",
    "demo": "demo",
    "doctor": "doctor",
    "evaluate": "evaluate",
    "inspect": "inspect",
    "patch": "patch",
    "plan": "plan",
    "policies": "policies",
    "quantize": "quantize",
    "source": "source",
    "sweep": "sweep",
}


class Verbs(click.Group):
    """Imports a verb's module only when it is used, so that `apex --help` and small verbs start fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from apex_build.plugins import load_plugins

        return sorted({*VERBS, *load_plugins().commands()})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in VERBS:
            command: click.Command = importlib.import_module(f"apex_build.cli.{VERBS[name]}").command
            return command
        from apex_build.plugins import load_plugins

        return load_plugins().commands().get(name)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="apex")
def apex() -> None:
    """Calibrate and quantize mixture-of-experts models, MTP draft head included, on a patched llama.cpp.

    The stages, in order: source, patch, build, convert, calibrate, plan, quantize. Each verb has --help with examples.
    """


# What the machine says no to, wherever it does; any other OSError is a mistake of ours, and shows a traceback.
_REFUSALS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), DiskTooSmall.exit_code),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR), OutputUnwritable.exit_code),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `apex`; errors a user can meet become one message and their exit code, never a traceback."""
    for word in sys.argv[1:] if arguments is None else arguments:
        if word != word.encode(errors="replace").decode():
            click.echo(f"error: {os.fsencode(word)!r}: a name that is not UTF-8, which model files cannot record", err=True)
            sys.exit(2)
    try:
        code: Any = apex.main(args=arguments, prog_name="apex", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except ApexError as error:
        click.echo(f"error: {printable(error.message)}", err=True)  # a model file can put anything into a message
        if error.hint:
            click.echo(f"try:   {printable(error.hint)}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        click.echo(f"error: {error.filename or 'a file'}: {error.strerror}", err=True)
        sys.exit(_REFUSALS[error.errno])
    sys.exit(code if isinstance(code, int) else 0)
