"""Reading an untrusted source archive: everything is checked from the headers before anything is written."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

from apex_build.errors import ApexError, ArchiveUnsafe, DownloadFailed, HashMismatch
from apex_build.places import cache_root
from apex_build.storage.disk import writing

MAX_FILE = 64 << 20  # bytes of one member; the largest file of the pinned trees that is kept has 4 MB
MAX_MEMBERS = 100_000
MAX_TOTAL = 4 << 30  # bytes, all members together; the pinned sdists have 0.2 GB
_MAX_EXTENSIONS = (
    16 << 20
)  # bytes of pax headers and long names, all members together; they become a multiple of that in memory
_MAX_GLOBAL = 64 << 10  # bytes of those that hold for all members after them: each member gets a copy
_DIGITS = re.compile(rb"\d{100}")  # tarfile's patterns take quadratic time on such a run
_MAX_WINDOW = 128 << 20  # bytes of memory that a zstd or xz stream may request
_DAMAGED = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, gzip.BadGzipFile, OSError)


@contextmanager
def _unpacked(raw: IO[bytes], blocks: Iterator[bytes]) -> Iterator[IO[bytes]]:
    """Decompress into an unnamed file: tarfile seeks back and forth, which these streams cannot."""
    with writing(cache_root()):
        cache_root().mkdir(parents=True, exist_ok=True)
        unnamed = tempfile.TemporaryFile(dir=cache_root())  # noqa: SIM115  its block is below
    with unnamed as file:
        with writing(cache_root()):
            for block in blocks:
                if file.tell() + len(block) > MAX_TOTAL:
                    raise ArchiveUnsafe(f"{raw.name}: refused: decompressed it has more than {MAX_TOTAL} bytes")
                file.write(block)
        file.seek(0)
        yield file


@contextmanager
def _unzstd(raw: IO[bytes]) -> Iterator[IO[bytes]]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    with (
        decompressor.stream_reader(raw, closefd=False) as stream,
        _unpacked(raw, iter(lambda: stream.read(1 << 20), b"")) as file,
    ):
        yield file


@contextmanager
def _unxz(raw: IO[bytes]) -> Iterator[IO[bytes]]:
    with _unpacked(raw, _xz_blocks(raw)) as file:
        yield file


def _xz_blocks(raw: IO[bytes]) -> Iterator[bytes]:
    """Read like lzma.open, several streams too, but with a bound on the memory that a stream may request."""
    given = raw.read(1 << 16)
    while given:
        decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MAX_WINDOW)
        while not decompressor.eof:
            if decompressor.needs_input and not given and not (given := raw.read(1 << 16)):
                raise EOFError("the xz stream ends before its end")
            block, given = decompressor.decompress(given, 1 << 20), b""
            yield block
        given = (decompressor.unused_data or raw.read(1 << 16)).lstrip(b"\0")


_OPENERS: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": _unxz,
    b"\x28\xb5\x2f\xfd": _unzstd,
}


class _Bounded:
    """A decompressed stream that never returns a huge block: tarfile reads extension headers whole, whatever size
    they claim. `in_headers`: everything read belongs to headers, whose total is bounded.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek = file.seek
        self.tell = file.tell
        self.in_headers = True
        self._left = _MAX_EXTENSIONS + tarfile.BLOCKSIZE * (MAX_MEMBERS + 2)

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > MAX_FILE:
            raise tarfile.TarError(f"a header that claims {size} bytes")
        if not self.in_headers:
            return self._file.read(size)
        self._left -= size
        if self._left < 0 or size > _MAX_EXTENSIONS:
            raise tarfile.TarError(f"more than {_MAX_EXTENSIONS >> 20} MiB of extension headers")
        data = self._file.read(size)
        if _DIGITS.search(data):
            raise tarfile.TarError("a header with a number of a hundred digits")
        return data


@contextmanager
def open_tar(archive: Path) -> Iterator[tarfile.TarFile]:
    """A tar archive, compressed or not. Raises DownloadFailed if it is missing or cut short, HashMismatch if it is
    not a tar archive.
    """
    try:
        with archive.open("rb") as raw:
            magic = raw.read(6)
            raw.seek(0)
            opener = next((opener for start, opener in _OPENERS.items() if magic.startswith(start)), None)
            with raw if opener is None else opener(raw) as file:
                bounded: Any = _Bounded(file)
                with _opened(bounded) as tar:
                    yield tar
    except ApexError:
        raise
    except FileNotFoundError:
        raise DownloadFailed(f"there is no archive {archive}") from None
    except tarfile.TarError as error:
        if any(words in str(error) for words in ("unexpected end of data", "truncated", "empty file")):
            raise DownloadFailed(f"{archive} is cut short: {error}", hint="copy or download it again") from None
        raise HashMismatch(f"{archive} is not a tar archive that can be read: {error}") from None
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno:
            raise DownloadFailed(f"{archive} cannot be read: {error.strerror}") from None
        raise DownloadFailed(f"{archive} is cut short or damaged: {error}", hint="copy or download it again") from None


def _opened(bounded: Any) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=bounded, mode="r:", encoding="utf-8", errors="surrogateescape")
    except (tarfile.TarError, *_DAMAGED):
        raise
    except Exception as error:  # it reads the first header
        raise tarfile.TarError(f"a header that cannot be read: {type(error).__name__}") from None


def members_of(archive: Path, tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members' headers. Contents may be read after the last one. Raises ArchiveUnsafe for absurd headers, and
    for sparse files, which our archives never have.
    """
    bounded: Any = tar.fileobj
    while (member := _next(tar)) is not None:
        if sum(len(key) + len(str(value)) for key, value in tar.pax_headers.items()) > _MAX_GLOBAL:
            raise ArchiveUnsafe(
                f"{archive.name}: refused at {member.name!r:.200}: more than {_MAX_GLOBAL} bytes of global headers"
            )
        if member.sparse is not None:
            raise ArchiveUnsafe(f"{archive.name}: the member {member.name!r:.200} is a sparse file")
        member.pax_headers = {}  # a copy of all global headers
        yield member
    bounded.in_headers = False


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except (tarfile.TarError, *_DAMAGED):
        raise
    except Exception as error:  # numbers and texts of headers reach int(), float() and recursion unchecked
        raise tarfile.TarError(f"a header that cannot be read: {type(error).__name__}") from None


def member_path(archive: Path, member: tarfile.TarInfo) -> str:
    """The member's path inside the archive, normalized. Refuses dangerous members."""
    name = member.name
    parts = re.split(r"[/\\]", name)
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        raise ArchiveUnsafe(f"{archive.name}: the member {name!r} has an absolute path")
    if ".." in parts:
        raise ArchiveUnsafe(f"{archive.name}: the member {name!r} leaves the folder it is extracted to")
    if not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
        raise ArchiveUnsafe(f"{archive.name}: the member {name!r} is a device, a pipe or of an unknown kind")
    path = "/".join(part for part in name.split("/") if part not in ("", "."))
    if member.issym() or member.islnk():
        # a symbolic link's target is relative to its folder, a hard link's to the archive's top
        target = re.split(r"[/\\]", member.linkname)
        depth = path.count("/") if member.issym() else 0
        for part in target:
            depth += -1 if part == ".." else part not in ("", ".")
            if depth < 0 or member.linkname.startswith(("/", "\\")):
                raise ArchiveUnsafe(
                    f"{archive.name}: the link {name!r} points outside the archive, to {member.linkname!r}"
                )
    return path
