"""The text that a set holds out from calibration, written for `apex evaluate`, which uses it by default."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from apex_build.calibration.sets import CalibrationText
from apex_build.errors import CalibrationSetInvalid
from apex_build.gguf_model.catalogue import Model
from apex_build.storage.digests import sha256_file
from apex_build.storage.manifest import Manifest, manifest_of
from apex_build.storage.outputs import MANIFEST, beside, write_text

FILE = "heldout.json"
_LEAST = 5 << 10  # bytes: evaluators need at least two chunks of 512 tokens


def write_heldout(text: CalibrationText, folder: Path, inputs: Iterable[Path], *, force: bool = False) -> list[Path]:
    """A file for each domain, and `heldout.json`, which says what they are. Returns the texts.

    Raises CalibrationSetInvalid if nothing is held out, OutputUnwritable, DiskTooSmall.
    """
    if not text.heldout:
        raise CalibrationSetInvalid(
            f"{text.name}: no document is held out: each part has one alone", hint="a set with more documents"
        )
    inputs, written, parts = tuple(inputs), [], []
    folder.mkdir(parents=True, exist_ok=True)
    hint = "give another folder with --heldout"
    for one in text.heldout:
        path = folder / f"{file_name(one.domain)}.txt"
        write_text(path, one.data, inputs, force=force, hint=hint)
        written.append(path)
        parts.append(
            {
                "domain": one.domain,
                "file": path.name,
                "sha256": hashlib.sha256(one.data).hexdigest(),
                "bytes": len(one.data),
                "documents": one.documents,
                "tokens": one.tokens,
            }
        )
    about = {
        "calibration_text": {"name": text.name, "sha256": text.sha256},
        "parts": parts,
        "sources": [
            {"domain": one.domain, "source": one.source, "origin": one.origin, "licence": one.licence}
            for one in text.parts
        ],
    }
    data = (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode()
    write_text(folder / FILE, data, inputs, force=force, hint=hint)
    return written


def file_name(domain: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in domain).lstrip(".") or "text"


def heldout_of(model: Model) -> dict[str, Path]:
    """The held-out texts of the imatrix that a file was quantized with, by domain, as its manifest says. The imatrix is
    beside the file or in the working folder. Empty if there are none, or no longer those that were written.
    """
    made = manifest_of(model.path, beside(model.path, MANIFEST))
    name, digest = (made.details.get("imatrix") if made else None), model.metadata.get("apex.imatrix")
    if not isinstance(name, str) or not isinstance(digest, str):
        return {}
    for folder in dict.fromkeys((model.path.absolute().parent, Path.cwd())):
        imatrix = folder / Path(name).name
        found = _manifest(imatrix)
        if found and found.sha256 == digest:
            return heldout_of_imatrix(imatrix)
    return {}


def heldout_of_imatrix(imatrix: Path) -> dict[str, Path]:
    """The texts that were kept apart from a calibration, by domain. Empty as in `heldout_of`."""
    found = _manifest(imatrix)
    return _texts(found.details.get("text", {}).get("heldout")) if found else {}


def _manifest(imatrix: Path) -> Manifest | None:
    return manifest_of(imatrix, beside(imatrix, MANIFEST)) if imatrix.is_file() else None


def _texts(record: Any) -> dict[str, Path]:
    if not isinstance(record, Mapping) or not isinstance(record.get("files"), Mapping):
        return {}
    files = {str(name): Path(str(record.get("folder"))) / f"{name}.txt" for name in record["files"]}
    whole = all(path.is_file() and sha256_file(path) == record["files"][name] for name, path in files.items())
    return {name: path for name, path in files.items() if path.stat().st_size >= _LEAST} if whole else {}
