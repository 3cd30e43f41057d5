"""The converter's Python: one named by the user, ours if it has all packages, else an environment made in the cache."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from unearth import PackageFinder

from apex_build import places
from apex_build.errors import EnvironmentUnusable, ToolFailed, ToolKilled, ToolTimeout
from apex_build.fetching.pip_config import open_session, read_pip_config
from apex_build.native.run import run_tool
from apex_build.progress import Report, Step
from apex_build.storage.artifacts import Artifact, making_folder
from apex_build.storage.digests import sha256_json
from apex_build.storage.disk import check_room
from apex_build.storage.manifest import ENVIRONMENT, Parts

VARIABLE = "APEX_CONVERT_PYTHON"
_COMPLETE = "apex-complete.json"
_SIZE, _SIZE_WITH_CUDA = 1_500_000_000, 7_000_000_000  # approximate bytes of an environment
_INDISPENSABLE = ("torch", "transformers", "numpy")  # the rest is for some kinds of tokenizer only
_ASK = """
import importlib.metadata as metadata, json
names = {}
for found in metadata.distributions():
    name = found.metadata["Name"]
    if name:
        names.setdefault(name.lower().replace("_", "-").replace(".", "-"), found.version)
print(json.dumps(names))
"""


@dataclass(frozen=True)
class Python:
    """An interpreter that can run the converter. `made`: it is (or will be) our own environment."""

    executable: Path
    origin: str  # for messages: where it comes from
    made: bool = False


def requirements() -> tuple[Requirement, ...]:
    """This package's extra `convert`, and gguf for what the vendored gguf-py imports. Raises EnvironmentUnusable."""
    try:
        declared = [Requirement(text) for text in importlib.metadata.requires("apex-build") or []]
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentUnusable(
            "apex-build is not installed, so its extra `convert` is not known", hint="pip install -e ."
        ) from None
    wanted = [
        item
        for item in declared
        if item.marker and item.marker.evaluate({"extra": "convert"}) and not item.marker.evaluate()
    ]
    wanted += [item for item in declared if item.name == "gguf"]
    for item in wanted:
        item.marker = None
    return tuple(sorted(wanted, key=str))


def choose(python: Path | None) -> Python:
    """`python`, else what APEX_CONVERT_PYTHON names, else ours if it has the whole extra, else one in the cache (made
    or not).

    Raises EnvironmentUnusable if the named one lacks what the converter needs.
    """
    named = python or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    given = (
        named.expanduser().absolute() if named else None
    )  # not resolved: an environment's python is a link to another
    wanted = requirements()
    if given is not None:
        lacking = [str(item) for item in _lacking(given, wanted) if item.name in _INDISPENSABLE]
        if lacking:
            raise EnvironmentUnusable(
                f"{given} lacks what the converter needs: {', '.join(lacking)}",
                hint=f"{given} -m pip install {shlex.join(lacking)}",
            )
        return Python(given, "--python" if python else VARIABLE)
    if not _lacking(Path(sys.executable), wanted):
        return Python(Path(sys.executable), "the Python that runs apex")
    return Python(_folder(wanted) / "bin" / "python", "its own environment", made=True)


@dataclass(frozen=True)
class EnvironmentRecord:
    """What its manifest says beyond the head."""

    requirements: tuple[str, ...]
    seconds: float


def is_ready(python: Python) -> bool:
    """Whether the interpreter exists: our own environment may not have been made yet."""
    return not python.made or (python.executable.parent.parent / _COMPLETE).is_file()


def ensure(python: Python, log: Path, report: Report) -> Path:
    """Make the environment if there is none yet. Returns its interpreter. Raises EnvironmentUnusable."""
    folder = python.executable.parent.parent
    if is_ready(python):
        return python.executable
    wanted, began = requirements(), time.monotonic()
    artifact = Artifact(folder, ENVIRONMENT, _parts(wanted), folder / _COMPLETE)
    # made in place: an environment's scripts contain its folder
    with making_folder(artifact, intact=lambda _: is_ready(python), movable=False, report=report) as draft:
        if not draft.found:
            arguments = _make(folder, wanted, log, report)
            draft.done(EnvironmentRecord(tuple(arguments), round(time.monotonic() - began, 1)))
    return python.executable


@functools.lru_cache(maxsize=8)
def versions(python: Path) -> Mapping[str, str]:
    """Installed distributions of an interpreter, by canonical name. Raises EnvironmentUnusable."""
    try:
        said = run_tool([python, "-c", _ASK], timeout=120)
        return dict(json.loads(said.lines[-1]))
    except (ToolFailed, ToolKilled, ToolTimeout) as error:
        raise EnvironmentUnusable(f"{python} cannot list its installed packages: {error.message}") from None
    except (ValueError, IndexError):
        raise EnvironmentUnusable(f"{python} is not a Python interpreter") from None


def _lacking(python: Path, wanted: Sequence[Requirement]) -> list[Requirement]:
    have = versions(python)
    return [
        item
        for item in wanted
        if not item.specifier.contains(have.get(canonicalize_name(item.name), "0"), prereleases=True)
    ]


def _folder(wanted: Sequence[Requirement]) -> Path:
    return places.cache_root() / "envs" / f"convert-{sha256_json(_parts(wanted))[:16]}"


def _parts(wanted: Sequence[Requirement]) -> Parts:
    return {
        "python": sys.version,
        "executable": str(Path(sys.executable).resolve()),
        "requirements": [str(item) for item in wanted],
    }


def _make(folder: Path, wanted: Sequence[Requirement], log: Path, report: Report) -> list[str]:
    """Returns the requirements that pip got."""
    task = "preparing the converter's environment (once)"
    report(Step(task, 0))
    arguments = [str(item) if item.name != "torch" else _torch(item, report) for item in wanted]
    python = folder / "bin" / "python"
    if torch := next((argument for argument in arguments if argument.startswith("torch")), ""):
        size = _SIZE if "+cpu" in torch else _SIZE_WITH_CUDA
        check_room(
            folder.parent, size, "the converter's Python", spare=0, hint="APEX_CACHE_DIR=FOLDER names another cache"
        )
    count = 0

    def progress(line: str) -> None:
        nonlocal count
        if re.match(r"\s*(Collecting|Downloading|Processing|Installing) ", line):
            count += 1
            report(Step(task, count, None, "steps of pip"))

    # with its own variables pip might install elsewhere than into the environment
    aside = dict.fromkeys(("PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_ROOT", "PYTHONPATH", "PYTHONHOME"))
    try:
        run_tool([sys.executable, "-m", "venv", folder], log=log, env=aside)
        run_tool([python, "-m", "pip", "install", "--no-input", *arguments], log=log, on_line=progress, env=aside)
    except (ToolFailed, ToolKilled) as error:
        hint = "apt-get install python3-venv, or" if "ensurepip" in error.message else ""
        raise EnvironmentUnusable(
            f"the converter's environment could not be made: {error.message}",
            hint=f"{hint} name a Python with torch and transformers: apex convert --python PATH".strip(),
        ) from None
    return arguments


def _torch(wanted: Requirement, report: Report) -> str:
    """The newest CPU-only torch (version +cpu) where pip is configured to look; else pip's choice.

    Only the converter uses it, to read tensors: the usual one comes with gigabytes of CUDA libraries.
    """
    config = read_pip_config()
    newest: Version | None = None
    index_urls = () if config.no_index else ((config.index_url,) if config.index_url else ()) + config.extra_index_urls
    if not index_urls and not config.find_links:
        return str(wanted)  # only the default index, which has no versions such as +cpu
    with open_session(config) as session:
        finder = PackageFinder(session, index_urls=index_urls, find_links=config.find_links)
        for found in finder.find_matches(str(wanted)):
            try:
                version = Version(found.version or "")
            except InvalidVersion:
                continue
            if version.local == "cpu" and (newest is None or version > newest):
                newest = version
    if newest is None:
        report(Step("no CPU-only torch where pip looks: the usual one, perhaps gigabytes with CUDA libraries", 0))
        return str(wanted)
    return f"torch=={newest}"
