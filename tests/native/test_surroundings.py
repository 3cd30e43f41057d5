"""Tools run only code of the build, environment variables do not change them, and none outlives us."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from apex_runs import run_apex
from children import alive
from waiting import until

from apex_build.errors import ToolFailed, ToolKilled
from apex_build.native import surroundings
from apex_build.native.run import run_tool
from apex_build.native.toolset import Toolset

CC = shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(CC is None, reason="makes a library")


def library(path: Path, marker: Path) -> Path:
    """A shared library that leaves a mark when it is loaded."""
    source = path.with_suffix(".c")
    source.write_text(
        "#include <stdio.h>\n__attribute__((constructor)) static void loaded(void) {\n"
        f'    FILE * file = fopen("{marker}", "a"); if (file) {{ fputs("loaded\\n", file); fclose(file); }}\n}}\n'
    )
    subprocess.run([str(CC), "-shared", "-fPIC", "-o", path, source], check=True)
    return path


@pytest.fixture
def trap(tmp_path: Path, testbed: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The user's current folder, with a model and libraries under every name of a backend; and the mark that they leave
    when loaded.
    """
    folder, marker = tmp_path / "downloads", tmp_path / "mark"
    folder.mkdir()
    (folder / "model.gguf").symlink_to(testbed)
    first = library(folder / "libggml-blas.so", marker)
    for name in ("cpu-x64", "cuda", "vulkan", "rpc", "cpu"):
        shutil.copy(first, folder / f"libggml-{name}.so")
    monkeypatch.chdir(folder)
    return folder, marker


@needs_compiler
def test_libraries_beside_a_model_are_not_loaded(trap: tuple[Path, Path], tools: Toolset, heldout: Path) -> None:
    folder, marker = trap
    speed = (
        "--set",
        "speed.prompt=8",
        "--set",
        "speed.generate=4",
        "--set",
        "speed.repetitions=1",
        "--set",
        "speed.n_max=1",
    )
    run_apex(
        "evaluate", "model.gguf", "--only", "speed", *speed, "--threads", 1, "--results", "results.jsonl", cwd=folder
    )
    (folder / "prompts.jsonl").write_text('{"domain": "a", "prompt": "The quick brown fox"}\n')
    wanted = ("--only", "draft-acceptance", "--prompts", "prompts.jsonl", "--set", "draft-acceptance.lengths=1")
    few = ("--set", "draft-acceptance.n_predict=4", "--set", "draft-acceptance.temperature=0", "--threads", 1)
    run_apex("evaluate", "model.gguf", *wanted, *few, cwd=folder)
    shutil.copy(heldout / "chat.txt", folder / "chat.txt")
    run_apex(
        "evaluate",
        "model.gguf",
        "--only",
        "perplexity",
        "--text",
        "chat.txt",
        "--set",
        "perplexity.chunks=2",
        cwd=folder,
    )
    run_apex("calibrate", "model.gguf", "--text", "chat.txt", "--chunks", 2, "-o", "imatrix.gguf", cwd=folder)
    run_apex("plan", "model.gguf", "--policy", "compact", "--imatrix", "imatrix.gguf", cwd=folder)
    run_apex(
        "quantize", "model.gguf", "--policy", "uniform", "--set", "type=Q4_K", "--imatrix", "imatrix.gguf", cwd=folder
    )
    assert not marker.exists()


@needs_compiler
@pytest.mark.parametrize("tool", ["llama-bench", "llama-server", "llama-imatrix", "llama-perplexity", "llama-quantize"])
def test_no_variable_brings_code_into_a_tool(
    tool: str, tools: Toolset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "mark"
    evil = library(tmp_path / "libevil.so", marker)
    for name in ("libggml-base.so.0", "libgomp.so.1", "libstdc++.so.6", "libggml-blas.so"):
        shutil.copy(evil, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GGML_BACKEND_PATH", str(evil))
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path}::.")
    program = tools.tool(tool)
    environment = surroundings.environment(program)
    assert not {"GGML_BACKEND_PATH", "LD_LIBRARY_PATH", "LD_PRELOAD"} & set(environment)
    monkeypatch.setenv("LD_PRELOAD", "")  # of the real one, this very process would be the victim
    run_tool([program, "--help"], check=False, timeout=120)
    assert not marker.exists()


def test_variables_that_change_what_a_tool_computes(tools: Toolset, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "LLAMA_ARG_CTX_SIZE",
        "LLAMA_ATTN_ROT_DISABLE",
        "GGML_CUDA_FORCE_CUBLAS_COMPUTE_16F",
        "GGML_OP_OFFLOAD_MIN_BATCH",
    ):
        monkeypatch.setenv(name, "1")
    for name in ("CUDA_VISIBLE_DEVICES", "GGML_CUDA_ENABLE_UNIFIED_MEMORY", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    found = surroundings.environment(tools.tool("llama-imatrix"))
    assert not {name for name in found if name.startswith(("LLAMA_ARG", "LLAMA_ATTN", "GGML_OP", "GGML_CUDA_FORCE"))}
    assert {"CUDA_VISIBLE_DEVICES", "GGML_CUDA_ENABLE_UNIFIED_MEMORY", "OMP_NUM_THREADS"} <= set(found)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"), ({"GOMP_SPINCOUNT": "100"}, None)],
)
def test_threads_wait_without_spinning_unless_the_user_says_how(
    given: dict[str, str], expected: str | None, tools: Toolset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other programs on every core; on idle cores, sleeping would cost more than spinning."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    code = "print('begun', flush=True)\nwhile True: pass"
    busy = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(os.cpu_count() or 1)]
    try:
        assert all(one.stdout and one.stdout.readline() for one in busy)
        assert surroundings.environment(tools.tool("llama-server")).get("OMP_WAIT_POLICY") == expected
    finally:
        for one in busy:
            one.kill()
            one.communicate()


@needs_compiler
def test_a_folder_that_the_tools_need_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like a driver in a container: only LD_LIBRARY_PATH leads to it."""
    needed, other, bin = (tmp_path / name for name in ("driver", "other", "bin"))
    for folder in (needed, other, bin):
        folder.mkdir()
    marker = tmp_path / "mark"
    subprocess.run([str(CC), "-shared", "-fPIC", "-x", "c", "-o", needed / "libdriver.so", "/dev/null"], check=True)
    subprocess.run([str(CC), "-shared", "-fPIC", "-x", "c", "-o", bin / "libggml-base.so", "/dev/null"], check=True)
    library(other / "libggml-base.so", marker)
    (tmp_path / "main.c").write_text("int main(void) { return 7; }\n")
    linked = [
        "-Wl,--no-as-needed",
        f"-L{bin}",
        f"-L{needed}",
        "-l:libggml-base.so",
        "-l:libdriver.so",
        "-Wl,-rpath,$ORIGIN",
    ]
    subprocess.run([str(CC), "-o", bin / "llama-quantize", tmp_path / "main.c", *linked], check=True)
    with pytest.raises(ToolFailed, match="libdriver"):
        run_tool([bin / "llama-quantize"])
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{other}:{needed}")
    assert surroundings.library_folders(bin) == (bin, needed)
    assert run_tool([bin / "llama-quantize"], check=False).returncode == 7
    assert not marker.exists()


def test_a_tool_is_not_started_where_a_library_waits_for_it(tools: Toolset, tmp_path: Path) -> None:
    (tmp_path / "libggml-blas.so").touch()
    with pytest.raises(ToolFailed, match=r"libggml-blas\.so: llama-bench would run this file's code"):
        run_tool([tools.tool("llama-bench"), "--help"], cwd=tmp_path)


def test_programs_run_in_an_empty_folder_that_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit('not ours')\n")
    code = "import json, os; print(os.getcwd()); print(json.dumps(os.listdir()))"
    done = run_tool([sys.executable, "-c", code])
    assert done.lines[1] == "[]"
    assert not Path(done.lines[0]).exists()


def test_pip_is_asked_where_no_module_of_the_users_folder_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from apex_build.fetching.pip_config import read_pip_config

    (tmp_path / "pip.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\n")
    (tmp_path / "pip.conf").write_text("[global]\ntimeout = 7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_CONFIG_FILE", "pip.conf")
    assert read_pip_config().timeout == 7
    assert not (tmp_path / "mark").exists()


def children(of: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == of and fields[0] != "Z":
            found.append(int(entry.parent.name))
    return found


def children_that_run(name: str, parent: int) -> list[int]:
    """Its children that are the program, and no longer what starts it."""
    with suppress(OSError):  # a child that has ended since
        return [pid for pid in children(parent) if name in str(Path(f"/proc/{pid}/exe").readlink())]
    return []


def killed_with_its_children(process: subprocess.Popen[bytes], name: str) -> None:
    found = until(lambda: children_that_run(name, process.pid), process)
    process.kill()
    process.wait(60)
    until(lambda: not any(alive(pid) for pid in found))


@pytest.mark.parametrize("prefix", ["setpriv", "python"])
def test_a_program_ends_with_us(prefix: str) -> None:
    without = (
        "from apex_build.native import surroundings; surroundings.shutil.which = lambda *_: None\n"
        if prefix == "python"
        else ""
    )
    code = (
        f"{without}from pathlib import Path\nfrom apex_build.native import run\nrun.shutil.which = lambda given: "
        "given\n"
    )
    code += f"run.run_tool([Path({shutil.which('sleep')!r}), '600'])"
    killed_with_its_children(subprocess.Popen([sys.executable, "-c", code]), "sleep")


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("llama-bench", ("--only", "speed", "--set", "speed.generate=4096", "--set", "speed.repetitions=1000")),
        ("llama-perplexity", ("--only", "perplexity", "--text", "{long}")),
        ("llama-server", ("--only", "draft-acceptance", "--prompts", "{heldout}/prompts.jsonl")),
    ],
)
def test_no_tool_outlives_a_killed_apex(
    tool: str, arguments: tuple[str, ...], tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path
) -> None:
    long = tmp_path / "long.txt"
    long.write_text((heldout / "code.txt").read_text() * 20)
    given = [word.format(heldout=heldout, long=long) for word in arguments]
    command = [sys.executable, "-m", "apex_build", "evaluate", str(testbed), *given, "--threads", "1"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    killed_with_its_children(subprocess.Popen([*command, "--results", str(tmp_path / "r.jsonl")], env=env), tool)
    assert list(tmp_path.glob("apex-build-*"))
    code = "import tempfile; from apex_build.storage.scratch import scratch_folder\nwith scratch_folder('run'): pass"
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert not list(tmp_path.glob("apex-build-*"))


def test_folders_in_use_and_those_of_others_stay(tmp_path: Path) -> None:
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    code = (
        "from apex_build.storage.scratch import scratch_folder\n"
        "with scratch_folder('run') as folder: print(folder, flush=True); input()"
    )
    user = subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert user.stdout
    folder = Path(user.stdout.readline().strip())
    (tmp_path / "apex-build-notes").mkdir()
    (tmp_path / "apex-build-run-abcdefgh").symlink_to(tmp_path / "apex-build-notes")
    other = "from apex_build.storage.scratch import scratch_folder\nwith scratch_folder('run'): pass"
    subprocess.run([sys.executable, "-c", other], env=env, check=True)
    assert folder.is_dir()
    assert (tmp_path / "apex-build-notes").is_dir()
    user.communicate("\n")
    assert not folder.exists()


def test_a_tool_that_takes_too_much_memory_is_ended() -> None:
    code = "import time\nprint('begun', flush=True)\nx = bytearray(600 << 20)\ntime.sleep(3600)"
    with pytest.raises(ToolKilled, match=r"took 0\.\d GB of memory, and was ended: its limit is 0\.2 GB"):
        run_tool([sys.executable, "-c", code], memory=200 << 20)


@pytest.mark.slow
def test_what_is_only_mapped_does_not_count(tmp_path: Path) -> None:
    file = tmp_path / "model"
    with file.open("wb") as made:
        made.truncate(600 << 20)
    code = f"import mmap, time\nf = open({str(file)!r}, 'rb')\nm = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)\n"
    code += "print(sum(m[i] for i in range(0, len(m), 4096)))\ntime.sleep(0.6)"
    assert run_tool([sys.executable, "-c", code], memory=200 << 20).lines == ("0",)
