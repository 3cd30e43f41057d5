"""Run git so that the user's configuration, hooks and environment cannot change the result."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from apex_build.errors import ApexError, ArchiveUnsafe, DiskTooSmall, GitFailed
from apex_build.fetching.archive import MAX_FILE
from apex_build.source.tree_digest import check_path, wanted

# Variables that point git at another repository (set, for instance, while a hook of an enclosing project runs).
_LOCAL = {
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_CEILING_DIRECTORIES",
    "GIT_COMMON_DIR",
    "GIT_CONFIG",
    "GIT_CONFIG_COUNT",
    "GIT_CONFIG_PARAMETERS",
    "GIT_DIR",
    "GIT_GRAFT_FILE",
    "GIT_INDEX_FILE",
    "GIT_NAMESPACE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_PREFIX",
    "GIT_REPLACE_REF_BASE",
    "GIT_SHALLOW_FILE",
    "GIT_WORK_TREE",
}
_SETTINGS = {
    "advice.detachedHead": "false",
    "commit.gpgSign": "false",
    "core.attributesFile": os.devnull,
    "core.autocrlf": "false",
    "core.excludesFile": os.devnull,
    "core.fsmonitor": "false",
    "core.hooksPath": os.devnull,
    "core.quotePath": "false",
    "gc.auto": "0",
    "http.lowSpeedLimit": "1000",  # bytes per second; git gives up if the server is slower for the time below
    "http.lowSpeedTime": "60",
    "i18n.commitEncoding": "UTF-8",
    "i18n.logOutputEncoding": "UTF-8",
    "log.showSignature": "false",
}


def environment(extra: Mapping[str, str] | None = None, *, own: bool = True) -> dict[str, str]:
    """The environment for git. `own=False` keeps the user's configuration, which the network may need (proxy,
    certificates).
    """
    env = {
        key: value for key, value in os.environ.items() if key not in _LOCAL and (not own or not key.startswith("GIT_"))
    }
    env.update(LC_ALL="C", LANGUAGE="C", GIT_TERMINAL_PROMPT="0", GIT_OPTIONAL_LOCKS="0")
    if own:
        # HOME and XDG_CONFIG_HOME for versions of git that do not know GIT_CONFIG_GLOBAL
        env.update(GIT_CONFIG_NOSYSTEM="1", GIT_ATTR_NOSYSTEM="1", GIT_CONFIG_GLOBAL=os.devnull, HOME=os.devnull)
        env.update(XDG_CONFIG_HOME=os.devnull)
    env.update(extra or {})
    return env


def command(repository: Path | None, *arguments: str | Path) -> list[str]:
    """The command line for git. It names the repository instead of letting git search for one: a folder without a
    repository must not resolve to an enclosing one.
    """
    line = ["git"]
    for key, value in _SETTINGS.items():
        line += ["-c", f"{key}={value}"]
    if repository is not None:
        line += [f"--git-dir={repository / '.git'}", f"--work-tree={repository}"]
    return [*line, *map(str, arguments)]


def run(
    repository: Path | None,
    *arguments: str | Path,
    feed: bytes | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    own: bool = True,
) -> subprocess.CompletedProcess[bytes]:
    """Run git and return the completed process, whatever its return code. `own` as in `environment`."""
    try:
        return subprocess.run(
            command(repository, *arguments),
            input=b"" if feed is None else feed,
            capture_output=True,
            env=environment(env, own=own),
            cwd=cwd or repository or "/",  # never the user's folder: a .git there may name programs to run
            check=False,
        )
    except FileNotFoundError:
        raise missing(cwd or repository) from None


def missing(folder: Path | None = None) -> GitFailed:
    if folder is not None and not folder.is_dir():
        return GitFailed(f"the folder {folder} does not exist any more")
    return GitFailed("git not found", hint="sudo apt-get install git")


def git(
    repository: Path | None,
    *arguments: str | Path,
    feed: bytes | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run git and return its output, without the final newline. Raises GitFailed with git's message."""
    done = run(repository, *arguments, feed=feed, env=env, cwd=cwd)
    if done.returncode != 0:
        where = f" in {repository}" if repository else ""
        raise failed(f"git {arguments[0]} failed{where}", done.stderr)
    return done.stdout.decode("utf-8", "surrogateescape").rstrip("\n")


def failed(what: str, stderr: bytes) -> ApexError:
    words = f"{what}: {last_words(stderr)}"
    return DiskTooSmall(words) if "No space left on device" in words else GitFailed(words)


def last_words(stderr: bytes) -> str:
    lines = [line.strip() for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    return "; ".join(lines[-4:]) or "no message"


def committed_files(
    repository: Path, revision: str, env: Mapping[str, str] | None = None, want: Callable[[str], bool] = wanted
) -> Iterator[tuple[str, bytes]]:
    """The wanted files of a commit: (path, content), read from git's objects, so that attributes and line-ending rules
    do not apply.

    Raises ArchiveUnsafe if one is a link or a submodule.
    """
    listing = git(repository, "ls-tree", "-r", "-z", "--full-tree", revision, env=env)
    entries: list[tuple[str, str]] = []
    for entry in filter(None, listing.split("\0")):
        description, path = entry.split("\t", 1)
        mode, _kind, object_id = description.split(" ")
        if want(path):
            if mode not in ("100644", "100755"):
                kind = {"120000": "a symbolic link", "160000": "a submodule"}.get(mode, f"an entry of mode {mode}")
                raise ArchiveUnsafe(f"{revision[:12]}: {path} is {kind}")
            check_path(path, revision[:12])
            entries.append((path, object_id))
    yield from _contents(repository, entries, env)


def _contents(
    repository: Path, entries: Iterable[tuple[str, str]], env: Mapping[str, str] | None
) -> Iterator[tuple[str, bytes]]:
    reader = subprocess.Popen(
        command(repository, "cat-file", "--batch"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(env),
        cwd=repository,
    )
    try:
        assert reader.stdin and reader.stdout
        for path, object_id in entries:
            reader.stdin.write(f"{object_id}\n".encode())
            reader.stdin.flush()
            head = reader.stdout.readline().split()
            if len(head) != 3 or head[1] != b"blob":
                raise GitFailed(f"{repository}: the content of {path} (object {object_id}) is missing or damaged")
            size = int(head[2])
            if size > MAX_FILE:
                raise ArchiveUnsafe(
                    f"{path} is too large for a source file: expected at most {MAX_FILE} bytes, found {size}"
                )
            content = reader.stdout.read(size + 1)[:-1]
            if len(content) != size:
                raise GitFailed(f"{repository}: the content of {path} (object {object_id}) is cut short")
            yield path, content
    except BrokenPipeError:
        raise GitFailed(f"{repository}: git cat-file ended early; the repository may be damaged") from None
    finally:
        reader.kill()
        reader.communicate()
