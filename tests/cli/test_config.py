"""apex.toml: defaults for options, precedence, and settings that a folder's file may not have."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from apex_runs import SMALL, run_apex

from apex_build.cli import show
from apex_build.gguf_model.header import read_header
from apex_build.native.toolset import Toolset

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


@pytest.fixture
def run(tmp_path: Path, here: Path) -> Run:
    """Run apex in a folder, with the user's configuration in another."""

    def run(*arguments: object, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "APEX_CONFIG": str(tmp_path / "own.toml"), **variables}
        return run_apex(*arguments, code=code, cwd=here, env=environment)

    return run


def test_defaults_of_a_verb(tools: Toolset, run: Run, here: Path, tmp_path: Path, testbed: Path) -> None:
    (tmp_path / "own.toml").write_text('[plan]\npolicy = "compact"\nset = ["edge=1", "near=1"]\njson = true\n')
    value = json.loads(run("plan", testbed).stdout)
    assert (value["policy"], value["parameters"]["edge"]) == ("compact", 1)


def test_who_comes_first(tools: Toolset, run: Run, here: Path, tmp_path: Path, testbed: Path) -> None:
    """The command line, then the environment, then the folder's file, then the user's file."""
    (tmp_path / "own.toml").write_text(
        'threads = 3\n[evaluate]\nset = ["perplexity.chunks=2"]\n[build]\njobs = 3\n[policies]\njson = true\n'
    )
    jobs = ("build", "--backend", "cpu", "--dry-run", "--json")
    assert json.loads(run(*jobs).stdout)["jobs"] == 3
    (here / "apex.toml").write_text("[build]\njobs = 2\n")
    assert json.loads(run(*jobs).stdout)["jobs"] == 2
    assert json.loads(run(*jobs, "--jobs", 1).stdout)["jobs"] == 1
    (tmp_path / "own.toml").write_text(f'tools = "{tmp_path}/nowhere"\ncache_dir = "{tmp_path}/cache"\n')
    assert "nowhere does not contain built tools" in run("plan", testbed, "--policy", "compact", code=22).stderr
    assert (
        f"{tmp_path}/elsewhere does not contain built"
        in run("plan", testbed, "--policy", "compact", code=22, APEX_TOOLS=f"{tmp_path}/elsewhere").stderr
    )
    assert json.loads(run("build", "--list", "--json").stdout) == [], "the cache is another"
    assert json.loads(run("build", "--list", "--json", APEX_CACHE_DIR=f"{tmp_path}/third").stdout) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("thraeds = 3", "there is no 'thraeds'; near it: threads; the top level takes"),
        ("[quantise]\nthreads = 3", "there is no 'quantise'; near it: quantize"),
        ("[plan]\npolcy = 'compact'", "there is no 'polcy'; near it: policy; apex plan has the options"),
        ("[source.fetsch]\nforce = true", "there is no 'fetsch'; near it: fetch"),
        ("[plugins]\nof = ['x']", "there is no 'of'; near it: off"),
        ("[plan]\npolicy = ['compact']", r"plan.policy is \['compact'\], expected one value"),
        ("[calibrate]\nchunks = 'many'", "calibrate.chunks is 'many'"),
        ("[calibrate]\nmtp = 'yes'", "calibrate.mtp is 'yes', expected true or false"),
        ("threads = ", "own.toml: not TOML"),
        ("threads = 'x'\n[plan]\nx=1", "there is no 'x'"),
    ],
)
def test_what_there_is_not(text: str, said: str, run: Run, tmp_path: Path) -> None:
    """`config show` checks the whole file."""
    (tmp_path / "own.toml").write_text(text)
    ran = run("config", "show", code=3)
    assert re.search(said, ran.stderr), ran.stderr
    assert "own.toml" in ran.stderr


@pytest.mark.parametrize(
    "text",
    [
        "[plan]\nplugin = ['.']", "[plugins]\nfolders = ['.']", "tools = '.'", "cache_dir = '.'", "source_dir = '.'",
        "pin = './x.toml'",
        "[convert]\npython = './python'", "[quantize]\nforce = true", "[evaluate]\ntool-argument = ['--rpc']",
        "[calibrate]\noutput = 'x'",
    ],
)  # fmt: skip
def test_a_folders_file_cannot_choose_what_is_run_or_replaced(text: str, run: Run, here: Path, tmp_path: Path) -> None:
    """It may be part of a download."""
    (here / "apex.toml").write_text(text)
    (here / "plugin.py").write_text("raise SystemExit('run')")
    ran = run("policies", code=3)
    assert (
        "may only be set in your own file" in ran.stderr and f"move the line to {tmp_path / 'own.toml'}" in ran.stderr
    )
    (here / "apex.toml").unlink()
    (tmp_path / "own.toml").write_text(text.replace("'.'", f"'{tmp_path}'").replace("./x.toml", f"{tmp_path}/x.toml"))
    run("config", "show")


def test_config_show(run: Run, here: Path, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('threads = 3\n[plugins]\noff = ["a"]\n')
    (here / "apex.toml").write_text("threads = 2\n")
    value = json.loads(run("config", "show", "--json", APEX_PLUGINS_OFF="b").stdout)
    assert [(one["setting"], one["value"], bool(one["overridden_by"])) for one in value["settings"]] == [
        ("threads", 3, True), ("plugins.off", ["a"], True), ("threads", 2, False),
    ]  # fmt: skip
    said = run("config", "show").stdout
    assert f"your own: {tmp_path / 'own.toml'}" in said and f"this folder's: {here / 'apex.toml'}" in said


def test_who_quantizes(tools: Toolset, run: Run, testbed: Path, tmp_path: Path, here: Path) -> None:
    """From the configuration, never guessed."""
    (tmp_path / "own.toml").write_text('quantized_by = "Some One"\n')
    quantize = (
        "quantize",
        testbed,
        "--policy",
        "uniform",
        "--set",
        "type=Q8_0",
        "--no-load-check",
        "--force",
        "-o",
        here / "x.gguf",
    )

    def said() -> object:
        return read_header(here / "x.gguf").metadata.get("general.quantized_by")

    run(*quantize)
    assert said() == "Some One"
    run(*quantize, APEX_QUANTIZED_BY="Another")
    assert said() == "Another"
    run(*quantize, "--meta", "quantized_by=A Third", APEX_QUANTIZED_BY="Another")
    assert said() == "A Third"
    (here / "apex.toml").write_text('quantized_by = "a stranger"\n')
    assert "may only be set in your own file" in run("policies", code=3).stderr
    (here / "apex.toml").unlink()
    (tmp_path / "own.toml").unlink()
    run(*quantize)
    assert said() is None


def test_quiet_and_verbose(tools: Toolset, run: Run, testbed: Path) -> None:
    verbose, usual, quiet = (run("plan", testbed, "--policy", "compact", *option) for option in (["-v"], [], ["-q"]))
    assert re.search(r"^\$ \S*llama-quantize .*--dry-run", verbose.stderr, re.MULTILINE)
    assert "llama-quantize --dry-run" not in usual.stderr and usual.stdout == quiet.stdout == verbose.stdout
    assert re.search(r"^\$ \S*llama-quantize", run("-v", "plan", testbed, "--policy", "compact").stderr, re.MULTILINE)
    assert "exclude each other" in run("plan", testbed, "--policy", "compact", "-q", "-v", code=2).stderr
    small = ("plan", testbed, "--policy", "i-nano", *SMALL)
    assert "note:" in run(*small).stderr and "note:" not in run(*small, "-q").stderr


def test_remarks_are_left_to_the_one_place_that_knows_of_quiet() -> None:
    """Verbs write only warnings and errors to standard error directly; everything else goes through `show.note`."""
    of_their_own = ("show.py", "groups.py", "__init__.py")  # where that is decided, what -v adds, how a run ends
    for file in sorted(
        set(Path(show.__file__).parent.glob("*.py")) - {Path(show.__file__).with_name(name) for name in of_their_own}
    ):
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            named = {keyword.arg: keyword.value for keyword in call.keywords}
            if ast.unparse(call.func) == "click.echo" and "err" in named:
                text = ast.unparse(call.args[0]).lstrip("f")
                assert re.match(r"['\"](warning: |try: |failed: )", text), f"{file.name}:{call.lineno}: {text}"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("apex qu", "quantize"),
        ("apex plan --policy i-n", "i-nano"),
        ("apex quantize --policy i-n", "i-nano-mtp"),
        ("apex build --gpu dgx", "dgx-spark"),
        ("apex build --gpu h100,rtx50", "h100,rtx5090"),
        ("apex evaluate --only draft-h", "draft-head"),
        ("apex sweep --only kl", "kld"),
        ("apex calibrate --calibration-set d", "default"),
        ("apex source fetch --pin la", "latest"),
        ("apex policies i-m", "i-mini"),
    ],
)
def test_completion(words: str, wanted: str, run: Run) -> None:
    """The way bash asks, in click's protocol."""
    count = str(len(words.split()) - 1)
    ran = run(_APEX_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=count)
    assert f"plain,{wanted}" in ran.stdout.splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, run: Run) -> None:
    assert "_APEX_COMPLETE" in run("completion", shell).stdout
