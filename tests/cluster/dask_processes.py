"""Real schedulers and workers of Dask for tests, as processes that can be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any


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


def worker(
    address: str, folder: Path, *more: object, **environment: str
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    settings = ("--no-nanny", "--no-dashboard", "--host", "127.0.0.1", "--local-directory", folder / "dask")
    threads = () if "--nthreads" in more else ("--nthreads", 1)
    return process(
        "distributed.cli.dask_worker", address, *settings, *threads, *more, log=folder / "worker.log", **environment
    )


def until(what: Callable[[], object], child: subprocess.Popen[Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
