"""Find the manifest that a path stands for: the manifest itself, an output, or a folder of the cache."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from apex_build.errors import ManifestMissing
from apex_build.near import near_folder
from apex_build.storage.manifest import Manifest, manifest_of, read_manifest
from apex_build.storage.outputs import MANIFEST, beside

# Names of manifests in folders: of builds, CUDA toolkits, environments, and files kept for evaluations.
_IN_FOLDERS = ("manifest.json", "apex-toolkit.json", "apex-complete.json", "made-from.json")
_OF_SWEEP = ("sweep.json", "sweep.jsonl")


@dataclass(frozen=True)
class Located:
    """A manifest at `at`, of `artifact`, which may be gone (then `present` is False)."""

    at: Path
    artifact: Path
    manifest: Manifest
    present: bool

    def is_whole(self) -> bool | None:
        """Whether the file matches the manifest: reads every byte. None for a folder."""
        return self.manifest.describes(self.artifact) if self.manifest.sha256 else None


def locate(path: Path) -> Located:
    """Raises ManifestMissing if there is none."""
    if path.is_dir():
        candidates = [*((path / name, path) for name in _IN_FOLDERS), (path / _OF_SWEEP[0], path / _OF_SWEEP[1])]
    elif path.name in _OF_SWEEP:
        candidates = [(path.with_name(_OF_SWEEP[0]), path.with_name(_OF_SWEEP[1]))]
    elif path.suffix == MANIFEST and read_manifest(path):
        folder = path.name in _IN_FOLDERS[:3]
        candidates = [
            (path, path.parent if folder else _kept(path) if path.name == _IN_FOLDERS[3] else path.with_suffix(""))
        ]
    else:
        candidates = [(beside(path, MANIFEST), path), (path.with_name(_IN_FOLDERS[3]), path)]
    for at, artifact in candidates:
        found = manifest_of(artifact, at) if artifact.is_file() else read_manifest(at)
        if found is not None:
            return Located(at, artifact, found, artifact.exists())
    what = "there is no such file" if not path.exists() else "it is not an apex manifest, and has none"
    expected = "" if path.is_dir() else f": expected {candidates[0][0].name} beside it"
    hint = f"apex inspect {shlex.quote(str(path))}, shows what a model or imatrix contains" if path.is_file() else None
    raise ManifestMissing(f"{path}: {what}{expected if path.exists() else near_folder(path.parent)}", hint=hint)


def _kept(at: Path) -> Path:
    """The file that is kept beside its manifest."""
    others = [path for path in at.parent.iterdir() if path != at and path.is_file() and not path.name.startswith(".")]
    return others[0] if others else at.parent
