"""A CUDA toolkit made from PyPI's wheels, in the project's cache: fetched once, verified, none of their code run."""

from __future__ import annotations

import platform
import shutil
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from apex_build import places
from apex_build.errors import ArchiveUnsafe, HashMismatch, ToolkitUnusable
from apex_build.fetching.download import IndexFile, download
from apex_build.fetching.pip_config import read_pip_config
from apex_build.progress import Report, Step, silent
from apex_build.storage.artifacts import Artifact, making_folder
from apex_build.storage.digests import sha256_json
from apex_build.storage.disk import amount, check_room, writing
from apex_build.storage.json_files import read_json
from apex_build.storage.manifest import TOOLKIT
from apex_build.toolchain.cuda.toolkit import CudaToolkit, judge

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LAYOUT = 1  # raise it when the same wheels are laid out differently
_MANIFEST = "apex-toolkit.json"
_INSIDE = "nvidia/cu13/"  # where all of these wheels have their files
_FOLDERS = {"bin": "bin", "include": "include", "lib": "lib64", "nvvm": "nvvm"}  # of the wheels -> of the root
_ELSEWHERE = (
    "pip download --no-deps 'apex-build[cuda]' where there is a network, then PIP_FIND_LINKS=FOLDER; or "
    "--cuda-toolchain system"
)


@dataclass(frozen=True)
class ToolkitRecord:
    """The manifest beyond its head."""

    version: str
    machine: str
    packages: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Wheels:
    """The pinned wheels for one machine type. `unpacked` is the size of the toolkit that they make, in bytes."""

    machine: str
    version: str
    newest_host: dict[str, int]
    gpu_codes: tuple[int, ...]
    unpacked: int
    files: dict[str, IndexFile]  # by package
    versions: dict[str, str]

    @property
    def packages(self) -> dict[str, dict[str, str]]:
        return {name: {"version": self.versions[name], "sha256": file.sha256} for name, file in self.files.items()}

    @property
    def size(self) -> int:
        return sum(file.size or 0 for file in self.files.values())

    @property
    def root(self) -> Path:
        digest = sha256_json({"layout": _LAYOUT, "packages": self.packages})[:12]
        return places.cache_root() / "toolchains" / f"cuda-{self.version}-{self.machine}-{digest}"


def pinned_wheels(machine: str | None = None) -> Wheels:
    """The pinned wheels for a machine type such as aarch64, by default this machine's. Raises ToolkitUnusable."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(
        (machine or platform.machine()).lower(), machine or platform.machine()
    )
    data = tomllib.loads(Path(__file__).with_name("wheels.toml").read_text(encoding="utf-8"))
    if machine not in data["unpacked"]:
        known = " and ".join(sorted(data["unpacked"]))
        raise ToolkitUnusable(
            f"there are no wheels of the CUDA toolkit for {machine}, only for {known}", hint="--cuda-toolchain system"
        )
    files = {
        wheel["name"]: IndexFile(
            f"{wheel['name']}=={wheel['version']}",
            **wheel[machine],
            named_by="the pinned toolkit",
            elsewhere=_ELSEWHERE,
        )
        for wheel in data["wheel"]
    }
    return Wheels(
        machine,
        data["version"],
        {"GNU": data["newest_gcc"], "Clang": data["newest_clang"]},
        tuple(data["gpu_codes"]),
        data["unpacked"][machine],
        files,
        {wheel["name"]: wheel["version"] for wheel in data["wheel"]},
    )


def planned(wheels: Wheels | None = None) -> CudaToolkit:
    """The toolkit from PyPI: the one in the cache, or the future one (without parts)."""
    wheels = wheels or pinned_wheels()
    return _installed(wheels) or CudaToolkit(wheels.root, wheels.version, "pypi", {}, wheels.packages)


def install(wheels: Wheels | None = None, report: Report = silent) -> CudaToolkit:
    """Fetch the wheels and lay them out as a toolkit root, once; afterwards no network is needed.

    An interrupted download resumes with the missing wheels. The wheels are removed from the cache once the
    toolkit is complete. Raises DownloadFailed, HashMismatch, DiskTooSmall, ArchiveUnsafe, ToolkitUnusable.
    """
    wheels = wheels or pinned_wheels()
    if found := _installed(wheels):
        return found
    artifact = Artifact(wheels.root, TOOLKIT, {"layout": _LAYOUT, "packages": wheels.packages}, wheels.root / _MANIFEST)
    with making_folder(artifact, intact=lambda _: _installed(wheels) is not None, report=report) as draft:
        if draft.found:
            return planned(wheels)
        _check_disk(wheels)
        config = read_pip_config()
        fetched = [download(file, report, config) for file in wheels.files.values()]
        for number, (name, path) in enumerate(zip(wheels.files, fetched, strict=True)):
            report(Step("unpacking the CUDA toolkit", number, len(fetched), "wheels"))
            _unpack(path, name, draft.part)
        _link_names(draft.part / "lib64")
        toolkit = judge(draft.part, "pypi", wheels.packages)
        if toolkit.missing:
            raise ToolkitUnusable(
                f"the wheels of CUDA {wheels.version} do not make a complete toolkit: no {', '.join(toolkit.missing)}"
            )
        draft.done(ToolkitRecord(wheels.version, wheels.machine, wheels.packages))
    for path in fetched:
        shutil.rmtree(path.parent, ignore_errors=True)
    return planned(wheels)


def _installed(wheels: Wheels) -> CudaToolkit | None:
    try:
        packages = read_json(wheels.root / _MANIFEST)["packages"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if packages != wheels.packages:
        return None
    toolkit = judge(wheels.root, "pypi", wheels.packages)
    return None if toolkit.missing else toolkit


def _check_disk(wheels: Wheels) -> None:
    """Check for room for the missing wheels, and for all of them unpacked."""
    folder = wheels.root.parent
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    to_come = sum(file.size or 0 for file in wheels.files.values() if not file.cached.is_file())
    what = f"the CUDA toolkit ({amount(to_come)} to download, {amount(wheels.unpacked)} unpacked)"
    check_room(folder, to_come + wheels.unpacked, what, hint="APEX_CACHE_DIR=FOLDER names a cache on another disk")


def _unpack(wheel: Path, package: str, root: Path) -> None:
    """Unpack the wheel's toolkit files to their places in `root`, its licence to licenses/<package>/."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member, target in _members(archive, wheel.name, package):
                path = root / target
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, path.open("xb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                if target.parts[0] in ("bin", "nvvm") and (member.external_attr >> 16) & 0o111:
                    path.chmod(0o755)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise HashMismatch(f"{wheel.name} is not a readable wheel: {error}") from None


def _members(archive: zipfile.ZipFile, name: str, package: str) -> Iterator[tuple[zipfile.ZipInfo, PurePosixPath]]:
    for member in archive.infolist():
        if member.is_dir():
            continue
        path = PurePosixPath(member.filename)
        kind = (member.external_attr >> 16) & 0o170000
        if path.is_absolute() or ".." in path.parts or "\\" in member.filename or kind not in (0, 0o100000):
            raise ArchiveUnsafe(f"{name}: the member {member.filename!r} leaves the wheel, or is not a regular file")
        if path.parts[0].endswith(".dist-info"):
            if path.parts[1:2] == ("licenses",):
                yield member, PurePosixPath("licenses", package, *path.parts[2:])
        elif member.filename.startswith(_INSIDE) and path.parts[2] in _FOLDERS:
            yield member, PurePosixPath(_FOLDERS[path.parts[2]], *path.parts[3:])


def _link_names(libraries: Path) -> None:
    """libcublas.so -> libcublas.so.13, for linkers. `lib` is a link to lib64, for programs that look there."""
    for path in sorted(libraries.glob("lib*.so.*")):
        link = path.with_name(path.name.partition(".so.")[0] + ".so")
        if not link.exists():
            link.symlink_to(path.name)
    libraries.with_name("lib").symlink_to(libraries.name)
