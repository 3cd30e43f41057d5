"""`apex plugins`: list, check and create plugins."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import click

from apex_build.cli import show
from apex_build.cli.groups import Group
from apex_build.cli.options import json_option, plugin_option
from apex_build.cli.verbs import VERBS
from apex_build.errors import OutputUnwritable, PluginFailed
from apex_build.hookspecs import API_VERSION
from apex_build.places import data_root
from apex_build.plugin_check import CheckedPlugin, check_plugin
from apex_build.plugins import Plugins, load_plugins
from apex_build.printable import printable
from apex_build.storage.outputs import whole_file

_PATH = click.Path(path_type=Path)
_SKELETONS = Path(__file__).parents[1] / "skeletons"
# kind of a new plugin -> its name in `Plugins.given`
KINDS = {
    "policy": "policies",
    "roles": "roles",
    "source": "sources",
    "evaluator": "evaluators",
    "gpu": "gpus",
    "command": "commands",
}
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@click.group(cls=Group)
def command() -> None:
    """List plugins, check one, or create one.

    \b
    Examples:
      apex plugins list
      apex plugins new policy small-head
      apex plugins check small-head/
    """


@command.command("list")
@plugin_option
@json_option
def list_(folders: tuple[Path, ...], json_: bool) -> None:
    """List the plugins and what each provides: built-in, installed, and from --plugin.

    \b
    Examples:
      apex plugins list --json
    """
    plugins = load_plugins(folders)
    rows = [_row(plugins, name) for name in plugins.origins]
    if json_:
        broken = [{"name": name, "error": error} for name, error in plugins.broken.items()]
        show.as_json({"api": API_VERSION, "plugins": rows, "left_out": broken})
        return
    built_in = str(data_root())
    cells = [
        [row["name"], "built in" if row["origin"].startswith(built_in) else row["origin"], str(row["api"]), _told(row)]
        for row in rows
    ]
    show.table(f"Plugins (API version {API_VERSION})", ("plugin", "from", "API", "gives"), cells)
    for name, error in plugins.broken.items():
        click.echo(f"left out: {name}: {printable(error)}")


@command.command()
@click.argument("folder", type=_PATH)
@json_option
def check(folder: Path, json_: bool) -> None:
    """Load the plugin in FOLDER, call its hooks, and render its policies for sample models.

    FOLDER holds plugin.py, or is a project around one such folder. Nothing is built or measured.

    \b
    Examples:
      apex plugins check small-head/
    """
    checked = check_plugin(folder)
    _check_verbs(checked)
    if json_:
        show.as_json({"name": checked.name, "folder": str(checked.folder), "api": checked.api, "gives": checked.given})
        return
    for kind, names in checked.given.items():
        if names:
            click.echo(f"{kind}: {', '.join(names)}")
    if checked.plugins.has_hook(checked.name, "apex_tensor_roles"):
        click.echo("gives roles to tensors")
    click.echo(f"{checked.folder}: good, made for plugin API version {checked.api}")


@command.command()
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.argument("name")
@click.option(
    "-o", "--output", "parent", type=_PATH, default=".", help="Where to make the folder NAME.  [default: here]"
)
def new(kind: str, name: str, parent: Path) -> None:
    """Create a plugin of KIND: NAME/, a Python project with a test.

    \b
    Examples:
      apex plugins new policy small-head
      apex plan model.gguf --plugin small-head/small_head --policy small-head
    """
    package = name.replace("-", "_")
    if not _NAME.fullmatch(name):
        raise click.UsageError(f"NAME is '{name}': expected small letters, digits and hyphens, such as small-head")
    if importlib.util.find_spec(package) is not None:
        raise click.UsageError(f"NAME is '{name}', but there is already a Python module '{package}': choose another")
    plugins = load_plugins()
    if name in plugins.origins or any(name in plugins.given(one)[KINDS[kind]] for one in plugins.origins):
        raise click.UsageError(f"NAME is '{name}', but there is already such a plugin: choose another")
    root = parent / name
    if root.exists():
        raise OutputUnwritable(f"{root} exists", hint="another NAME, or another folder with -o")
    for path, text in project(kind, name).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(root / path) as part:
            part.write_text(text, encoding="utf-8")
    check_plugin(root / package)
    show.note(f"its test: python -m pytest {root}")
    show.note(f"use it: --plugin {root / package}; or install it: pip install {root}")
    click.echo(root)


def project(kind: str, name: str) -> dict[str, str]:
    """The files of a new plugin: path in its folder -> text."""
    package = name.replace("-", "_")

    def named(text: str) -> str:
        return text.replace("my-name", name).replace("my_name", package)

    files = {"pyproject.toml": _SKELETONS / "pyproject.toml"}
    for path in sorted((_SKELETONS / kind).iterdir()):
        if path.suffix in (".py", ".jinja"):
            files[f"tests/{path.name}" if path.name.startswith("test_") else f"{package}/{named(path.name)}"] = path
    texts = {where: named(path.read_text(encoding="utf-8")) for where, path in files.items()}
    return {**texts, f"{package}/__init__.py": ""}


def _check_verbs(checked: CheckedPlugin) -> None:
    """A plugin's verb never replaces one of apex's own."""
    for name in checked.given["commands"]:
        if name in VERBS:
            raise PluginFailed(
                f"plugin '{checked.name}': its command '{name}' is already a verb of apex", hint="rename it"
            )


def _row(plugins: Plugins, name: str) -> dict[str, Any]:
    roles = {"tensor_roles": plugins.has_hook(name, "apex_tensor_roles")}
    return {"name": name, "origin": plugins.origins[name], "api": plugins.apis[name], **plugins.given(name), **roles}


def _told(row: dict[str, Any]) -> str:
    """`policies: i-nano, i-mini`; only the first few of many."""
    told = []
    for kind in KINDS.values():
        names = row[kind]
        more = f" and {len(names) - 3} more" if len(names) > 4 else ""
        if names:
            told.append(f"{kind}: {', '.join(names[:3] if more else names)}{more}")
    return "; ".join([*told, *(["roles of tensors"] if row["tensor_roles"] else [])])
