"""The cluster: a scheduler at an address, or one made here for a command's length; and which of its workers are fit."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from apex_build import __version__
from apex_build.cluster import worker as remote
from apex_build.errors import ClusterFailed, WorkersUnfit
from apex_build.native.toolset import Toolset
from apex_build.progress import Report, Step, silent

if TYPE_CHECKING:
    from distributed import Client

MISSING = "Python's package 'distributed' is missing"
_LOCAL = re.compile(r"local:(\d{1,3})")
_CONNECT = 10.0  # seconds
_FIRST_WORKER = 30.0
_CLOSE = 3.0
_NAMED = 3
_START = "dask worker ADDRESS --nthreads 1, on each machine"
_INSTALL = f"there: pip install 'apex-build[cluster]=={__version__}', and start the worker again"
_TOOLS = "apex build --export FILE here, apex build --import FILE --make-current there"


@dataclass
class Cluster:
    """`fit`: address -> worker; `refused`: address -> why, and what to do."""

    client: Client
    address: str
    report: Report = silent
    fit: dict[str, remote.About] = field(default_factory=dict)
    refused: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        return bool(self.client.status == "running")

    def at_once(self) -> int:
        """How many tasks are worked on at the same time."""
        return max(1, len(self.fit))

    def addresses(self) -> set[str]:
        return set(self.client.scheduler_info(n_workers=-1)["workers"])

    def look(self, tools: Toolset) -> None:
        """Ask new workers about themselves. Report each rejected one once."""
        here = self.addresses()
        for gone in (self.fit.keys() | self.refused.keys()) - here:
            self.fit.pop(gone, None)
            self.refused.pop(gone, None)
        new = sorted(here - self.fit.keys() - self.refused.keys())
        if not new:
            return
        answers: Mapping[str, Any] = self.client.run(remote.about, workers=new, on_error="return")
        for address, found in answers.items():
            name = f"{found.host} ({address})" if isinstance(found, remote.About) else address
            why, hint = _unfit(found, tools)
            if why:
                self.refused[address] = f"{name} {why}", hint
                self.report(Step(f"a worker is not used: {name} {why}", 0, said=True))
            else:
                self.fit[address] = found

    def check(self) -> None:
        """Raises WorkersUnfit if no worker can take the work."""
        if self.fit:
            return
        listed = [why for why, _ in self.refused.values()]
        more = f"\n  and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
        said = "".join(f"\n  {line}" for line in listed[:_NAMED]) + more
        raise WorkersUnfit(
            f"no worker of {self.address} can take the work" + (f":{said}" if said else ": it has none"),
            hint=next((hint for _, hint in self.refused.values()), _START),
        )


def _unfit(found: Any, tools: Toolset) -> tuple[str, str]:
    """Why the worker is not used, and what to do; empty for one that is fit."""
    if not isinstance(found, remote.About):
        said = str(found).splitlines()[0] if str(found) else ""
        return f"cannot run apex-build: {type(found).__name__}: {said}", _INSTALL
    if found.apex != __version__:
        return f"has apex-build {found.apex}, and this is {__version__}", _INSTALL
    if not found.tools:
        return f"has no tools: {found.without}", _TOOLS
    if found.tools != tools.identity:
        return f"has another build of the tools: {found.tools[:12]}, and this one is {tools.identity[:12]}", _TOOLS
    if found.threads > 1:
        return f"would run {found.threads} tasks at a time", _START
    return "", ""


@contextmanager
def connected(address: str, tools: Toolset, report: Report = silent) -> Iterator[Cluster]:
    """A cluster with at least one worker that is fit. `local:N` makes one of N processes here.

    Raises ClusterFailed, WorkersUnfit.
    """
    try:
        import distributed
    except ImportError:
        raise ClusterFailed(MISSING, hint="pip install 'apex-build[cluster]'") from None
    _quieten()
    with _scheduler(address) as where:
        report(Step(f"connecting to {address}", 0))
        try:
            client = distributed.Client(where, timeout=_CONNECT, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise ClusterFailed(
                f"{address}: no Dask scheduler answers: {str(error) or type(error).__name__}",
                hint="start one with: dask scheduler; then apex calibrate with --cluster tcp://HOST:8786",
            ) from None
        cluster = Cluster(client, address, report)
        try:
            with suppress(TimeoutError):
                client.wait_for_workers(1, timeout=_FIRST_WORKER)
            cluster.look(tools)
            cluster.check()
            yield cluster
        finally:
            with suppress(Exception):  # of a scheduler that is gone
                client.close(timeout=_CLOSE)


def _quieten() -> None:
    """Dask logs each lost connection with a traceback. We report losses ourselves, once."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith(("distributed", "tornado", "asyncio"))]
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


@contextmanager
def _scheduler(address: str) -> Iterator[str]:
    local = _LOCAL.fullmatch(address)
    if not local:
        if "://" not in address:
            raise ClusterFailed(
                f"{address}: not the address of a scheduler", hint="--cluster tcp://HOST:8786, or --cluster local:2"
            )
        yield address
        return
    from distributed import LocalCluster

    made = LocalCluster(
        n_workers=max(1, int(local[1])),
        threads_per_worker=1,
        processes=True,
        dashboard_address=None,
        memory_limit=0,  # the tool is a separate process with its own limits
        silence_logs=logging.CRITICAL,
        preload=[remote.__name__],
        host="127.0.0.1",
    )
    try:
        yield made.scheduler_address
    finally:
        with suppress(Exception):
            made.close(timeout=_CLOSE)
