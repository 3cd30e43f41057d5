"""Start `apex`: what is imported, what a broken plugin does, and how scripts see errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from apex_runs import run_apex

from apex_build.cli import apex, summary
from apex_build.cli.verbs import VERBS

# What a start of `apex` must not wait for: hundreds of milliseconds together.
HEAVY = ("numpy", "gguf", "cffi", "rich", "jinja2", "httpx2", "unearth", "requests", "matplotlib")


def imported(*arguments: str) -> list[str]:
    """The modules imported by a run."""
    code = f"""
import os, sys
from apex_build.cli import main
try:
    main({list(arguments)!r})
finally:
    sys.stdout.flush()
    os.write(1, (chr(0) + " ".join(sys.modules)).encode())  # past what makes sys.stdout harmless to a terminal
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    _, marked, modules = ran.stdout.rpartition("\0")
    assert marked, ran.stderr
    return modules.split()


@pytest.mark.parametrize("arguments", [("-h",), ("--version",), ("quantise",), ("completion", "bash")], ids=" ".join)
def test_the_help_imports_little(arguments: tuple[str, ...]) -> None:
    """Counted, not timed: imports no verb, no plugin, and nothing slow."""
    found = imported(*arguments)
    assert not [name for name in found if name.partition(".")[0] in HEAVY]
    verbs = [name for name in found if name.startswith("apex_build.cli.")]
    assert set(verbs) <= {f"apex_build.cli.{name}" for name in ("defaults", "groups", "completion", "streams", "verbs")}
    assert not [name for name in found if name.startswith("_apex_plugin_")]
    assert len(found) < 450


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_says_of_each_verb_what_the_verb_says(verb: str) -> None:
    command = apex.get_command(click.Context(apex), verb)
    assert command is not None
    said = click.Command(verb, help=summary(verb)).get_short_help_str(500)
    assert said and said == command.get_short_help_str(500)


def package(where: Path, code: str, name: str = "apex-broken", entry: str = "broken") -> dict[str, str]:
    """An environment with an installed package that contains a plugin."""
    (where / f"{name.replace('-', '_')}.py").write_text(code)
    info = where / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[apex_build]\n{entry} = {name.replace('-', '_')}\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(where), os.environ.get("PYTHONPATH", "")])}


HOOK = "from apex_build.hookspecs import *\n@hookimpl\n"
BROKEN = {
    "import": "import nothing_like_it",
    "hook": HOOK + "def apex_polices(): return []",
    "policies": HOOK + "def apex_policies(): return 1 / 0",
    "commands": HOOK + "def apex_commands(): return ['wave']",
    "taken": HOOK + "def apex_policies(): return [PolicySpec('i-nano', Path(__file__), 'Q8_0')]",
    "template": HOOK + "def apex_policies(): return [PolicySpec('mine', Path('gone.jinja'), 'Q8_0')]",
}


@pytest.fixture(scope="module")
def policies() -> Any:
    """The list without the plugin."""
    return json.loads(run_apex("policies", "--json").stdout)


@pytest.mark.slow
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_installed_plugin_costs_a_warning(how: str, testbed: Path, tmp_path: Path, policies: Any) -> None:
    """The error names its package and how to leave it out; commands that do not need it still work."""
    environment = package(tmp_path, BROKEN[how])
    for arguments in (("-h",), ("inspect", testbed, "--json"), ("policies", "--json")):
        ran = run_apex(*arguments, env=environment)
        warned = [line for line in ran.stderr.splitlines() if line.startswith("warning: ")]
        if (arguments == ("-h",) and how in ("policies", "taken", "template")) or (
            arguments[0] == "inspect" and how not in ("import", "hook")
        ):
            assert not warned, "it was not asked"
            continue
        if arguments[0] == "policies" and how == "commands":
            continue
        (line,) = warned
        assert "'broken'" in line and "package apex-broken" in line and "APEX_PLUGINS_OFF=broken" in line
    names = [policy["name"] for policy in json.loads(ran.stdout)]
    assert "i-nano" in names and "mine" not in names
    for name in ("broken", "Apex_Broken", "other, apex-broken") if how == "policies" else ("broken",):
        ran = run_apex("policies", "--json", env={**environment, "APEX_PLUGINS_OFF": name})
        assert ran.stderr == "" and json.loads(ran.stdout) == policies


def test_a_policy_that_a_broken_plugin_may_have_had(tmp_path: Path, testbed: Path) -> None:
    ran = run_apex("plan", testbed, "--policy", "mine", code=60, env=package(tmp_path, BROKEN["import"]))
    assert "Plugins that were left out: broken" in ran.stderr


@pytest.mark.slow
def test_verbs_of_an_installed_plugin_are_looked_up_once(tmp_path: Path) -> None:
    """The help does not import it again unless it has changed."""
    code = HOOK + "def apex_commands():\n import click\n print('LOADED', file=__import__('sys').stderr)\n"
    code += " return [click.Command('wave', callback=lambda: click.echo('o/'), help='Wave a hand.')]\n"
    environment = {**package(tmp_path, code, "apex-wave", "wave"), "APEX_CACHE_DIR": str(tmp_path / "cache")}
    first, second = (run_apex("-h", env=environment) for _ in range(2))
    assert "LOADED" in first.stderr and "LOADED" not in second.stderr
    assert (
        first.stdout == second.stdout
        and "wave         Wave a hand." in " ".join(first.stdout.splitlines()).replace("  Wave", "   Wave")
    ) or "Wave a hand." in first.stdout
    assert run_apex("wave", env=environment).stdout == "o/\n"
    (tmp_path / "apex_wave.py").write_text(code.replace("'wave'", "'ripple'"))
    os.utime(tmp_path / "apex_wave.py", ns=(1, 1))
    assert "ripple" in run_apex("-h", env=environment).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (("plan", "nowhere.gguf", "--policy", "i-nano", "--json"), 40, "ModelMissing"),
        (("plan", "nowhere.gguf", "--policy", "i-nanno", "--json"), 60, "PolicyUnknown"),
        (("inspect", "nowhere.gguf", "--json"), 40, "ModelMissing"),
        (("calibrate", "nowhere.gguf", "--json"), 40, "ModelMissing"),
        (("build", "--gpu", "h1000000", "--dry-run", "--json"), 25, "GpuUnknown"),
        (("plan", "--json"), 2, "UsageError"),
        (("evaluate", "--json"), 2, "UsageError"),
    ],
)
def test_errors_for_scripts(arguments: tuple[str, ...], code: int, kind: str, tmp_path: Path) -> None:
    ran = run_apex(*arguments, code=code, cwd=tmp_path)
    said = json.loads(ran.stderr.splitlines()[-1])["error"]
    assert (said["class"], said["exit_code"]) == (kind, code) and said["message"] and "hint" in said
    assert ran.stdout == ""


def test_a_built_in_plugins_verb_is_listed_without_importing_the_plugin() -> None:
    """Like built-in verbs, by the text of its file; its help is the verb's help."""
    from apex_build.plugins import command_summaries, load_plugins

    found = command_summaries()
    assert {name: command.get_short_help_str(500) for name, command in load_plugins().commands().items()} == {
        name: click.Command(name, help=text).get_short_help_str(500) for name, text in found.items()
    }
    assert "fit" in found
