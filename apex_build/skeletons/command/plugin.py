"""A verb: apex my-name TEXT. Verbs need the plugin to be installed."""

import click

from apex_build.plugin_api import hookimpl

APEX_API = 3


@click.command("my-name")
@click.argument("text")
def command(text: str) -> None:
    """Say TEXT aloud."""
    click.echo(text.upper())


@hookimpl
def apex_commands() -> list[click.Command]:
    return [command]
