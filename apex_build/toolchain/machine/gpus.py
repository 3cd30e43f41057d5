"""GPUs: their common names, CUDA architectures, and this machine's."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from apex_build.errors import GpuUnknown, ToolFailed, ToolKilled, ToolTimeout
from apex_build.hookspecs import GpuTarget
from apex_build.native.run import run_tool
from apex_build.near import nearby
from apex_build.plugins import Plugins
from apex_build.printable import printable

# Compute capability, without its dot -> the first CUDA toolkit with a compiler for it (its release notes).
_FIRST_CUDA = {
    **{50: "6.0", 52: "6.5", 53: "7.0", 60: "8.0", 61: "8.0", 62: "8.0", 70: "9.0", 72: "9.2"},
    **{75: "10.0", 80: "11.0", 86: "11.1", 87: "11.4", 88: "13.0", 89: "11.8", 90: "11.8"},
    **{100: "12.8", 101: "12.8", 103: "12.9", 110: "13.0", 120: "12.8", 121: "12.9"},
}
_OLDEST_OF_CUDA_13 = 75
LAST_CUDA_12 = "12.9"  # the newest toolkit that compiles for older ones
_NEWEST = max(_FIRST_CUDA)
_HOPPER = 90  # from here on, an architecture has a variant `a` with extra instructions, which llama.cpp uses
_ARCHITECTURE = re.compile(r"(sm_|compute_)?(\d{2,3})([af]?)(-real|-virtual)?")
_CAPABILITY = re.compile(r"(\d{1,2})\.(\d)")
_QUERY = ("name", "compute_cap", "memory.total", "driver_version")
_ANSWER = re.compile(
    r"(?P<name>\S.*), (?P<capability>\d{1,2}\.\d), (?P<memory>\d+|\[[^]]+\]), (?P<driver>\d+(?:\.\d+)*)"
)
# Words around a GPU's name that are irrelevant to a compiler.
_AROUND = re.compile(
    r"nvidia|geforce|tesla|quadro|laptop|mobile|gpu|max|q|d|super|blackwell|workstation|server|edition|generation|founders|nvl\d*|sxm\d*"
    r"|pcie|hbm\d?e?|ac|\d+gi?b?|nvgpu|developer|kit|superchip"
)
_WSL = "/usr/lib/wsl/lib"  # where Windows puts nvidia-smi, outside of most PATHs


@dataclass(frozen=True)
class FoundGpu:
    """A GPU of this machine. `capability` such as 12.1; `memory_mib` is None if the GPU shares the machine's memory
    (DGX Spark).
    """

    name: str
    capability: str
    memory_mib: int | None
    driver: str

    @property
    def architecture(self) -> str:
        """What to compile for: 12.1 -> 121a-real."""
        return _of_capability(self.capability)


@dataclass(frozen=True)
class Survey:
    """nvidia-smi's answer: `reason` says why `gpus` is empty."""

    gpus: tuple[FoundGpu, ...]
    reason: str = ""


def resolve(names: Sequence[str], plugins: Plugins) -> tuple[GpuTarget, ...]:
    """Targets for these names, in order, without duplicates.

    A name is a GPU's (dgx-spark, `RTX 4090`), a group's (all-common), an architecture (sm_120, 120a, 90a-virtual) or a
    compute capability (8.9); a string may have several, separated by commas or spaces if the names have none
    themselves. Raises GpuUnknown with similar names.
    """
    known = plugins.gpu_targets()
    found: dict[str, GpuTarget] = {}
    for given in names:
        for name in _split(given, known):
            for target in _of_name(name, known):
                found.setdefault(target.name, target)
    if not found:
        raise GpuUnknown("no GPU was named", hint="apex build --list-gpus")
    return tuple(found.values())


def architectures(targets: Iterable[GpuTarget]) -> tuple[str, ...]:
    """Their architectures for CMAKE_CUDA_ARCHITECTURES, oldest first, each once."""
    return tuple(sorted({target.architecture for target in targets}, key=lambda name: (capability_number(name), name)))


def capability_number(architecture: str) -> int:
    """121a-real -> 121. Raises GpuUnknown."""
    found = _ARCHITECTURE.fullmatch(architecture)
    if not found:
        raise GpuUnknown(f"{architecture!r} is not a CUDA architecture: expected something like 121a-real")
    return int(found[2])


def runs_on(architecture: str, capability: str) -> bool:
    """Whether code for this architecture runs on a GPU of this capability (CUDA C++ Programming Guide, binary
    compatibility).

    121a: only on 12.1. 100f: on 10.0 and later of 10.x. 86: likewise; as PTX, which `virtual` is: on everything from
    8.6 on.
    """
    found = _ARCHITECTURE.fullmatch(architecture)
    if not found:
        return False
    code, gpu = int(found[2]), int(capability.replace(".", ""))
    if found[3] == "a":
        return code == gpu
    same = code // 10 == gpu // 10 and code <= gpu
    return same or (found[4] != "-real" and not found[3] and code <= gpu)


def dropped_by(architecture: str) -> str | None:
    """The CUDA version that no longer compiles for this architecture, None if there is none yet."""
    return "13.0" if capability_number(architecture) < _OLDEST_OF_CUDA_13 else None


def survey_gpus() -> Survey:
    """Ask nvidia-smi. Without it, a driver or a GPU, or if its answer is not understood: no GPUs, with the reason."""
    program = shutil.which("nvidia-smi", path=os.pathsep.join((os.environ.get("PATH", os.defpath), _WSL)))
    if program is None:
        return Survey((), "there is no nvidia-smi in PATH, so no NVIDIA driver")
    query = [program, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        said = run_tool(query, timeout=60, env={"LC_ALL": "C"}, check=False)
    except (ToolFailed, ToolKilled, ToolTimeout) as error:
        return Survey((), f"nvidia-smi cannot be used: {error.message.splitlines()[0]}")
    lines = [printable(line).strip() for line in said.lines if line.strip()]
    if said.returncode:
        return Survey(
            (), f"nvidia-smi ended with code {said.returncode}: {lines[0][:200] if lines else 'without output'}"
        )
    gpus = []
    for line in lines:
        answer = _ANSWER.fullmatch(line)
        if not answer:
            return Survey((), f"nvidia-smi's answer is not understood: {line[:200]!r}, expected {', '.join(_QUERY)}")
        memory = int(answer["memory"]) if answer["memory"].isdigit() else None  # [N/A]: it shares the machine's
        gpus.append(FoundGpu(answer["name"], answer["capability"], memory, answer["driver"]))
    return Survey(tuple(gpus), "" if gpus else "nvidia-smi lists no GPU")


def targets_of(gpus: Iterable[FoundGpu], plugins: Plugins) -> tuple[GpuTarget, ...]:
    """The targets to build for these GPUs: one for each architecture."""
    known = plugins.gpu_targets().values()
    found: dict[str, GpuTarget] = {}
    for gpu in gpus:
        fits = [target for target in known if target.architecture == gpu.architecture]
        named = _called(gpu.name, {target.name: target for target in fits})
        best = named or (fits[0] if len(fits) == 1 else _of_architecture(gpu.architecture))
        memory = best.memory_gib if gpu.memory_mib is None else round(gpu.memory_mib / 1024, 1)
        found.setdefault(gpu.architecture, replace(best, description=gpu.name, memory_gib=memory))
    return tuple(found.values())


def _split(given: str, known: dict[str, GpuTarget]) -> list[str]:
    """`RTX 4090` is one name, `h100 rtx4090` two."""
    whole = [part.strip() for part in given.split(",") if part.strip()]
    return [name for part in whole for name in ([part] if _called(part, known) else part.split())]


def _called(given: str, known: dict[str, GpuTarget]) -> GpuTarget | None:
    """The target of this name or alias, or of a name in the words that nvidia-smi puts around it: NVIDIA H100 80GB
    HBM3.
    """
    names = {_plain(alias): target for target in known.values() for alias in target.aliases}
    names |= {_plain(name): target for name, target in known.items()}
    for prefix in ("", "rtx", "gtx"):
        if target := names.get(prefix + _plain(given)):
            return target
    words = re.findall(r"[a-z0-9]+", given.lower())
    spans = ((start, end) for start in range(len(words)) for end in range(start + 1, len(words) + 1))
    for start, end in sorted(spans, key=lambda span: span[0] - span[1]):
        rest = [*words[:start], *words[end:]]
        if (target := names.get("".join(words[start:end]))) and all(map(_AROUND.fullmatch, rest)):
            return target
    return None


def _of_name(given: str, known: dict[str, GpuTarget]) -> tuple[GpuTarget, ...]:
    if target := _called(given, known):
        return (target,)
    if group := tuple(target for target in known.values() if given.lower() in target.groups):
        return group
    if _CAPABILITY.fullmatch(given):
        return (_of_architecture(_of_capability(given), given),)
    if _ARCHITECTURE.fullmatch(given.lower()):
        return (_of_architecture(given.lower(), given),)
    groups = {group for target in known.values() for group in target.groups}
    raise GpuUnknown(
        f"there is no GPU '{printable(given)}'{nearby(given, (*known, *groups))}",
        hint="apex build --list-gpus, which lists the names; or a CUDA architecture such as sm_120",
    )


def _of_capability(capability: str) -> str:
    number = int(capability.replace(".", ""))
    return f"{number}{'a' if number >= _HOPPER else ''}-real"


def _of_architecture(text: str, given: str = "") -> GpuTarget:
    """A target for an architecture without a name; real unless it says virtual."""
    parts = _ARCHITECTURE.fullmatch(text)
    assert parts
    prefix, number, variant, kind = parts.groups()
    if int(number) not in _FIRST_CUDA and int(number) < _NEWEST:  # a newer one may exist: its compiler knows
        near = sorted(_FIRST_CUDA, key=lambda known: abs(known - int(number)))[:3]
        raise GpuUnknown(
            f"no CUDA architecture '{printable(given or text)}'; near it: {', '.join(f'sm_{n}' for n in near)}",
            hint="apex build --list-gpus",
        )
    if variant == "a" and int(number) < _HOPPER:
        raise GpuUnknown(
            f"'{printable(given or text)}': only sm_{_HOPPER} and newer have a variant 'a'", hint=f"sm_{number}"
        )
    if variant == "f" and int(number) < 100:
        raise GpuUnknown(f"'{printable(given or text)}': only sm_100 and newer have a variant 'f'", hint=f"sm_{number}")
    if not variant and number.startswith("12") and len(number) == 3:
        variant = "a"  # llama.cpp's CMakeLists.txt does the same: what it uses of 12x is in the variant alone
    kind = kind or ("-virtual" if prefix == "compute_" else "-real")
    first = _FIRST_CUDA.get(int(number), "")
    if first and variant:
        first = max(first, {"a": "12.0", "f": "12.9"}[variant], key=_version)
    name = f"{'compute' if kind == '-virtual' else 'sm'}_{number}{variant}"
    return GpuTarget(name, f"{number}{variant}{kind}", 0, f"CUDA architecture {number}{variant}", first)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
