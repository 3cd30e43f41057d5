"""Rules for every verb and every error."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from apex_build import errors
from apex_build.cli import apex, show
from apex_build.cli.verbs import VERBS
from apex_build.plugins import command_summaries
from apex_build.progress import Step

ROOT = Path(__file__).parents[2]


def commands() -> list[tuple[str, click.Command]]:
    """Each verb, including the verbs of groups and of plugins."""
    context = click.Context(apex)
    found = []
    for name in (*VERBS, *command_summaries()):
        command = apex.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            found += [(f"{name} {below}", command.commands[below]) for below in command.commands]
        else:
            found.append((name, command))
    return found


@pytest.mark.parametrize(("name", "command"), commands(), ids=[name for name, _ in commands()])
def test_every_verb_has_help_with_examples_of_itself(name: str, command: click.Command) -> None:
    ran = CliRunner().invoke(apex, [*name.split(), "--help"])
    assert ran.exit_code == 0
    examples = ran.output.partition("Examples:")[2]
    assert f"apex {name}" in examples
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for line in examples.splitlines():
        for word in line.split("#")[0].split("|")[0].split():
            if word.startswith("--") and f"apex {name} " in line:
                assert word.partition("=")[0] in options, (
                    f"the example {line!r} uses {word}, which apex {name} does not know"
                )


def test_the_readme_shows_only_what_there_is() -> None:
    lines = [line.strip() for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    apex ")]
    known = dict(commands())
    assert len(lines) >= len(VERBS) - 1
    for line in lines:
        words = line.split("#")[0].split()
        name = words[1] if words[1] in known else f"{words[1]} {words[2]}"
        options = {option for parameter in known[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options, line


def test_each_error_has_an_exit_code_of_its_own_and_is_documented() -> None:
    classes = [
        c
        for c in vars(errors).values()
        if isinstance(c, type) and issubclass(c, errors.ApexError) and c is not errors.ApexError
    ]
    codes = [c.exit_code for c in classes]
    assert len(set(codes)) == len(codes) and not {0, 1, 2, 130} & set(codes)
    table = (ROOT / "docs" / "exit-codes.md").read_text()
    for c in classes:
        assert f"| {c.exit_code} | {c.__name__} | {inspect.cleandoc(c.__doc__ or '').replace(chr(10), ' ')} |" in table


def test_an_unknown_verb() -> None:
    ran = CliRunner().invoke(apex, ["quantise"])
    assert ran.exit_code == 2 and "No such command 'quantise'" in ran.output


def test_a_name_in_the_progress_is_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal rich renders it, and treats text in square brackets as tags."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with show.progress() as report:
        report(Step("kld: model[/].gguf on [red]", 1, 2, "chunks"))
