"""`apex policies`: the policies and their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from apex_build.cli import show, values
from apex_build.cli.options import json_option, plugin_option
from apex_build.loaded import LoadedPolicy
from apex_build.plugins import load_plugins


@click.command()
@click.argument("name", required=False, shell_complete=values.policies)
@plugin_option
@json_option
def command(name: str | None, folders: tuple[Path, ...], json_: bool) -> None:
    """List the policies; with NAME, the parameters of that policy.

    \b
    Examples:
      apex policies
      apex policies i-nano
      apex policies --plugin my-plugin/ --json
    """
    plugins = load_plugins(folders)
    policies = plugins.policies()
    if name is not None:
        policies = {name: plugins.policy(name)}
    if json_:
        show.as_json([_json(policy) for policy in policies.values()])
        return
    rows = [(p.name, p.plugin, p.base_type, "yes" if p.calibrated else "no", p.description) for p in policies.values()]
    show.table("Policies", ("policy", "plugin", "base type", "imatrix", "description"), rows)
    if name is None:
        parameters = sorted({parameter for policy in policies.values() for parameter in policy.parameters})
        click.echo(f"--set takes, if the policy has them: {', '.join(parameters)}; and for all: base_type")
        click.echo("apex policies NAME shows their defaults and what they mean")
        return
    settings = [
        (parameter, str(p.default), " or ".join((p.kind, *p.words)), p.help)
        for parameter, p in policies[name].parameters.items()
    ]
    settings.append(
        ("base_type", policies[name].base_type, "text", "llama-quantize's type, for tensors without a rule")
    )
    show.table("Parameters, for --set NAME=VALUE", ("name", "default", "takes", "meaning"), settings)


def _json(policy: LoadedPolicy) -> dict[str, Any]:
    return {
        "name": policy.name,
        "plugin": policy.plugin,
        "base_type": policy.base_type,
        "calibrated": policy.calibrated,
        "description": policy.description,
        "template": str(policy.template) if policy.template else None,
        "parameters": {
            name: {"default": p.default, "kind": p.kind, "words": list(p.words), "help": p.help}
            for name, p in policy.parameters.items()
        },
    }
