"""Files from the index that pip is configured with: found and fetched without running any of their code."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

import httpx2
from unearth import Link, PackageFinder
from unearth.fetchers.sync import PyPIClient

from apex_build.errors import ApexError, DownloadFailed, HashMismatch
from apex_build.fetching.deadline import OutOfTime, deadline
from apex_build.fetching.pip_config import PipConfig, open_session, read_pip_config
from apex_build.places import cache_root
from apex_build.progress import Report, Step, silent
from apex_build.storage.digests import sha256_file
from apex_build.storage.disk import writing
from apex_build.storage.outputs import whole_file

_NETWORK = (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError)
# As pip does: the server must not compress the file again in transit, since the file itself is hashed.
_AS_IT_IS = {"Accept-Encoding": "identity"}
_ELSEWHERE = "apex source fetch --from git, or --archive FILE with a copy of the sdist or of the tree"
_PATIENCE = 4.0  # times pip's timeout, which is for a single read: for answers that trickle in
_SLOWEST = 4e3  # bytes a second; slower downloads are given up
_LIMIT = 1 << 30  # bytes of a download whose pin names no size


@dataclass(frozen=True)
class IndexFile:
    """A file of the package index whose hash is known in advance. `named_by` and `elsewhere` are for
    messages.
    """

    requirement: str
    file: str
    sha256: str
    size: int | None
    named_by: str
    elsewhere: str = _ELSEWHERE

    @property
    def cached(self) -> Path:
        return cache_root() / "downloads" / self.sha256 / self.file


def check(path: Path, wanted: IndexFile) -> None:
    try:
        size, found = path.stat().st_size, sha256_file(path)
    except OSError as error:
        raise DownloadFailed(f"{path} cannot be read: {error.strerror}") from None
    if found == wanted.sha256:
        return
    if wanted.size is not None and size < wanted.size:
        raise DownloadFailed(
            f"{path} is cut short: it has {size} bytes of {wanted.size}", hint="copy or download it again"
        )
    raise HashMismatch(
        f"{path} is not the file that {wanted.named_by} names: its sha256 is {found}, expected {wanted.sha256}"
    )


def download(wanted: IndexFile, report: Report = silent, config: PipConfig | None = None) -> Path:
    """The verified file in the cache; fetched if it is missing. `config`: pass it for several files, so that pip is
    asked once.

    Raises DownloadFailed (not found, no network, cut short), HashMismatch (only different files are offered).
    """
    target = wanted.cached
    if target.is_file():
        try:
            check(target, wanted)
            return target
        except ApexError:
            target.unlink()
    config = config or read_pip_config()
    problems: list[ApexError] = []
    with writing(target.parent), _warnings() as warnings, open_session(config) as session:
        target.parent.mkdir(parents=True, exist_ok=True)
        for link in _candidates(wanted, config, session, warnings):
            try:
                _fetch(link, wanted, session, config, target, report)
                return target
            except ApexError as error:
                problems.append(error)
    if problems:
        raise problems[0]
    said = "".join(f"; {line}" for line in dict.fromkeys(warnings))
    raise DownloadFailed(
        f"no package index that pip is configured with offers {wanted.file}{said}", hint=wanted.elsewhere
    )


def offered_sha256(requirement: str, file: str) -> str:
    """The sha256 that the configured index gives for a file, so that it can be pinned. Raises
    DownloadFailed.
    """
    config, wanted = read_pip_config(), IndexFile(requirement, file, "", None, requirement)
    with _warnings() as warnings, open_session(config) as session:
        for link in _candidates(wanted, config, session, warnings):
            if offered := (link.hash_option or {}).get("sha256", []):
                return str(offered[0])
            if link.is_file:
                return sha256_file(Path(link.file_path))
    said = "".join(f"; {line}" for line in dict.fromkeys(warnings))
    raise DownloadFailed(
        f"no package index that pip is configured with offers {file} with its sha256{said}",
        hint="pip index versions llama-cpp-python lists the versions",
    )


def _candidates(wanted: IndexFile, config: PipConfig, session: PyPIClient, warnings: list[str]) -> Iterator[Link]:
    """Links to the pinned file, nearest place first. A broken source does not affect the others."""
    for finder in _finders(config, session, warnings, wheels=wanted.file.endswith(".whl")):
        for attempt in range(config.retries + 1):
            try:
                with deadline(_PATIENCE * config.timeout):
                    matches = list(finder.find_matches(wanted.requirement, allow_yanked=True, allow_prereleases=True))
            except OutOfTime:
                warnings.append(f"an index did not answer within {_PATIENCE * config.timeout:.0f} s")
                break
            except _NETWORK as error:
                if attempt == config.retries:
                    warnings.append(_say(error))
                _pause(attempt, config.retries)
            except (OSError, ValueError) as error:
                warnings.append(_say(error))
                break
            else:
                yield from (match.link for match in matches if unquote(match.link.filename) == wanted.file)
                break


def _finders(config: PipConfig, session: PyPIClient, warnings: list[str], *, wheels: bool) -> Iterator[PackageFinder]:
    def finder(index_urls: tuple[str, ...] = (), find_links: tuple[str, ...] = ()) -> PackageFinder:
        # no source at all means the default index, here as in pip: no host is named in this project
        kind: dict[str, Any] = {"only_binary" if wheels else "no_binary": [":all:"]}
        return PackageFinder(
            cast(Any, session), index_urls=index_urls, find_links=find_links, ignore_compatibility=True, **kind
        )

    for place in config.find_links:
        local = Path(place).expanduser()
        if "://" not in place and not local.exists():
            warnings.append(f"find-links names {place}, which does not exist")
            continue
        yield finder(find_links=(place if "://" in place else str(local),))
    if not config.no_index:
        yield finder(index_urls=(config.index_url,) if config.index_url else ())
        for url in config.extra_index_urls:
            yield finder(index_urls=(url,))


def _fetch(link: Link, wanted: IndexFile, session: PyPIClient, config: PipConfig, target: Path, report: Report) -> None:
    offered = (link.hash_option or {}).get("sha256", [])
    if offered and wanted.sha256 not in offered:
        raise HashMismatch(
            f"{link.redacted} is offered with sha256 {offered[0]}, but {wanted.named_by} expects {wanted.sha256}",
            hint=wanted.elsewhere,
        )
    patience = _PATIENCE * config.timeout
    for attempt in range(config.retries + 1):
        try:
            with whole_file(target) as part:
                _receive(link, wanted, session, part, patience, report)
            return
        except OutOfTime:
            raise DownloadFailed(
                f"{link.redacted}: gave up: nothing received for {patience:.0f} s, or less than "
                f"{_SLOWEST / 1e3:.0f} kB per second",
                hint=wanted.elsewhere,
            ) from None
        except DownloadFailed:
            if attempt == config.retries or link.is_file:
                raise
            _pause(attempt, config.retries)


def _receive(link: Link, wanted: IndexFile, session: PyPIClient, part: Path, patience: float, report: Report) -> None:
    """Download to `part` and verify it. DownloadFailed is worth another try, HashMismatch and OutOfTime are not."""
    digest, done, began = hashlib.sha256(), 0, time.monotonic()
    limit = wanted.size or _LIMIT
    task = f"downloading {wanted.file}"
    try:
        with (
            deadline(patience) as again,
            session.get_stream(link.normalized, headers=_AS_IT_IS) as response,
            part.open("wb") as file,
        ):
            if response.status_code >= 400:
                raise DownloadFailed(
                    f"{link.redacted}: the server answers {response.status_code} {response.reason_phrase}",
                    hint=wanted.elsewhere,
                )
            length = response.headers.get("Content-Length", "")
            total = wanted.size or (int(length) if length.isdecimal() else None)
            for block in response.iter_raw():  # as it arrives: fixed-size blocks would hide a trickle
                again()
                done += len(block)
                if time.monotonic() - began > patience + done / _SLOWEST:
                    raise OutOfTime
                if done > limit:
                    raise HashMismatch(
                        f"{link.redacted} is larger than the {limit} bytes that {wanted.named_by} names",
                        hint=wanted.elsewhere,
                    )
                digest.update(block)
                file.write(block)
                report(Step(task, done / 1e6, None if total is None else total / 1e6, "MB"))
    except _NETWORK as error:
        raise DownloadFailed(
            f"{link.redacted}: cut short after {done} bytes: {_say(error)}", hint=wanted.elsewhere
        ) from None
    if digest.hexdigest() != wanted.sha256:
        if wanted.size is not None and done < wanted.size:
            raise DownloadFailed(
                f"{link.redacted} is cut short: received {done} bytes of {wanted.size}", hint=wanted.elsewhere
            )
        found = digest.hexdigest()
        raise HashMismatch(
            f"{link.redacted} is not the file that {wanted.named_by} names: its sha256 is {found}, expected "
            f"{wanted.sha256}",
            hint=wanted.elsewhere,
        )


def _pause(attempt: int, retries: int) -> None:
    if attempt < retries:
        time.sleep(0.25 * 2**attempt)


def _say(error: Exception) -> str:
    return str(error) or type(error).__name__


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect unearth's warnings (an index that does not answer, or is not trusted) for our message."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("unearth"), Collect(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
