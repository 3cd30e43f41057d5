"""Which toolkit a CUDA build uses, what is rejected before anything is fetched, and the options for each machine."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_cuda import H100, SPARK, fake_toolkit
from tiny_project import make_source

from apex_build.cli import apex
from apex_build.errors import BuildFailed, ToolkitUnusable
from apex_build.hookspecs import GpuTarget
from apex_build.source.pins import DEFAULT_PIN
from apex_build.toolchain.backends import cuda_backend, with_ptx
from apex_build.toolchain.build.run import plan_build
from apex_build.toolchain.cuda import toolkit as cuda_toolkit
from apex_build.toolchain.cuda.binary import Code, check_device_code, code_names
from apex_build.toolchain.cuda.plan import backend_of, plan_cuda
from apex_build.toolchain.cuda.wheels import pinned_wheels
from apex_build.toolchain.machine.compilers import Compiler, find_compiler

GCC = Compiler(Path("/usr/bin/gcc"), Path("/usr/bin/g++"), "GNU", "12.2.0", "x86_64-linux-gnu")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The machine's only toolkit, in CUDA_HOME; the folder does not exist yet."""
    root = tmp_path / "cuda"
    monkeypatch.setattr(cuda_toolkit, "_PLACES", ())
    monkeypatch.setenv("CUDA_HOME", str(root))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("CUDAToolkit_ROOT", raising=False)
    monkeypatch.setenv(
        "PATH",
        os.pathsep.join(place for place in os.environ["PATH"].split(os.pathsep) if not (Path(place) / "nvcc").exists()),
    )
    return root


def test_a_complete_toolkit_of_the_machine_is_used(home: Path) -> None:
    fake_toolkit(home)
    plan = plan_cuda([SPARK, H100], GCC)
    assert (plan.toolkit.root, plan.toolkit.origin, plan.toolkit.version) == (home, "system", "13.0.88")
    assert plan.architectures == ("90a-real", "121a-real")
    assert plan.notes == ()


def test_the_toolkit_in_path_even_if_a_script_leads_to_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_toolkit(home)
    monkeypatch.delenv("CUDA_HOME")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    assert plan_cuda([SPARK], GCC).toolkit.root == home


def test_half_a_toolkit(home: Path) -> None:
    fake_toolkit(home, without="cublas")
    plan = plan_cuda([SPARK], GCC)
    assert plan.toolkit.origin == "pypi"
    (note,) = plan.notes
    assert note.startswith(
        f"{home} is an incomplete CUDA toolkit (missing: cuBLAS headers, cuBLAS, cuBLASLt; there: nvcc, "
    )
    with pytest.raises(ToolkitUnusable) as caught:
        plan_cuda([SPARK], GCC, "system")
    assert "no CUDA toolkit of this machine can build for dgx-spark" in caught.value.message
    assert "missing: cuBLAS headers, cuBLAS, cuBLASLt" in caught.value.message
    assert "--cuda-toolchain pypi" in str(caught.value.hint)


def test_an_architecture_newer_than_the_toolkit(home: Path) -> None:
    fake_toolkit(home, version="12.4.131", codes="80 90")
    with pytest.raises(
        ToolkitUnusable,
        match=r"dgx-spark \(121a-real\) needs CUDA 12\.9 or newer; .* is 12\.4\.131, which compiles for",
    ):
        plan_cuda([H100, SPARK], GCC, "system")
    assert plan_cuda([H100], GCC).toolkit.origin == "system"
    assert plan_cuda([H100, SPARK], GCC).toolkit.origin == "pypi"


@pytest.mark.parametrize(
    ("name", "needs"), [("sm_200", "a CUDA newer than 13.0.88"), ("sm_61", "a CUDA older than 13.0")]
)
def test_an_architecture_that_no_toolkit_here_knows(home: Path, cache: Path, name: str, needs: str) -> None:
    said = CliRunner().invoke(apex, ["build", "--gpu", name, "--dry-run"])
    if "would be fetched first" in said.output:
        pytest.skip("the source of the default pin has not been fetched")
    assert said.exception
    assert isinstance(said.exception, ToolkitUnusable)
    assert f"needs {needs}; the CUDA toolkit from the package index is 13.0.88" in said.exception.message
    assert not (cache / "toolchains").exists()


def test_a_host_compiler_that_is_too_new(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_toolkit(home, gcc=11)
    with pytest.raises(
        ToolkitUnusable, match=r"nvcc 13\.0\.88 of .*/cuda takes gcc up to 11; /usr/bin/g\+\+ is gcc 12\.2\.0"
    ) as caught:
        plan_cuda([SPARK], GCC, "system")
    assert re.search(r"CXX=g\+\+-\d+", str(caught.value.hint))
    assert plan_cuda([SPARK], GCC).toolkit.origin == "pypi"  # which takes more
    newer = replace(GCC, version=f"{pinned_wheels().newest_host['GNU'] + 1}.1.0")
    with pytest.raises(
        ToolkitUnusable, match=r"nvcc 13\.0\.88 of the package index takes gcc up to 15; .* is gcc 16\.1\.0"
    ):
        plan_cuda([SPARK], newer, "pypi")
    clang = replace(GCC, kind="Clang", version="21.0.0", cxx=Path("/usr/bin/clang++"))
    with pytest.raises(ToolkitUnusable, match="takes clang up to 20"):
        plan_cuda([SPARK], clang, "system")


def test_no_toolkit_at_all(home: Path) -> None:
    assert plan_cuda([SPARK], GCC).notes == ()
    with pytest.raises(
        ToolkitUnusable, match="no CUDA toolkit of this machine can build for dgx-spark: none was found"
    ):
        plan_cuda([SPARK], GCC, "system")


def test_the_key_names_toolkit_and_architectures_but_no_place(home: Path, tmp_path: Path) -> None:
    compiler = find_compiler()
    source = make_source(tmp_path / "source")

    def key(*targets: GpuTarget, **options: bool) -> str:
        plan = plan_cuda(targets, compiler)
        return plan_build(source, backend_of(plan, compiler, **options), cuda=plan).key

    fake_toolkit(home)
    first = key(SPARK)
    home.rename(tmp_path / "moved")
    (tmp_path / "cuda").symlink_to(tmp_path / "moved")
    assert key(SPARK) == key(replace(SPARK, name="another name")) == first
    assert len({first, key(H100), key(SPARK, H100), key(SPARK, all_kv_types=True)}) == 4
    fake_toolkit(tmp_path / "moved", version="13.1.80")
    assert key(SPARK) != first


def test_options_that_matter() -> None:
    options = cuda_backend(["90a-real", "121a-real"], "x86_64", lambda _: True).cmake_options(native=False)
    assert options["CMAKE_CUDA_ARCHITECTURES"] == "90a-real;121a-real"
    for name in ("GGML_CUDA", "GGML_BACKEND_DL", "GGML_CPU_ALL_VARIANTS", "GGML_CUDA_FA", "GGML_CUDA_GRAPHS"):
        assert options[name] == "ON"
    for name in ("GGML_NATIVE", "GGML_CUDA_NCCL", "GGML_CUDA_CUB_3DOT2", "GGML_CUDA_FA_ALL_QUANTS", "LLAMA_BUILD_UI"):
        assert options[name] == "OFF"
    assert options["CMAKE_INSTALL_RPATH"] == "$ORIGIN"
    assert "GGML_CPU_ARM_ARCH" not in options


def test_aarch64() -> None:
    """GCC 13, which a DGX Spark ships with, does not support SME: then there is one CPU backend, which any ARM machine
    with such a GPU can run.
    """

    def of(gcc: int) -> dict[str, str]:
        def accepts(flag: str) -> bool:
            return "sme" not in flag or gcc >= 14

        return cuda_backend(["121a-real"], "aarch64", accepts).cmake_options(native=False)

    assert of(14)["GGML_CPU_ALL_VARIANTS"] == "ON"
    assert "GGML_CPU_ARM_ARCH" not in of(14)
    assert of(13)["GGML_CPU_ALL_VARIANTS"] == "OFF"
    assert of(13)["GGML_CPU_ARM_ARCH"] == "armv8.2-a+dotprod+fp16"


def test_an_older_gcc_on_x86_64() -> None:
    options = cuda_backend(["121a-real"], "x86_64", lambda flag: "amx" not in flag).cmake_options(native=False)
    assert options["GGML_CPU_ALL_VARIANTS"] == "OFF"
    assert "GGML_CPU_ARM_ARCH" not in options


@pytest.mark.parametrize(
    ("architectures", "ptx"),
    [
        (("89-real", "90a-real"), "90-virtual"),
        (("121a-real",), "90-virtual"),
        (("100a-real", "121a-real"), "100-virtual"),
    ],
)
def test_ptx_is_of_an_architecture_that_newer_gpus_can_use(architectures: tuple[str, ...], ptx: str) -> None:
    assert with_ptx(architectures) == (*architectures, ptx)


def test_the_binary_is_believed_not_the_flags() -> None:
    assert code_names("121a-real") == ("sm_121a",)
    assert code_names("90-virtual") == ("compute_90",)
    assert code_names("90") == ("sm_90", "compute_90")
    found = {"sm_121a": Code(138, 9000), "sm_90a": Code(137, 9000), "sm_89": Code(138, 0)}
    check_device_code(found, ["121a-real"], 138, Path("lib"))
    for asked, said in (
        ("90a-real", "code for sm_90a from 137 of 138 CUDA files"),
        ("89-real", "no code for sm_89"),
        ("80", "compute_80"),
    ):
        with pytest.raises(BuildFailed, match=said) as caught:
            check_device_code(found, ["121a-real", asked], 138, Path("lib"))
        assert "It has: sm_121a (138), sm_89 (138), sm_90a (137)" in caught.value.message


def test_gpu_and_cpu_do_not_go_together() -> None:
    done = CliRunner().invoke(apex, ["build", "--backend", "cpu", "--gpu", "h100"])
    assert done.exit_code == 2
    assert "not --backend cpu" in done.stderr


def test_the_dry_run_names_gpus_toolkit_and_download(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apex_build.cli.build.require_tree", lambda *_: make_source(tmp_path / "source"))
    fake_toolkit(home, without="cublas")
    done = CliRunner().invoke(apex, ["build", "--gpu", "h100,dgx-spark", "--dry-run"])
    assert done.exit_code == 0
    assert "from the package index: 7 wheels, " in done.stdout
    assert "CMAKE_CUDA_ARCHITECTURES=90a-real;121a-real" in done.stdout
    assert "not used: " in done.stderr
    monkeypatch.setattr("apex_build.cli.build.require_tree", lambda *_: tmp_path / "source")
    fake_toolkit(home)
    planned = json.loads(CliRunner().invoke(apex, ["build", "--gpu", "h100", "--dry-run", "--json"]).stdout)
    assert planned["backend"] == "cuda"
    assert planned["cuda"] == {"origin": "system", "version": "13.0.88", "packages": {}}
    assert planned["pin"]["name"] == DEFAULT_PIN
