"""Convert for real if a Python with torch is available; test refusals always."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from apex_runs import ended_at
from checkpoints import make_checkpoint
from click.testing import CliRunner
from packaging.requirements import Requirement

from apex_build.cli import apex
from apex_build.conversion import convert, driver, environment
from apex_build.errors import (
    CheckpointInvalid,
    ConversionFailed,
    DiskTooSmall,
    EnvironmentUnusable,
    OutputUnwritable,
    ParameterUnknown,
)
from apex_build.gguf_model.header import read_header
from apex_build.native.run import run_tool
from apex_build.storage.locks import locked


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "a checkpoint, größer")


# the smallest build backend there is, so that pip needs nothing from anywhere
BACKEND = """
import zipfile

def build_wheel(folder, settings=None, metadata=None):
    name = "little-1.0-py3-none-any.whl"
    about = "Metadata-Version: 2.1\\nName: little\\nVersion: 1.0\\n"
    wheel = "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
    with zipfile.ZipFile(folder + "/" + name, "w") as file:
        for member, text in (("METADATA", about), ("WHEEL", wheel), ("RECORD", "")):
            file.writestr("little-1.0.dist-info/" + member, text)
        file.writestr("little.py", "")
    return name
"""


def left(folder: Path, *expected: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(expected)


# --- with torch -------------------------------------------------------------------------------------------------------
def test_a_checkpoint_becomes_a_model_with_its_head(folder: Path, source: Path, python: Path, tmp_path: Path) -> None:
    out = tmp_path / "out {dir}" / "größer {ftype}.gguf"
    out.parent.mkdir()
    job = convert.prepare(folder, source, out, outtype="f16", pre_tokenizer="qwen2", python=python)
    manifest = convert.run(job).manifest.json()
    header = read_header(out)
    assert header.metadata["general.architecture"] == "qwen35moe"
    assert (header.metadata["qwen35moe.block_count"], header.metadata["qwen35moe.nextn_predict_layers"]) == (5, 1)
    assert header.metadata["tokenizer.ggml.pre"] == "qwen2"
    types = {tensor.name: tensor.type for tensor in header.tensors}
    assert types["blk.4.nextn.eh_proj.weight"] == "F16"
    assert manifest["head_layers"] == 1
    assert json.loads(out.with_name(out.name + ".json").read_text()) == manifest
    assert left(out.parent, out.name, out.name + ".json", out.name + ".log")
    again = convert.run(convert.prepare(folder, source, out, outtype="f16", pre_tokenizer="qwen2", python=python))
    assert again.reused and again.head_layers == 1 and again.manifest.json() == manifest
    with pytest.raises(OutputUnwritable, match="was made from something else"):
        convert.prepare(folder, source, out, outtype="bf16", pre_tokenizer="qwen2", python=python)
    status = subprocess.run(
        ["git", "-C", str(source), "status", "--short", "--ignored"], capture_output=True, check=True
    )
    assert b"__pycache__" not in status.stdout


def test_without_the_head(tmp_path: Path, source: Path, python: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", without="mtp.")
    out = tmp_path / "out.gguf"
    with pytest.raises(CheckpointInvalid):
        convert.prepare(folder, source, out, python=python)
    convert.run(convert.prepare(folder, source, out, pre_tokenizer="qwen2", head=False, python=python))
    assert "qwen35moe.nextn_predict_layers" not in read_header(out).metadata


def test_a_tokenizer_that_the_converter_does_not_know(folder: Path, source: Path, python: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(ConversionFailed, match="does not know this tokenizer") as caught:
        convert.run(convert.prepare(folder, source, out, python=python))
    assert "--pre-tokenizer" in str(caught.value.hint)
    assert left(tmp_path, folder.name, "out.gguf.log")


@pytest.mark.parametrize("native", [False, True])
def test_code_of_the_checkpoint_is_not_run(
    folder: Path, source: Path, python: Path, tmp_path: Path, native: bool
) -> None:
    """Upstream loads tokenizers with trust_remote_code=True: a tokenizer class in the checkpoint would run."""
    marker = tmp_path / "marker"
    code = (
        f"open({str(marker)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast as Fast\nclass "
        "Evil(Fast): pass\n"
    )
    (folder / "evil.py").write_text(code)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config["tokenizer_class"] = "PreTrainedTokenizerFast" if native else "Evil"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    out = tmp_path / "out.gguf"
    job = convert.prepare(folder, source, out, pre_tokenizer="qwen2", python=python)
    try:
        convert.run(job)
    except ConversionFailed as error:
        assert "needs its own code" in error.message
        assert not out.exists()
    assert not marker.exists()


def test_the_guard_against_the_checkpoints_code(folder: Path, python: Path) -> None:
    """The safety net: nothing in transformers or the converter can open code in the folder."""
    (folder / "evil.py").write_text("raise SystemExit(5)\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import driver; driver.refuse_code(sys.argv[2])\n"
        "sys.path.insert(0, sys.argv[2])\ntry:\n    import evil\nexcept (OSError, ImportError) as error:\n    "
        "print(error)\n"
    )
    arguments = [str(python), "-B", "-c", code, str(Path(driver.__file__).parent), str(folder)]
    done = subprocess.run(
        arguments, env={**os.environ, "HF_MODULES_CACHE": str(folder)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "wants its own code to run" in done.stdout


def test_a_model_that_is_there_is_replaced_only_with_force_and_only_by_a_whole_one(
    folder: Path, source: Path, python: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("precious")
    with pytest.raises(OutputUnwritable, match="exists"):
        convert.prepare(folder, source, out, python=python)
    with pytest.raises(ConversionFailed):
        convert.run(convert.prepare(folder, source, out, python=python, force=True))
    assert out.read_text() == "precious"
    convert.run(convert.prepare(folder, source, out, python=python, pre_tokenizer="qwen2", force=True))
    assert read_header(out).file_size > 1000


def test_ctrl_c(folder: Path, source: Path, python: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    told = ("apex_build.conversion.convert", "read_account")  # the converter knows the tensors and will write them
    arguments = ["convert", folder, "-o", out, "--pre-tokenizer", "qwen2", "--python", python]
    ended_at(told, 1, signal.SIGINT, *arguments)
    assert not out.exists()
    assert not list(tmp_path.glob(".out.gguf.*.part"))


@pytest.mark.usefixtures("source")
def test_the_command(folder: Path, python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.VARIABLE, str(python))
    arguments = ["convert", str(folder), "-o", str(tmp_path / "out.gguf"), "--pre-tokenizer", "qwen2"]
    dry = CliRunner().invoke(apex, [*arguments, "--dry-run", "--json"])
    assert json.loads(dry.stdout)["checkpoint"]["head_layers"] == 1
    assert left(tmp_path, folder.name)
    done = CliRunner().invoke(apex, arguments)
    assert done.exit_code == 0
    assert "draft head of 1 block" in done.stdout
    seen: list[str | None] = []

    def watched(*given: Any, **how: Any) -> Any:
        seen.append(how["env"].get("OMP_NUM_THREADS"))
        return run_tool(*given, **how)

    monkeypatch.setattr(convert, "run_tool", watched)
    assert CliRunner().invoke(apex, [*arguments, "--force", "--threads", "1"]).exit_code == 0
    assert CliRunner().invoke(apex, [*arguments, "--force"]).exit_code == 0
    assert seen == ["1", None]


# --- without ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def anything() -> Path:
    """A stand-in for the converter's Python that must never be started."""
    return Path(sys.executable)


def test_an_architecture_that_the_converter_lacks(tmp_path: Path, source: Path, anything: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", config={"architectures": ["Qwen3_5MoeForCausalLMX"]})
    with pytest.raises(CheckpointInvalid, match="does not know the architecture") as caught:
        convert.prepare(folder, source, tmp_path / "out.gguf", python=anything)
    assert "Qwen3_5MoeForCausalLM" in str(caught.value.hint)


def test_an_unknown_pre_tokenizer(folder: Path, source: Path, tmp_path: Path, anything: Path) -> None:
    with pytest.raises(ParameterUnknown, match="no pre-tokenizer 'qwen53'") as caught:
        convert.prepare(folder, source, tmp_path / "out.gguf", pre_tokenizer="qwen53", python=anything)
    assert "qwen35" in str(caught.value.hint)


def test_outputs_that_cannot_be(folder: Path, source: Path, tmp_path: Path, anything: Path) -> None:
    with pytest.raises(OutputUnwritable, match="no such folder"):
        convert.prepare(folder, source, tmp_path / "no" / "out.gguf", python=anything)
    with pytest.raises(OutputUnwritable, match="is a folder"):
        convert.prepare(folder, source, tmp_path, python=anything)


INPUTS = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "sub/notes.txt",
)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("link", ["", "symlink", "hard link"])
def test_no_file_of_the_checkpoint_is_written_over(
    name: str, link: str, folder: Path, source: Path, tmp_path: Path, anything: Path
) -> None:
    given = folder / name
    if not given.exists():
        given.parent.mkdir(exist_ok=True)
        given.write_text("{}")
    out = tmp_path / "out.gguf" if link else given
    if link:
        (out.symlink_to if link == "symlink" else out.hardlink_to)(given)
    before = given.read_bytes()
    with pytest.raises(OutputUnwritable, match="would be overwritten"):
        convert.prepare(folder, source, out, python=anything, force=True)
    assert given.read_bytes() == before
    if name.endswith(".json"):  # the manifest would go there
        with pytest.raises(OutputUnwritable, match=f"{name} is the input itself"):
            convert.prepare(folder, source, given.with_suffix(""), python=anything, force=True)


@pytest.mark.parametrize("ending", ["", ".json", ".log"])
def test_a_file_that_is_not_ours_is_not_replaced(
    ending: str, folder: Path, source: Path, tmp_path: Path, anything: Path
) -> None:
    (tmp_path / f"out.gguf{ending}").write_text("mine")
    with pytest.raises(OutputUnwritable, match=rf"out\.gguf{ending} exists, and is not"):
        convert.prepare(folder, source, tmp_path / "out.gguf", python=anything)


def test_two_conversions_to_one_file(folder: Path, source: Path, python: Path, tmp_path: Path) -> None:
    job = convert.prepare(folder, source, tmp_path / "out.gguf", python=python)
    with locked(job.out), pytest.raises(OutputUnwritable, match="is being written by another run"):
        convert.run(job)


def test_a_disk_that_is_too_small(folder: Path, source: Path, tmp_path: Path, anything: Path) -> None:
    with (folder / "model.safetensors").open("rb+") as file:
        file.truncate(1 << 43)  # sparse: what no disk here holds
    header = {"big": {"dtype": "F16", "shape": [1 << 42], "data_offsets": [0, 1 << 42]}}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("rb+") as file:
        file.write(len(text).to_bytes(8, "little") + text)
    with pytest.raises(DiskTooSmall, match=r"GB free, expected .* GB: the model of .*, about, takes"):
        convert.prepare(folder, source, tmp_path / "out.gguf", head=False, python=anything)


def test_a_python_that_lacks_packages(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    with pytest.raises(EnvironmentUnusable, match=r"lacks what the converter needs: .*torch") as caught:
        environment.choose(tmp_path / "bare" / "bin" / "python")
    assert "-m pip install" in str(caught.value.hint)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["/bin/true", "/nowhere/python"])
def test_a_python_that_is_none(program: str) -> None:
    with pytest.raises(EnvironmentUnusable):
        environment.choose(Path(program))


@pytest.mark.slow
def test_an_environment_of_our_own_is_made_once_and_whole(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a requirement that needs no download instead of torch: a package of two files."""
    package = tmp_path / "little"
    package.mkdir()
    (package / "little.py").write_text("")
    (package / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n\n'
        '[project]\nname = "little"\nversion = "1.0"\n'
    )
    (package / "backend.py").write_text(BACKEND)
    wanted = (Requirement(f"little @ {package.as_uri()}"),)
    monkeypatch.setattr(environment, "requirements", lambda: wanted)
    python = environment.Python(environment._folder(wanted) / "bin" / "python", "test", made=True)
    steps: list[str] = []
    found = environment.ensure(python, tmp_path / "log", lambda step: steps.append(step.task))
    assert environment.versions(found)["little"] == "1.0"
    assert steps
    steps.clear()
    assert environment.ensure(python, tmp_path / "log", lambda step: steps.append(step.task)) == found
    assert not steps


@pytest.mark.slow
def test_an_environment_that_pip_cannot_fill_is_taken_away(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    wanted = (Requirement("apex-nothing-of-this-name==1"),)
    monkeypatch.setattr(environment, "requirements", lambda: wanted)
    folder = environment._folder(wanted)
    with pytest.raises(EnvironmentUnusable, match="could not be made"):
        environment.ensure(
            environment.Python(folder / "bin" / "python", "test", made=True), tmp_path / "log", lambda _: None
        )
    assert not folder.exists()


def test_the_extra_names_torch_and_transformers() -> None:
    assert {"torch", "transformers", "gguf"} <= {item.name for item in environment.requirements()}
