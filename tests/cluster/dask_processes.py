"""Real schedulers and workers of Dask for tests, as processes that can be killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from waiting import until

import apex_build
from apex_build.native.toolset import Toolset


@contextmanager
def process(*arguments: object, log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as said:
        child = subprocess.Popen(
            [sys.executable, "-m", *map(str, arguments)],
            stdout=said, stderr=said, env={**os.environ, **environment}, cwd=log.parent,
        )  # fmt: skip
    try:
        yield child
    finally:
        child.kill()
        child.wait()


@contextmanager
def scheduler(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start a scheduler; yields it and its address."""
    told = folder / f"scheduler-{time.monotonic_ns()}.json"
    common = ("--port", 0, "--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", told)
    with process("distributed.cli.dask_scheduler", *common, log=folder / "scheduler.log") as child:
        until(lambda: told.exists() and told.read_text().strip().endswith("}"), child)
        yield child, json.loads(told.read_text())["address"]


@contextmanager
def worker(address: str, folder: Path, *more: object, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a worker; yields it as soon as the scheduler knows it."""
    settings = ("--no-nanny", "--no-dashboard", "--host", "127.0.0.1", "--local-directory", folder / "dask")
    threads = () if "--nthreads" in more else ("--nthreads", 1)
    log = folder / f"worker-{time.monotonic_ns()}.log"
    command = ("distributed.cli.dask_worker", address, *settings, *threads, *more)
    with process(*command, log=log, **environment) as child:
        until(lambda: "Registered to" in log.read_text(), child)
        yield child


def wanted_by(address: str) -> int:
    """How many clients wait for the same task."""
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        most: int = client.run_on_scheduler(
            lambda dask_scheduler: max((len(task.who_wants) for task in dask_scheduler.tasks.values()), default=0)
        )
        return most


def other_build(tools: Toolset, folder: Path) -> Path:
    """The same libraries without their manifest, for APEX_TOOLS: apex cannot know that they are the same."""
    foreign = folder / "foreign"
    foreign.mkdir()
    (foreign / "bin").symlink_to(tools.bin)
    return foreign


def other_version(folder: Path) -> Path:
    """A copy of the package with another number, for PYTHONPATH."""
    here, other = Path(apex_build.__file__).parent, folder / "other"
    shutil.copytree(here, other / "apex_build", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("vendor", "patches", "plugins", "calibration_sets"):  # of a checkout
        if (data := here.parent / name).is_dir():
            (other / name).symlink_to(data)
    (other / "apex_build" / "__init__.py").write_text('__version__ = "9.9.9"\n')
    return other
