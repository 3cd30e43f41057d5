"""Get the pinned commit from upstream's git repository by a shallow fetch into a scratch folder."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from apex_build.errors import DownloadFailed, HashMismatch
from apex_build.progress import Report, Step, silent
from apex_build.source.git import command, committed_files, environment, git, last_words, missing
from apex_build.source.pins import Pin
from apex_build.source.tree_digest import wanted
from apex_build.storage.scratch import scratch_folder

_ELSEWHERE = "apex source fetch --from pypi, or --archive FILE"
_PROGRESS = re.compile(r"(?:remote: )?([A-Z][A-Za-z ]+):\s+\d+% \((\d+)/(\d+)\)")


def upstream_files(
    pin: Pin, repository: str | None, report: Report = silent, want: Callable[[str], bool] = wanted
) -> Iterator[tuple[str, bytes]]:
    """The wanted files of the pinned commit: (path, content). `repository`: a URL or a folder to use instead of the
    pin's.

    Raises DownloadFailed if git cannot fetch, HashMismatch if it fetches another commit.
    """
    place = repository or pin.repository
    if Path(place).exists():
        place = str(Path(place).resolve())
    with scratch_folder("upstream") as folder:
        git(None, "init", "--quiet", folder)
        _fetch(folder, place, pin, report)
        # ignore replace refs, which could substitute another commit
        found = git(folder, "rev-parse", "--verify", "FETCH_HEAD^{commit}", env={"GIT_NO_REPLACE_OBJECTS": "1"})
        if found != pin.commit:
            raise HashMismatch(f"{place}: expected commit {pin.commit} of pin {pin.name}, found {found}")
        yield from committed_files(folder, pin.commit, env={"GIT_NO_REPLACE_OBJECTS": "1"}, want=want)


def _fetch(folder: Path, place: str, pin: Pin, report: Report) -> None:
    # the user's own configuration applies here: proxy, certificates, credentials, rewritten URLs
    arguments = ("fetch", "--progress", "--depth", "1", "--no-tags", "--no-recurse-submodules", "--", place, pin.commit)
    try:
        fetch = subprocess.Popen(
            command(folder, *arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment(own=False),
            cwd=folder,
            text=True,
            errors="replace",
        )
    except FileNotFoundError:
        raise missing(folder) from None
    said: list[str] = []
    with fetch:
        try:
            assert fetch.stderr
            for line in fetch.stderr:  # text mode ends lines at \r too
                if match := _PROGRESS.match(line):
                    report(
                        Step(f"fetching {pin.commit[:12]}: {match[1].lower()}", int(match[2]), int(match[3]), "objects")
                    )
                else:
                    said.append(line)
        except BaseException:
            fetch.terminate()
            raise
    if fetch.returncode != 0:
        words = last_words("".join(said).encode())
        said_all = f"git could not fetch commit {pin.commit} from {place}: {words}"
        raise DownloadFailed(
            re.sub(r"(//)[^/@\s]*@", r"\1***@", said_all), hint=_ELSEWHERE
        )  # no password on the screen
