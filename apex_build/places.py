"""Where things are: the data that travels with the package, and the user's folders.

Environment: APEX_CACHE_DIR moves the cache (downloads, builds, environments), APEX_SOURCE_DIR the fetched llama.cpp
trees; APEX_PIN names the llama.cpp that is worked with.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs

from apex_build.errors import OutputUnwritable

_ELSEWHERE = "APEX_CACHE_DIR=FOLDER names another cache"
_PACKAGE = Path(__file__).resolve().parent


def data_root() -> Path:
    """Folder with `vendor/`, `patches/`, `plugins/` and `calibration_sets/`: a checkout, or the package's data."""
    packaged = _PACKAGE / "data"
    return packaged if packaged.is_dir() else _PACKAGE.parent


def in_checkout() -> bool:
    return data_root() == _PACKAGE.parent


DEFAULT_PIN = "pr-22673"
NEWEST_PIN = "latest"
PIN_VARIABLE = "APEX_PIN"


def chosen_pin() -> str:
    """The pin that APEX_PIN, or apex.toml through it, chose: its name, or a TOML file of the user's; else the default
    one.
    """
    return os.environ.get(PIN_VARIABLE) or DEFAULT_PIN


def chosen_pin_name() -> str:
    """The name of the chosen pin, as builds and their pointers have it."""
    chosen = chosen_pin()
    if not chosen.endswith(".toml"):
        return chosen
    with suppress(OSError, ValueError):
        if named := re.search(r'(?m)^name\s*=\s*"([^"]*)"', Path(chosen).read_text(encoding="utf-8")):
            return named[1]
    return chosen


def newer_build() -> str:
    """What to do where the tools in use know too little: for a hint."""
    if chosen_pin_name() == NEWEST_PIN:
        return _NEWER_STILL.format(command="apex build")
    return f"apex build --pin {NEWEST_PIN}, then run the same command with {PIN_VARIABLE}={NEWEST_PIN}"


def newer_converter(used: str) -> str:
    """The same for the converter of the pin `used`."""
    return _NEWER_STILL.format(command="apex convert") if used == NEWEST_PIN else f"apex convert --pin {NEWEST_PIN}"


_NEWER_STILL = "apex pin add next --pypi VERSION, of a newer llama.cpp, then {command} --pin next"

# A checkout has a Makefile, an installed package has none.
BUILD_HINT = "make build, or: apex build" if in_checkout() else "apex build"


def cache_root() -> Path:
    """The user's cache: everything in it can be deleted and recreated."""
    given = os.environ.get("APEX_CACHE_DIR")
    return Path(given).absolute() if given else platformdirs.user_cache_path("apex-build")  # tools run in other folders


def cache_folder(*names: str) -> Path:
    """A folder of the cache, made if it is missing. Raises OutputUnwritable."""
    folder = cache_root().joinpath(*names)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputUnwritable(f"{folder}: the cache cannot be written: {error.strerror}", hint=_ELSEWHERE) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputUnwritable(f"{folder}: the cache cannot be written", hint=_ELSEWHERE)
    return folder


def source_root() -> Path:
    """Folder of the fetched llama.cpp trees, one folder a pin: beside the pins in a checkout, else in the user's data
    folder.
    """
    if given := os.environ.get("APEX_SOURCE_DIR"):
        return Path(given).absolute()
    return data_root() / "vendor" if in_checkout() else platformdirs.user_data_path("apex-build") / "vendor"


def patches_root() -> Path:
    return data_root() / "patches" / "llama.cpp"


def model_stem(path: Path) -> str:
    """The stem for names of files made from a model: its name, without a shard's number."""
    return re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)


def unfinished() -> Path:
    """Folder with a note for each unfinished calibration, whose snapshots are beside its output."""
    return cache_root() / "calibrations"


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keep `apex cache prune` from removing a folder of the cache while it is used."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


@contextmanager
def unused(folder: Path) -> Iterator[None]:
    """Hold a folder of the cache that nobody has `in_use`, to remove it. Raises BlockingIOError if somebody has."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
