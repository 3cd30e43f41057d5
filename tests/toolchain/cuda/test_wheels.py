"""The CUDA toolkit from wheels: small ones with the layout of the real ones, from a folder that pip searches."""

from __future__ import annotations

import importlib.metadata
import pickle
import platform
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename

from apex_build.errors import ArchiveUnsafe, DiskTooSmall, DownloadFailed, HashMismatch, ToolkitUnusable
from apex_build.fetching.download import IndexFile
from apex_build.storage.digests import sha256_file
from apex_build.toolchain.cuda.toolkit import judge, told
from apex_build.toolchain.cuda.wheels import Wheels, install, pinned_wheels, planned

NVCC = "#!/bin/sh\n[ \"$1\" = --version ] && echo 'Cuda compilation tools, release 13.0, V13.0.88'\nexit 0\n"
HEADER = "#define CUDART_VERSION 13000\n"
# package -> files, as the real wheels have them
PACKAGES = {
    "nvidia-cuda-nvcc": {f"bin/{name}": NVCC for name in ("nvcc", "ptxas", "fatbinary", "cudafe++")},
    "nvidia-nvvm": {"nvvm/bin/cicc": "", "nvvm/libdevice/libdevice.10.bc": "", "lib/libnvvm.so.4": ""},
    "nvidia-cuda-crt": {"include/crt/host_config.h": ""},
    "nvidia-cuda-cccl": {"include/cccl/cub/cub.cuh": "", ".metadata/provenance.txt": ""},
    "nvidia-cuda-runtime": {
        "include/cuda_runtime.h": "",
        "include/cuda_runtime_api.h": HEADER,
        "lib/libcudart.so.13": "",
    },
    "nvidia-cublas": {"include/cublas_v2.h": "", "lib/libcublas.so.13": "", "lib/libcublasLt.so.13": ""},
    "nvidia-cuda-cuobjdump": {"bin/cuobjdump": NVCC},
}


def make_wheel(folder: Path, package: str, files: dict[str, str]) -> Path:
    name = package.replace("-", "_")
    path = folder / f"{name}-13.0.1-py3-none-manylinux_2_17_x86_64.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for inside, text in files.items():
            member = zipfile.ZipInfo(
                f"nvidia/cu13/{inside}" if "dist-info" not in inside and not inside.startswith("/") else inside
            )
            member.external_attr = (0o755 if "/bin/" in f"/{inside}" else 0o644) << 16
            archive.writestr(member, text)
        archive.writestr(f"{name}-13.0.1.dist-info/licenses/License.txt", "terms\n")
        archive.writestr(
            f"{name}-13.0.1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 13.0.1\n"
        )
    return path


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the wheels, pip's only source."""
    folder = tmp_path / "offered"
    folder.mkdir()
    for package, files in PACKAGES.items():
        make_wheel(folder, package, files)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def pinned(offered: Path) -> Wheels:
    files = {}
    for package in PACKAGES:  # in which order they are fetched
        (path,) = offered.glob(f"{package.replace('-', '_')}-*.whl")
        name, version, *_ = parse_wheel_filename(path.name)
        files[str(name)] = IndexFile(
            f"{name}=={version}", path.name, sha256_file(path), path.stat().st_size, "the pinned toolkit"
        )
    return Wheels("x86_64", "13.0.88", {"GNU": 15}, (90, 121), 1000, files, dict.fromkeys(files, "13.0.1"))


def left_behind(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "toolchains").glob("*"))


def test_the_layout(offered: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = pinned(offered)
    assert not planned(wheels).parts
    toolkit = install(wheels)
    assert toolkit.root.parent == cache / "toolchains"
    assert (toolkit.version, toolkit.missing, toolkit.origin) == ("13.0.88", (), "pypi")
    assert toolkit.packages["nvidia-cublas"] == {"version": "13.0.1", "sha256": wheels.files["nvidia-cublas"].sha256}
    for folder in (
        "bin",
        "nvvm",
        "lib64",
    ):  # nvcc finds its parts through bin/.., which a link to a folder would lead elsewhere
        assert (toolkit.root / folder).is_dir()
        assert not (toolkit.root / folder).is_symlink()
    assert (toolkit.root / "lib64" / "libcublas.so").readlink() == Path("libcublas.so.13")
    assert (toolkit.root / "licenses" / "nvidia-nvvm" / "License.txt").read_text() == "terms\n"
    assert not list(toolkit.root.rglob("provenance.txt"))
    assert not list((cache / "downloads").rglob("*.whl"))

    shutil.rmtree(offered)  # and no network after that
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert install(wheels) == toolkit
    (toolkit.root / "nvvm" / "bin" / "cicc").unlink()
    with pytest.raises(DownloadFailed, match="no package index that pip is configured with offers nvidia_"):
        install(wheels)


def test_a_download_that_is_cut_off_goes_on_where_it_stopped(offered: Path, cache: Path) -> None:
    wheels = pinned(offered)
    cublas = offered / wheels.files["nvidia-cublas"].file
    whole = cublas.read_bytes()
    cublas.write_bytes(whole[:200])
    with pytest.raises(DownloadFailed, match=rf"is cut short: received 200 bytes of {len(whole)}"):
        install(wheels)
    assert left_behind(cache) == []
    cublas.write_bytes(whole)
    for name in ("nvidia-cuda-nvcc", "nvidia-nvvm"):  # these came before it, and are in the cache
        (offered / wheels.files[name].file).unlink()
    assert install(wheels).missing == ()


def test_another_wheel_of_the_same_name(offered: Path, cache: Path) -> None:
    wheels = pinned(offered)
    nvcc = offered / wheels.files["nvidia-cuda-nvcc"].file
    nvcc.write_bytes(b"x" * nvcc.stat().st_size)
    with pytest.raises(
        HashMismatch, match=r"nvidia_cuda_nvcc.* is not the file that the pinned toolkit names: its sha256 is"
    ):
        install(wheels)
    assert left_behind(cache) == []


def test_a_wheel_that_lacks_a_part(offered: Path, cache: Path) -> None:
    make_wheel(offered, "nvidia-cublas", {"include/cublas_v2.h": ""})
    with pytest.raises(ToolkitUnusable, match="do not make a complete toolkit: no cuBLAS, cuBLASLt"):
        install(pinned(offered))
    assert left_behind(cache) == []


@pytest.mark.parametrize(
    "member", ["/etc/evil", "nvidia/cu13/bin/../../../evil.dist-info", "link.dist-info/licenses/x"]
)
def test_a_wheel_that_reaches_out(offered: Path, cache: Path, member: str) -> None:
    path = make_wheel(offered, "nvidia-cublas", PACKAGES["nvidia-cublas"])
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo(member)
        info.external_attr = (0o120777 if member.startswith("link") else 0o644) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ArchiveUnsafe, match="leaves the wheel, or is not a regular file"):
        install(pinned(offered))
    assert left_behind(cache) == []


def test_a_file_that_is_no_wheel(offered: Path, cache: Path) -> None:
    wheels = pinned(offered)
    (offered / wheels.files["nvidia-cublas"].file).write_bytes(b"no zip")
    with pytest.raises(HashMismatch, match=r"nvidia_cublas.* is not a readable wheel"):
        install(pinned(offered))
    assert left_behind(cache) == []


def test_no_disk_for_it(offered: Path, cache: Path) -> None:
    with pytest.raises(DiskTooSmall, match=r"the CUDA toolkit \(.* to download, .* unpacked\) takes") as caught:
        install(replace(pinned(offered), unpacked=10**18))
    assert "APEX_CACHE_DIR" in str(caught.value.hint)
    assert left_behind(cache) == []
    assert not (cache / "downloads").exists()


def test_two_at_once(offered: Path, cache: Path) -> None:
    code = (
        "import pickle, sys; from apex_build.toolchain.cuda.wheels import *; "
        "print(install(pickle.load(sys.stdin.buffer)).root)"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)
    ]
    answers = {child.communicate(pickle.dumps(pinned(offered)), timeout=120)[0].decode().strip() for child in children}
    assert [child.returncode for child in children] == [0, 0]
    assert answers == {str(pinned(offered).root)}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_pins(machine: str) -> None:
    """The extra `cuda` has the same versions; each machine type has its own wheels."""
    wheels = pinned_wheels(machine)
    assert pinned_wheels({"x86_64": "AMD64", "aarch64": "arm64"}[machine]) == wheels
    for name, file in wheels.files.items():
        package, version, _, tags = parse_wheel_filename(file.file)
        assert (package, str(version)) == (name, wheels.versions[name])
        assert all(tag.platform.endswith(f"_{machine}") and tag.platform.startswith("manylinux") for tag in tags)
        assert len(file.sha256) == 64
        assert file.size
    declared = [Requirement(text) for text in importlib.metadata.requires("apex-build") or []]
    extra = {item.name: str(item.specifier) for item in declared if item.marker and "cuda" in str(item.marker)}
    assert extra == {name: f"=={version}" for name, version in wheels.versions.items()}


def test_a_machine_type_without_wheels() -> None:
    with pytest.raises(ToolkitUnusable, match="no wheels of the CUDA toolkit for riscv64, only for aarch64 and x86_64"):
        pinned_wheels("riscv64")


@pytest.mark.network
def test_the_index_offers_the_pinned_wheels() -> None:
    """For both machine types, by their hashes: nothing is downloaded."""
    from unearth import PackageFinder

    from apex_build.fetching.pip_config import open_session, read_pip_config

    config = read_pip_config()
    with open_session(config) as session:
        finder = PackageFinder(
            session,
            index_urls=[config.index_url] if config.index_url else [],
            ignore_compatibility=True,
            only_binary=[":all:"],
        )
        for machine in ("x86_64", "aarch64"):
            for file in pinned_wheels(machine).files.values():
                found = [
                    match.link for match in finder.find_matches(file.requirement) if match.link.filename == file.file
                ]
                if not found:
                    pytest.skip(f"the package index has no {file.file}")
                assert (found[0].hash_option or {}).get("sha256", [file.sha256]) == [file.sha256]


def test_half_a_toolkit_is_told_part_by_part(offered: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(install(pinned(offered)).root, half, symlinks=True)
    for path in half.rglob("*cublas*"):
        path.unlink(missing_ok=True) if path.is_file() or path.is_symlink() else shutil.rmtree(path)
    said = told(judge(half))
    assert "CUDA 13.0.88, missing: cuBLAS headers, cuBLAS, cuBLASLt; there: nvcc, ptxas" in said
    (half / "include" / "cuda_runtime_api.h").write_text("#define CUDART_VERSION 12080\n")
    assert "CUDA runtime headers (those there are of CUDA 12.8)" in told(judge(half))


def test_this_machine_has_wheels_or_is_told() -> None:
    if platform.machine() in ("x86_64", "aarch64"):
        assert planned().version == pinned_wheels().version
