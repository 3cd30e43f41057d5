"""Work on untrusted templates in a child process with limited time and memory: JSON in, JSON out.

Jinja's sandbox keeps a template away from Python's internals and from files. It limits neither time nor memory (`{{ 'x'
* 10**12 }}`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from apex_build.native.surroundings import bound
from apex_build.system import require_linux, unsupported

MEMORY_BYTES = 1 << 30
ANSWER_CHARACTERS = 128 << 20


class OutOfBounds(Exception):
    """The child exceeded its time or memory, or died otherwise."""


def ask(module: str, request: Mapping[str, Any], *, wall_seconds: float) -> dict[str, Any]:
    """Run `python -m module`, which calls `serve`, and give its answer. Raises OutOfBounds, SystemUnsupported."""
    require_linux("rendering a template within bounds")
    try:
        child = subprocess.run(
            [*bound(), sys.executable, "-m", module],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=wall_seconds,
            check=False,
            cwd=Path(__file__).parent.parent,  # '-m' looks there first, and not in the user's current folder
        )
    except subprocess.TimeoutExpired:
        raise OutOfBounds(f"not done within {wall_seconds:.0f} s") from None
    if child.returncode < 0:
        raise OutOfBounds(f"more computing than is allowed, or more than {MEMORY_BYTES >> 30} GiB of memory")
    if child.returncode:
        raise OutOfBounds(f"stopped: {child.stderr.strip()[-2000:]}")
    answer: dict[str, Any] = json.loads(child.stdout)
    if "unbounded" in answer:
        raise unsupported(f"this system cannot limit the time and memory of a template: {answer['unbounded']}")
    return answer


def serve(
    answer: Callable[[Mapping[str, Any]], dict[str, Any]], *, cpu_seconds: Callable[[Mapping[str, Any]], int]
) -> None:
    """The child's side: one request from stdin, one answer to stdout, under limits. `cpu_seconds`: what a request may
    take.
    """
    request = json.load(sys.stdin)
    try:
        import resource  # not everywhere

        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds(request),) * 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it writes to pipes only
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, AttributeError, OSError, ValueError) as error:  # as on macOS
        json.dump({"unbounded": f"setrlimit: {error}"}, sys.stdout)
        return
    text = json.dumps(answer(request))
    if len(text) > ANSWER_CHARACTERS:
        sys.exit(f"it produces more than {ANSWER_CHARACTERS >> 20} MiB")
    sys.stdout.write(text)
