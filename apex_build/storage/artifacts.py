"""How every file and folder is made, written once for all kinds:

    parts -> identity -> lock -> is it there already? -> part file -> verified by its maker -> manifest -> rename

`making` does this for a file and `making_folder` for a folder. The maker works inside the `with` block: it looks at
`found`, writes to `part`, verifies what it wrote, and calls `done`. If a run ends before `done` has returned, for
whatever reason, the previous output and its manifest are still there, even after a kill between two system calls.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from apex_build.progress import Report, silent
from apex_build.storage.digests import sha256_file, sha256_json
from apex_build.storage.disk import check_room, refusal, sync, writing
from apex_build.storage.folders import new_folder, put_in_place, remove_left_over
from apex_build.storage.json_files import write_json
from apex_build.storage.locks import locked
from apex_build.storage.manifest import REPLACES, Manifest, Parts, details_of, manifest_of, raw_json, read_manifest
from apex_build.storage.outputs import (
    LOG,
    MANIFEST,
    beside,
    check_apart,
    check_place,
    is_log,
    new_part,
    put,
    refuse,
    remove_parts,
    with_manifest_and_log,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# What may be replaced: nothing, earlier outputs of the same kind, anything.
Replace = Literal["nothing", "own", "anything"]


@dataclass(frozen=True)
class Artifact:
    """A file or folder to make at `out`, of one of the kinds of manifest.py, from `parts`."""

    out: Path
    kind: str
    parts: Parts = field(hash=False)
    manifest_at: Path | None = None  # where the manifest is, if not beside the file or in the folder

    @cached_property
    def identity(self) -> str:
        return sha256_json(self.parts)

    @property
    def manifest_path(self) -> Path:
        return self.manifest_at or beside(self.out, MANIFEST)

    def found(self) -> Manifest | None:
        """The manifest of an existing `out`, if it was made from the same parts; does not check its content."""
        found = manifest_of(self.out, self.manifest_path) if self.out.is_file() else read_manifest(self.manifest_path)
        same = found is not None and found.usable and found.kind == self.kind and found.identity == self.identity
        return found if same else None


@dataclass
class Draft:
    """An artifact that is being made. `found`: it already exists, made from the same parts: nothing to do."""

    artifact: Artifact
    part: Path
    found: Manifest | None = None
    made: Manifest | None = None
    put: Callable[[Path, Artifact, Manifest], None] = field(default=lambda *_: None, repr=False)

    def done(self, details: DataclassInstance) -> Manifest:
        """Put the part, already verified, in its place, with its manifest. `details`: the manifest's content beyond
        its head.
        """
        artifact, is_file = self.artifact, self.part.is_file()
        sha256, n_bytes = (sha256_file(self.part), self.part.stat().st_size) if is_file else ("", None)
        made = Manifest(artifact.kind, artifact.identity, artifact.parts, sha256, n_bytes, details_of(details))
        return self._put(made)

    def adopted(self, manifest: Manifest) -> Manifest:
        """Like `done`, for a folder made elsewhere: keeps the details in its manifest."""
        artifact = self.artifact
        details = manifest.details
        return self._put(
            Manifest(artifact.kind, artifact.identity, artifact.parts, details=details, apex=manifest.apex)
        )

    def _put(self, made: Manifest) -> Manifest:
        self.put(self.part, self.artifact, made)
        self.made = made
        return made


@contextmanager
def making(
    artifact: Artifact,
    *,
    inputs: Iterable[Path] = (),
    reuse: bool = True,
    replace: Replace = "nothing",
    intact: Callable[[Manifest], bool] | None = None,
    n_bytes: int | None = None,
    wait: str = "",
    report: Report = silent,
) -> Iterator[Draft]:
    """Make the file `artifact.out`, unless it exists, made from the same parts (`reuse`) and `intact` (by default:
    by size and sha256).

    `inputs` are never replaced, other files as `replace` says; `n_bytes` will be written. If another run is making
    it, this one waits with `wait` (a name for what it waits for), otherwise it is refused. Raises OutputUnwritable,
    DiskTooSmall.
    """
    out = artifact.out
    check_place(out)
    check_apart(with_manifest_and_log(out), inputs)
    with locked(out, wait=bool(wait), what=wait, report=report):
        for path in (out, artifact.manifest_path):
            remove_parts(path)
        _settle(artifact)
        if reuse and (found := artifact.found()) and (intact or (lambda one: one.describes(out)))(found):
            yield Draft(artifact, out, found)
            return
        check_free(artifact, replace)
        if n_bytes is not None:
            check_room(out.parent, n_bytes, out.name)
        with new_part(out) as part:
            draft = Draft(artifact, part, put=_put_file)
            try:
                yield draft
            except OSError as error:
                raise refusal(error, out, own=(None, str(part), str(out))) from None
            assert draft.made, f"{out} was not finished"


@contextmanager
def making_folder(
    artifact: Artifact,
    *,
    reuse: bool = True,
    intact: Callable[[Manifest | None], bool],
    movable: bool = True,
    report: Report = silent,
) -> Iterator[Draft]:
    """Make the folder `artifact.out` in the cache, unless it exists and is `intact`. Waits for another run that is
    making it.

    One that is not `movable` is made in place: until its manifest is written, it counts as missing.
    """
    out = artifact.out
    with locked(out, wait=True, report=report):
        remove_left_over(out)
        found = read_manifest(artifact.manifest_path)
        if reuse and intact(found):
            yield Draft(artifact, out, found or Manifest(artifact.kind, artifact.identity, artifact.parts))
        elif movable:
            with new_folder(out) as part:
                draft = Draft(artifact, part, put=_put_folder)
                yield draft
                assert draft.made, f"{out} was not finished"
        else:
            artifact.manifest_path.unlink(missing_ok=True)
            shutil.rmtree(out, ignore_errors=True)
            draft = Draft(artifact, out, put=_finish_folder)
            try:
                with writing(out):
                    yield draft
            finally:
                if not draft.made:
                    shutil.rmtree(out, ignore_errors=True)


def check_free(artifact: Artifact, replace: Replace = "nothing") -> None:
    """Raises OutputUnwritable if an existing file at the artifact's path, or beside it, may not be replaced."""
    if replace == "anything":
        return
    out, at = artifact.out, artifact.manifest_path
    found = manifest_of(out, at)
    ours = found is not None and found.kind == artifact.kind
    if out.exists():
        if not ours or found is None or found.n_bytes != out.stat().st_size:
            refuse(out, "exists, and is not an output of this command")
        if replace == "nothing":
            refuse(out, "exists and was made from something else")
    if at.exists() and not ours:
        refuse(at, f"exists, and is not the manifest of an earlier {out.name}")
    log = beside(out, LOG)
    if log.exists() and not is_log(log):
        refuse(log, f"exists, and is not the log of an earlier {out.name}")


def _put_file(part: Path, artifact: Artifact, made: Manifest) -> None:
    """Write the manifest first, with the previous one inside while the previous file may still be there: the rename
    decides which is valid.
    """
    out, at = artifact.out, artifact.manifest_path
    value = made.json()
    if out.exists():
        before = manifest_of(out, at)
        write_json(at, {**value, REPLACES: before.json() if before else None})
        put(part, out)
    else:
        write_json(at, value)
        put(part, out)
        return
    write_json(at, value)


def _settle(artifact: Artifact) -> None:
    """After an interrupted replacement, reduce the manifest to the valid one."""
    at = artifact.manifest_path
    if REPLACES in raw_json(at):
        found = manifest_of(artifact.out, at)
        if found:
            write_json(at, found.json())
        else:
            at.unlink()


def _put_folder(part: Path, artifact: Artifact, made: Manifest) -> None:
    write_json(part / artifact.manifest_path.relative_to(artifact.out), made.json())
    put_in_place(part, artifact.out)


def _finish_folder(_part: Path, artifact: Artifact, made: Manifest) -> None:
    sync(artifact.out)
    write_json(artifact.manifest_path, made.json())
