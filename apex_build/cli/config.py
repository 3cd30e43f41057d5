"""`apex config`: the defaults that apex.toml sets."""

from __future__ import annotations

import os
from pathlib import Path

import click

from apex_build.cli import defaults, show
from apex_build.cli.groups import Group
from apex_build.cli.options import json_option


@click.group(cls=Group)
def command() -> None:
    """Show the defaults set in apex.toml files, and where these files are looked for.

    They are in the user's configuration folder and in the current folder; docs/configuration.md lists the settings. The
    command line comes first, then the environment, then the folder's file, then the user's.
    """


@command.command("show")
@json_option
def show_(json_: bool) -> None:
    """List and check every setting, with its file.

    \b
    Examples:
      apex config show
      apex config show --json
    """
    from apex_build.cli import apex

    found = defaults.settings()
    context = click.Context(apex)
    for verb in dict.fromkeys(
        setting.section[0] for setting in found if setting.section and setting.section[0] != "plugins"
    ):
        if (named := apex.get_command(context, verb)) is not None:
            defaults.defaults(verb, named)  # raises for an option that the verb does not have
    over = {(*one.section, one.key): one.path for one in found}  # the later one counts
    variables = {name.replace("_", "-"): variable for name, variable in defaults.AT_TOP.items()}
    variables["plugins.off"] = defaults.PLUGINS_OFF
    rows = [
        {
            "setting": one.name, "value": one.value, "file": str(one.path),
            "overridden_by": _by(one, over, variables),
        }
        for one in found
    ]  # fmt: skip
    if json_:
        places = {"user": str(defaults.user_file()), "folder": str(Path.cwd() / defaults.NAME)}
        show.as_json({"files": [str(path) for path, _ in defaults.files()], "looked_for": places, "settings": rows})
        return
    for path, which in ((defaults.user_file(), "your own"), (Path.cwd() / defaults.NAME, "this folder's")):
        click.echo(f"{which}: {path}{'' if path.is_file() else ' (missing)'}")
    if rows:
        cells = [(row["setting"], row["value"], row["file"], row["overridden_by"] or "") for row in rows]
        show.table("Settings", ("setting", "value", "file", "overridden by"), cells)


def _by(setting: defaults.Setting, over: dict[tuple[str, ...], Path], variables: dict[str, str]) -> str | None:
    where = (*setting.section, setting.key)
    if (path := over[where]) != setting.path:
        return str(path)
    variable = variables.get(setting.name)
    given = os.environ.get(variable) if variable else None
    return variable if given and given != str(setting.value) and defaults.by_user(str(variable)) else None
