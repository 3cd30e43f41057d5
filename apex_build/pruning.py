"""What the cache holds, by kind and last use, and what may be removed: never anything that is in use or exists nowhere
else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from apex_build.errors import ApexError
from apex_build.places import cache_root, unfinished, unused
from apex_build.source.applied import unsaved_work
from apex_build.source.pins import all_pins
from apex_build.source.series import read_series
from apex_build.source.tree import tree_path
from apex_build.storage import outputs
from apex_build.storage.locks import Busy, locked
from apex_build.storage.sizes import folder_size

# kind -> (folder of the cache, what it is). Each folder in it is an item.
_FOLDERS = {
    "builds": ("builds", "builds of the tools"),
    "work": ("work", "CMake's folders: with one a rebuild takes seconds"),
    "toolkits": ("toolchains", "CUDA toolkits from the package index"),
    "environments": ("envs", "Pythons of the converter"),
    "evaluations": ("evaluation", "log-probabilities of references, scores of draft heads"),
    "downloads": ("downloads", "files from the package index"),
    "cluster-models": ("cluster/models", "models and imatrices that clients sent to this machine's workers"),
    "cluster-sweeps": ("cluster/sweeps", "trunks and baselines of sweeps that this machine's workers take part in"),
}
KINDS = {
    "sources": "trees of llama.cpp",
    **{kind: said for kind, (_, said) in _FOLDERS.items()},
    "compiler-cache": "sccache's",
    "calibrations": "periodic copies of unfinished runs, beside their outputs, and of unfinished shards of workers",
}
_ARRIVING = 600.0  # seconds without change after which a partial download counts as abandoned


@dataclass(frozen=True)
class Item:
    """One thing that can be removed as a whole. `used`: when it was last read or written, as far as the file system
    shows; `kept`: why it is never removed.
    """

    kind: str
    path: Path
    n_bytes: int
    used: float
    kept: str = ""


def items(kinds: Collection[str] = ()) -> list[Item]:
    """All of these kinds (or of all), longest unused first. A shared file counts once."""
    busy, seen = _busy_paths(), set[tuple[int, int]]()
    found = []
    for kind, path in _paths():
        if kinds and kind not in kinds:
            continue
        size = folder_size(path, seen)
        kept = _kept(kind, path) or ("in use by a running program" if _inside(path, busy) else "")
        found.append(Item(kind, path, size, _last_used(path), kept))
    return sorted(found, key=lambda item: item.used)


def choose(
    found: Sequence[Item],
    *,
    older_than: float | None = None,
    larger_than: int | None = None,
    keep_size: int | None = None,
) -> list[Item]:
    """Those to be removed. `older_than`: unused for this many days; `larger_than`: bytes; `keep_size`: the longest
    unused are removed until at most this many bytes are left.
    """
    now = time.time()
    wanted = [
        item
        for item in found
        if (older_than is None or now - item.used > older_than * 86400)
        and (larger_than is None or item.n_bytes > larger_than)
        and not item.kept
    ]
    if keep_size is None:
        return wanted
    total, chosen = sum(item.n_bytes for item in found), []
    for item in wanted:
        if total <= keep_size:
            break
        chosen.append(item)
        total -= item.n_bytes
    return chosen


def remove(item: Item) -> Item:
    """Remove it, unless it is now in use or holds unsaved work: then it is returned, with the reason in `kept`."""
    try:
        with _alone(item):
            if why := _kept(item.kind, item.path) or (_unsaved(item.path) if item.kind == "sources" else ""):
                return replace(item, kept=why)
            _delete(item)
    except (BlockingIOError, Busy):
        return replace(item, kept="in use by another run of apex")
    except ApexError as error:
        return replace(item, kept=error.message)
    except OSError as error:
        return replace(item, kept=f"cannot be removed: {error.strerror}")
    return item


def _paths() -> Iterator[tuple[str, Path]]:
    root = cache_root()
    for pin in all_pins():
        if (tree := tree_path(pin)).is_dir():
            yield "sources", tree
    for kind, (name, _) in _FOLDERS.items():
        for path in sorted(root.joinpath(name).glob("*")):
            if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
                yield kind, path
    if (root / "sccache").is_dir():
        yield "compiler-cache", root / "sccache"
    for _, out in _unfinished():
        yield "calibrations", outputs.work_folder(out)


def _unfinished() -> Iterator[tuple[Path, Path]]:
    """Notes of unfinished calibrations, and their outputs."""
    for note in sorted(unfinished().glob("*.json")):
        with suppress(OSError, ValueError, TypeError):
            out = Path(json.loads(note.read_text(encoding="utf-8")))
            if (outputs.work_folder(out) / "identity.json").is_file():
                yield note, out


def _kept(kind: str, path: Path) -> str:
    if kind == "builds":
        for pointer in path.parent.glob("current-*.json"):
            with suppress(OSError, ValueError, AttributeError):
                if json.loads(pointer.read_text(encoding="utf-8")).get("key") == path.name:
                    return "the build in use"
    if kind == "downloads" and any(time.time() - part.stat().st_mtime < _ARRIVING for part in path.glob("*.part")):
        return "being downloaded"
    return ""


def _unsaved(path: Path) -> str:
    pin = next(pin for pin in all_pins() if tree_path(pin) == path)
    work = unsaved_work(path, read_series(pin))
    return f"holds unsaved work: {work[0]}" if work else ""


def _last_used(path: Path) -> float:
    """Of the folder and its direct contents; reads count if the file system records them."""
    times = [path.lstat().st_mtime]
    for one in path.iterdir():
        with suppress(OSError):
            about = one.lstat()
            times.append(max(about.st_mtime, about.st_atime if one.is_file() else 0))
    return max(times)


def _busy_paths() -> set[str]:
    """Running programs, and the paths on their command lines."""
    found: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found.add(str((process / "exe").readlink()))
        with suppress(OSError):
            for word in (process / "cmdline").read_bytes().split(b"\0"):
                found.add(os.fsdecode(word.rpartition(b"=")[2] if word.startswith(b"-") else word))
    return found


def _inside(path: Path, busy: Collection[str]) -> bool:
    names = {f"{path}", f"{path.resolve()}"}
    return any(word in names or word.startswith(tuple(f"{name}/" for name in names)) for word in busy)


@contextmanager
def _alone(item: Item) -> Iterator[None]:
    """Hold the lock of its makers and users. Raises BlockingIOError, Busy if another run has it."""
    if item.kind == "calibrations":
        with outputs.locked_output(_output_of(item.path)):
            yield
    elif item.kind in ("evaluations", "compiler-cache", "downloads", "cluster-sweeps"):
        itself = item.kind in ("compiler-cache", "cluster-sweeps")
        with unused(item.path if itself else item.path.parent):
            yield
    else:
        with locked(item.path):
            yield


def _output_of(work: Path) -> Path:
    return work.with_name(re.sub(r"^\.(.*)\.work$", r"\1", work.name))


def _delete(item: Item) -> None:
    """Rename it first: a half-deleted item is never taken for a whole one, and the next run removes what a killed
    one leaves.
    """
    aside = item.path.with_name(f".{item.path.name.removeprefix('.')}.part")
    shutil.rmtree(aside, ignore_errors=True)
    item.path.rename(aside)
    shutil.rmtree(aside)
    if item.kind == "calibrations":
        for note, out in [(note, json.loads(note.read_text())) for note in unfinished().glob("*.json")]:
            if Path(out) == _output_of(item.path):
                note.unlink(missing_ok=True)
