"""No verb overwrites an input, whatever its name or link, or a file that it did not write."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from apex_runs import SMALL

from apex_build.cli import apex, main
from apex_build.cli.verbs import VERBS
from apex_build.errors import OutputUnwritable
from apex_build.native.toolset import Toolset
from apex_build.storage.locks import locked
from apex_build.storage.outputs import LOG, MANIFEST

PLUGIN = """
from pathlib import Path
from apex_build.hookspecs import Evaluator, Figure, PolicySpec, hookimpl

def weigh(task):
    return [Figure("bytes", 1.0)]

@hookimpl
def apex_evaluators():
    return [Evaluator("weight", weigh, uses=("reference", "text", "prompts", "data"))]

@hookimpl
def apex_policies():
    return [PolicySpec("mine", Path(__file__).with_name("mine.jinja"), "Q8_0")]
"""
SET = """
[[part]]
domain = "chat"
source = "jsonl"
file = "data.jsonl"

[[part]]
domain = "notes"
source = "files"
folder = "notes"
pattern = "*.txt"
"""
DIALOGUE = {
    "messages": [{"role": "user", "content": "What is two and two?"}, {"role": "assistant", "content": "Four."}]
}

# Names of the inputs in the world below; two of them end as what is written beside an output does.
FILES = (
    "model.gguf", "reference.gguf", "imatrix.gguf", "imatrix2.json", "text.txt", "text.log", "chat.jinja", "set.toml",
    "data.jsonl",
    "notes/one.txt", "prompts.jsonl", "winogrande.csv", "scales/plugin.py", "scales/mine.jinja", "scales/part.py",
    "types.txt",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, testbed: Path, calibrated: Path, tools: Toolset) -> Path:
    """A folder with one input of each kind, including a build of the tools."""
    root = tmp_path_factory.mktemp("world")
    (root / "scales").mkdir()
    (root / "notes").mkdir()
    shutil.copy(testbed, root / "model.gguf")
    shutil.copy(testbed, root / "reference.gguf")
    for name in ("imatrix.gguf", "imatrix2.json"):
        shutil.copy(calibrated, root / name)
    for name in ("text.txt", "text.log", "notes/one.txt"):
        (root / name).write_text("Some words about nothing, over and over. " * 200)
    (root / "chat.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    (root / "types.txt").write_text("token_embd=q8_0\n")
    (root / "set.toml").write_text(SET)
    (root / "data.jsonl").write_text((json.dumps(DIALOGUE) + "\n") * 40)
    (root / "prompts.jsonl").write_text('{"domain": "chat", "prompt": "Hello"}\n')
    (root / "winogrande.csv").write_text("1,The _ is red,apple,sky,1\n")
    (root / "scales" / "plugin.py").write_text(PLUGIN)
    (root / "scales" / "part.py").write_text("# a part of it\n")
    (root / "scales" / "mine.jinja").write_text("^output\\.weight$=Q8_0\n")
    shutil.copytree(tools.root, root / "tools", copy_function=_copy_or_link)
    return root


def _copy_or_link(source: str, target: str) -> None:
    """Libraries are links: ggml aborts a process that loads a second copy of it."""
    if ".so" in Path(source).name:
        Path(target).symlink_to(Path(source).resolve())
    else:
        shutil.copy2(source, target)


# verb and output -> its command, {} being where the output goes. The inputs of a command are those that stand in it.
COMMON = "--plugin scales --tools tools"
MINE = "--policy mine --imatrix imatrix.gguf --tensor-types types.txt"
CALIBRATE = f"calibrate model.gguf --chat-template chat.jinja --calibration-set set.toml {COMMON}"
EVALUATED = (
    "--reference reference.gguf --text text.txt --prompts prompts.jsonl --data winogrande=winogrande.csv --only weight"
)
COMMANDS = {
    "plan --write-rules": f"plan model.gguf {MINE} {COMMON} --write-rules {{}}",
    "calibrate -o": f"{CALIBRATE} -o {{}}",
    "calibrate --text -o": f"calibrate model.gguf --text text.txt {COMMON} -o {{}}",
    "calibrate --text log": f"calibrate model.gguf --text text.log {COMMON} -o {{}}",
    "calibrate --write-text": f"{CALIBRATE} --write-text {{}}",
    "quantize -o": f"quantize model.gguf {MINE} {COMMON} -o {{}}",
    "quantize json": f"quantize model.gguf --policy mine --imatrix imatrix2.json {COMMON} -o {{}}",
    "evaluate --results": f"evaluate model.gguf {EVALUATED} {COMMON} --results {{}}",
}
FORCED = ("plan", "calibrate", "quantize", "evaluate")


def inputs_of(name: str) -> Iterator[str]:
    given = COMMANDS[name].replace("=", " ").split()
    for file in FILES:
        top = file.partition("/")[0]
        of_set = file in ("data.jsonl", "notes/one.txt") and "set.toml" in given
        if file in given or of_set or (top == "scales" and "scales" in given):
            yield file
    yield "tools/bin/llama-quantize"


CASES = [(name, file) for name in COMMANDS for file in inputs_of(name)]


def run(world: Path, command: str, out: Path | str, *more: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command, run in this process: starting one for each case would take minutes."""
    monkeypatch.chdir(world)
    with pytest.raises(SystemExit) as ended:
        main([str(out) if word == "{}" else word for word in [*command.split(), *more]])
    return int(ended.value.code or 0)


def everything(world: Path) -> dict[str, tuple[int, int, int]]:
    """Size, inode and time of each file: they change when a file is overwritten.

    Folders do not count: the first import of a plugin puts __pycache__ beside it, which changes its folder's time.
    """
    files = ((str(path.relative_to(world)), path.lstat()) for path in world.rglob("*") if not path.is_dir())
    return {
        name: (about.st_size, about.st_ino, about.st_mtime_ns) for name, about in files if "__pycache__" not in name
    }


@pytest.mark.parametrize(("name", "file"), CASES, ids=[f"{name} onto {file}" for name, file in CASES])
def test_no_output_goes_onto_an_input(
    name: str, file: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(world)
    force = ["--force"] if COMMANDS[name].split()[0] in FORCED else []
    assert run(world, COMMANDS[name], file, *force, monkeypatch=monkeypatch) == OutputUnwritable.exit_code
    said = capsys.readouterr().err
    assert "would be overwritten" in said and file in said and "Traceback" not in said
    assert everything(world) == before


@pytest.mark.parametrize("link", ["symlink", "hard link"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_link_to_an_input_is_the_input(
    name: str,
    link: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = next(inputs_of(name))
    out = world / "another-name"
    (out.symlink_to if link == "symlink" else out.hardlink_to)(world / file)
    try:
        before = everything(world)
        force = ["--force"] if COMMANDS[name].split()[0] in FORCED else []
        assert run(world, COMMANDS[name], out, *force, monkeypatch=monkeypatch) == OutputUnwritable.exit_code
        assert f"{out} is the input {file}, and would be overwritten" in capsys.readouterr().err.replace(
            str(world) + "/" + file, file
        )
        assert everything(world) == before
    finally:
        out.unlink()


@pytest.mark.parametrize(
    ("name", "given", "out"),
    [("calibrate --text log", "text.log", "text"), ("quantize json", "imatrix2.json", "imatrix2")],
)
def test_nor_does_what_is_written_beside_it(
    name: str, given: str, out: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(world)
    assert run(world, COMMANDS[name], out, "--force", monkeypatch=monkeypatch) == OutputUnwritable.exit_code
    assert f"{given} is the input itself" in capsys.readouterr().err
    assert everything(world) == before


@pytest.mark.parametrize("ending", ["", MANIFEST, LOG])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_that_is_not_ours_is_not_replaced(
    name: str,
    ending: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_others = COMMANDS[name].endswith("-o {}")
    foreign = tmp_path / f"notes{ending if with_others else ''}"
    foreign.write_text('{"mine": true}')
    assert run(world, COMMANDS[name], tmp_path / "notes", monkeypatch=monkeypatch) == OutputUnwritable.exit_code
    said = capsys.readouterr().err
    assert str(foreign) in said and ("exists" in said or "not a result" in said)
    assert [path.name for path in tmp_path.iterdir()] == [foreign.name] and foreign.read_text() == '{"mine": true}'


@pytest.mark.parametrize("name", ["plan --write-rules", "calibrate --write-text"])
def test_a_text_is_replaced_with_force_and_left_alone_where_it_is_the_same(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    assert run(world, COMMANDS[name], out, "--force", monkeypatch=monkeypatch) == 0
    written = out.read_bytes()
    assert written != b"mine"
    assert run(world, COMMANDS[name], out, monkeypatch=monkeypatch) == 0
    assert out.read_bytes() == written and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_the_name_of_an_unfinished_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """calibrate keeps its periodic copies beside the output, and removes that folder."""
    (tmp_path / ".out.gguf.work").mkdir()
    mine = tmp_path / ".out.gguf.work" / "text.txt"
    mine.write_text("precious words, and more of them " * 100)
    command = COMMANDS["calibrate --text -o"]
    assert run(world, command, tmp_path / "out.gguf", monkeypatch=monkeypatch) == 71
    assert "exists and was not left by an unfinished run" in capsys.readouterr().err
    assert (
        run(world, command.replace("text.txt", str(mine)), tmp_path / "out.gguf", "--force", monkeypatch=monkeypatch)
        == 71
    )
    assert "is the input itself" in capsys.readouterr().err and mine.exists()


SWEEP = f"sweep model.gguf --over draft_head=Q8_0,Q4_K --with-head --only weight {COMMON} -o out"


def test_a_sweep_writes_over_no_input(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a separate folder: the user may have passed its files back as input."""
    (world / "out").mkdir()
    try:
        assert run(world, f"{SWEEP} --imatrix imatrix.gguf", "", monkeypatch=monkeypatch) == 0
        for place, more in (
            ("out/table.md", "--text {}"),
            ("out/imatrix-without-head.gguf", "--imatrix-without-head {}"),
            ("out/results.jsonl", "--prompts {}"),
            ("out/files/reference.gguf", "--reference {}"),
        ):
            kind = {"--text": "text.txt", "--imatrix-without-head": "imatrix.gguf", "--prompts": "prompts.jsonl"}
            (world / place).parent.mkdir(exist_ok=True)
            shutil.copy(world / kind.get(more.split()[0], "reference.gguf"), world / place)
            before = everything(world)
            command = f"{SWEEP} --imatrix imatrix.gguf {more.replace('{}', place)}"
            assert run(world, command, "", monkeypatch=monkeypatch) == OutputUnwritable.exit_code
            assert f"{place} is the input itself" in capsys.readouterr().err
            assert everything(world) == before
    finally:
        shutil.rmtree(world / "out")


def test_every_option_that_writes_is_in_these_tests() -> None:
    """A new option belongs in COMMANDS, or in the verb's own tests."""
    elsewhere = {  # verb, option -> where it is tried
        ("build", "--export"), ("calibration-sets", "--output"), ("convert", "--output"), ("demo", "--output"),
        ("imatrix", "--output"), ("plugins", "--output"), ("sweep", "--output"),
    }  # fmt: skip
    here = {
        (name.split()[0], {"-o": "--output"}.get(word, word))
        for name in COMMANDS
        for word in name.split()[1:]
        if word[0] == "-"
    }
    writing = re.compile(r"--(output|results|export|write-.*|rules|log|save.*)")
    found = set()
    for verb in VERBS:
        command = apex.get_command(click.Context(apex), verb)
        assert command is not None
        for one in [command, *getattr(command, "commands", {}).values()]:
            found |= {
                (verb, option) for parameter in one.params for option in parameter.opts if writing.fullmatch(option)
            }
    assert found <= here | elsewhere, found - here - elsewhere


def test_one_writer_at_a_time_whatever_cache_it_uses(testbed: Path, tools: Toolset, tmp_path: Path) -> None:
    """The lock is beside the output, where every run sees it."""
    out = tmp_path / "out.gguf"
    code = "import sys, time; from pathlib import Path; from apex_build.storage.locks import locked\n"
    code += "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(3600)"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(out)],
        stdout=subprocess.PIPE,
        env={**os.environ, "APEX_CACHE_DIR": str(tmp_path / "c")},
    ) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        for command in (
            ["quantize", testbed, "--policy", "compact", *SMALL, "-o", out],
            ["calibrate", testbed, "-o", out],
        ):
            with pytest.raises(SystemExit) as ended:
                main([str(word) for word in command])
            assert ended.value.code == OutputUnwritable.exit_code
        other.kill()
    with locked(out):  # of a killed run: the kernel has let it go
        pass
    assert not list(tmp_path.glob(".out*"))
