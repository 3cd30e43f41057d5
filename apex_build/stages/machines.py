"""The machine that a plan is made for: this one, one with a named GPU, or given sizes of memory and disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from apex_build.native.memory import SHARE, machine_memory
from apex_build.plugins import Plugins
from apex_build.storage.disk import existing
from apex_build.toolchain.machine.gpus import resolve, survey_gpus, targets_of

_GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """`gpu`: bytes of its memory, 0 without one; `shared`: GPU and CPU share memory (DGX Spark). `here`: the disk is

    the model folder's, so the model takes no additional space.
    """

    name: str
    memory: int
    disk: int
    gpu: int = 0
    shared: bool = False
    here: bool = False

    @property
    def usable(self) -> int:
        """Usable memory: the rest of the system needs some."""
        return int(SHARE * self.memory)


def machine(
    plugins: Plugins, folder: Path, *, gpu: str | None = None, memory: int | None = None, disk: int | None = None
) -> Machine:
    """A machine with this GPU, memory and disk; defaults are this machine's, and the free space at `folder`. Raises

    GpuUnknown.
    """
    here = disk is None
    disk = shutil.disk_usage(existing(folder)).free if disk is None else disk
    if gpu is not None:
        target = resolve([gpu], plugins)[0]
        size = int(target.memory_gib * _GIB)
        if target.shares_memory:
            return Machine(target.name, memory or size, disk, memory or size, shared=True, here=here)
        return Machine(target.name, memory or machine_memory(), disk, size, here=here)
    if memory is not None:
        return Machine("a machine", memory, disk, here=here)
    found = survey_gpus().gpus
    if not found:
        return Machine("this machine", machine_memory(), disk, here=here)
    shared = any(one.memory_mib is None for one in found)
    largest = machine_memory() if shared else int(max(one.memory_gib for one in targets_of(found, plugins)) * _GIB)
    return Machine("this machine", machine_memory(), disk, largest, shared, here)
