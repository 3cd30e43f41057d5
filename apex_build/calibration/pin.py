"""Pin a calibration set to the current revisions of its data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from apex_build.calibration.set_file import CalibrationSet, check_part
from apex_build.errors import CalibrationSetInvalid
from apex_build.hookspecs import Source

_PART = re.compile(r"^[ \t]*\[\[[ \t]*part[ \t]*\]\][^\n]*\n", re.MULTILINE)


def pinned(chosen: CalibrationSet, sources: Mapping[str, Source], out: Path) -> tuple[str, list[tuple[str, str]]]:
    """The text of the set's file with the keys that its sources add to each part, otherwise unchanged; and those keys.

    Raises CalibrationSetInvalid if it would name other files from `out`'s folder, and what the sources raise.
    """
    text = chosen.path.read_text(encoding="utf-8")
    heads = list(_PART.finditer(text))
    if len(heads) != len(chosen.parts):
        raise CalibrationSetInvalid(f"{chosen.path}: its parts are not written as [[part]], so none can be added to")
    folder = chosen.path.absolute().parent
    beside = out.absolute().parent == folder
    pieces, added = [text[: heads[0].start()]], []
    for number, (head, part) in enumerate(zip(heads, chosen.parts, strict=True)):
        end = heads[number + 1].start() if number + 1 < len(heads) else len(text)
        block = text[head.end() : end]
        source = check_part(chosen, part, sources)
        found = source.pin(part.options, folder) if source.pin else {}
        if not found and not beside and any(_names_file(folder, value) for value in part.options.values()):
            raise CalibrationSetInvalid(
                f"{chosen.path}: part {number + 1} names files beside the set: {out} would not find them",
                hint=f"write it beside the set: {folder}",
            )
        for key, value in found.items():
            block = re.sub(rf"^[ \t]*{key}[ \t]*=[^\n]*\n", "", block, flags=re.MULTILINE)
            block = f'{key} = "{value}"\n{block}'
            added.append((f"{part.domain}, {part.options.get('dataset', part.source)}", value))
        pieces.append(head[0] + block)
    if not added:
        raise CalibrationSetInvalid(f"{chosen.path}: nothing to pin: its data comes from files")
    return "".join(pieces), added


def _names_file(folder: Path, value: object) -> bool:
    return isinstance(value, str) and "\0" not in value and not Path(value).is_absolute() and (folder / value).exists()
