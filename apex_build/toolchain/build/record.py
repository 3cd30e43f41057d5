"""A build's manifest beyond its head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from apex_build.toolchain.cuda.binary import Code


@dataclass(frozen=True)
class FileRecord:
    """`part`: the foreign product that it belongs to, if any."""

    sha256: str
    size: int
    part: str | None = None


@dataclass(frozen=True)
class PinRecord:
    name: str
    commit: str


@dataclass(frozen=True)
class PatchRecord:
    name: str
    sha256: str


@dataclass(frozen=True)
class CudaRecord:
    """The toolkit, the build's targets, and the device code that it contains."""

    origin: str
    version: str
    packages: Mapping[str, Mapping[str, str]]
    architectures: tuple[str, ...]
    device_code: Mapping[str, Code]
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class BuildRecord:
    """`key`: the first half of the identity, and the name of the build's folder."""

    key: str
    recipe: int
    backend: str
    source: str
    pin: PinRecord | None
    series: str | None
    patches: tuple[PatchRecord, ...]
    compiler: Mapping[str, str]
    compiler_cache: str
    options: Mapping[str, str]
    targets: tuple[str, ...]
    cpu: str | None
    environment: Mapping[str, str]
    host: str
    built: str
    seconds: float
    ggml_type_count: int | None
    files: Mapping[str, FileRecord]
    cuda: CudaRecord | None = None
