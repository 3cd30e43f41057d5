"""`apex completion`: what a shell needs to complete verbs, options and names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def command(shell: str) -> None:
    """Print the script that lets SHELL complete verbs, options, policies, GPUs, evaluators and calibration sets.

    \b
    Examples:
      apex completion bash > ~/.local/share/bash-completion/completions/apex
      apex completion zsh > ~/.zfunc/_apex                      # with fpath+=~/.zfunc before compinit
      apex completion fish > ~/.config/fish/completions/apex.fish
    """
    from apex_build.cli import apex

    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(apex, {}, "apex", "_APEX_COMPLETE").source())
