"""Fetch the source distribution of llama.cpp that a pin names from the package index, and read it."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from apex_build.errors import ArchiveUnsafe, DownloadFailed, HashMismatch
from apex_build.fetching.archive import MAX_FILE, MAX_MEMBERS, MAX_TOTAL, member_path, members_of, open_tar
from apex_build.fetching.download import IndexFile, check, download
from apex_build.progress import Report, silent
from apex_build.source.pins import Pin
from apex_build.source.tree_digest import check_path, wanted


def check_sdist(path: Path, pin: Pin) -> None:
    """Raise DownloadFailed if the file is shorter than the pinned one, HashMismatch if it differs."""
    check(path, _sdist(pin))


def download_sdist(pin: Pin, report: Report = silent) -> Path:
    """The pinned sdist in the cache, fetched if it is missing, and verified. Raises as `download`."""
    return download(_sdist(pin), report)


def _sdist(pin: Pin) -> IndexFile:
    return IndexFile(pin.requirement, pin.file, pin.sha256, pin.size, f"pin {pin.name}")


def read_archive(
    archive: Path, folder: str, commit: str, want: Callable[[str], bool] = wanted
) -> Iterator[tuple[str, bytes]]:
    """The wanted files of llama.cpp in a tar archive: (path, content).

    The tree may be in `<top>/<folder>/` (an sdist), in `<top>/` (git archive, or a hosting site's tarball) or at the
    top. Raises ArchiveUnsafe if any member is a device or has a path that escapes, or if a wanted file is a link, a
    duplicate or absurdly large; DownloadFailed if the archive is cut short; HashMismatch if it contains something else.
    """
    with open_tar(archive) as tar:
        members: list[tuple[str, tarfile.TarInfo]] = []
        total = 0
        for member in members_of(archive, tar):
            total += max(member.size, 0)
            if len(members) >= MAX_MEMBERS or total > MAX_TOTAL or member.size < 0:
                limits = f"more than {MAX_MEMBERS} members or {MAX_TOTAL} bytes, or a negative size"
                raise ArchiveUnsafe(f"{archive.name}: refused at {member.name!r:.200}: {limits}")
            members.append((member_path(archive, member), member))
        _check_commit(archive, str(tar.pax_headers.get("comment", "")), commit)
        top = _top(archive, [path for path, member in members if member.isfile()], folder)
        chosen = _choose(archive, members, top, want)
        for path, member in chosen.items():
            file = tar.extractfile(member)
            content = b"" if file is None else file.read()
            if len(content) != member.size:
                raise DownloadFailed(f"{archive} is cut short: {path} ends after {len(content)} of {member.size} bytes")
            yield path, content


def _top(archive: Path, paths: list[str], folder: str) -> str:
    """The folder of llama.cpp's CMakeLists.txt in the archive, with a trailing slash."""
    roots = {path[: -len("CMakeLists.txt")] for path in paths if path.rpartition("/")[2] == "CMakeLists.txt"}
    trees = sorted(root for root in roots if f"{root}ggml/" in roots)
    for form in (rf"[^/]+/{re.escape(folder)}/", r"[^/]+/", r""):
        found = [root for root in trees if re.fullmatch(form, root)]
        if len(found) > 1:
            raise ArchiveUnsafe(f"{archive.name}: more than one source tree in the archive: {', '.join(found[:4])}")
        if found:
            return found[0]
    raise HashMismatch(f"{archive} does not contain llama.cpp: no CMakeLists.txt beside a folder ggml/")


def _choose(
    archive: Path, members: list[tuple[str, tarfile.TarInfo]], top: str, want: Callable[[str], bool]
) -> dict[str, tarfile.TarInfo]:
    chosen: dict[str, tarfile.TarInfo] = {}
    for path, member in members:
        path = path[len(top) :] if path.startswith(top) else ""
        link = member.issym() or member.islnk()
        if member.isdir() or not (want(path) or (link and want(f"{path}/file"))):
            continue
        check_path(path, archive.name)
        if link:
            kind = "symbolic" if member.issym() else "hard"
            raise ArchiveUnsafe(
                f"{archive.name}: {member.name!r}: expected a file, found a {kind} link to {member.linkname!r}"
            )
        if path in chosen:
            raise ArchiveUnsafe(f"{archive.name}: the member {member.name!r} occurs twice")
        if member.size > MAX_FILE:
            raise ArchiveUnsafe(
                f"{archive.name}: the member {member.name!r} is too large: expected at most {MAX_FILE} bytes, found "
                f"{member.size}"
            )
        if hasattr(tarfile, "data_filter"):  # Python 3.10.12, 3.11.4 and later: let the library check it too
            try:
                tarfile.data_filter(member, str(archive.parent / "nowhere"))
            except tarfile.FilterError as error:
                raise ArchiveUnsafe(f"{archive.name}: {error}") from None
        chosen[path] = member
    return chosen


def _check_commit(archive: Path, comment: str, commit: str) -> None:
    """git archive writes the name of the commit into the archive; if present, it must be the pinned one."""
    if re.fullmatch(r"[0-9a-f]{40}", comment) and comment != commit:
        raise HashMismatch(f"{archive.name}: expected upstream commit {commit}, found {comment}")


def commit_of(archive: Path, folder: str) -> str | None:
    """The commit of the llama.cpp in an sdist, read from git's folder for the submodule; None if that is missing."""
    with open_tar(archive) as tar:
        for member in members_of(archive, tar):
            if member.isfile() and member.name.endswith(f"/.git/modules/{folder}/HEAD") and member.size < 100:
                file = tar.extractfile(member)
                text = "" if file is None else file.read().decode("ascii", "replace").strip()
                return text if re.fullmatch(r"[0-9a-f]{40}", text) else None
    return None
