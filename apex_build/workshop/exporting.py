"""Export a series for upstream: mailable patches, and for each the draft of a pull request's description."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apex_build.errors import PatchConflict, SeriesUnfit
from apex_build.progress import Report, silent
from apex_build.source.fetch import further_files
from apex_build.source.patch import Patch
from apex_build.source.pins import Pin
from apex_build.source.series import read_series, verb
from apex_build.source.tree import require_tree
from apex_build.storage.disk import writing
from apex_build.storage.outputs import check_text_free, whole_file
from apex_build.workshop import style
from apex_build.workshop.overview import Known, overview
from apex_build.workshop.standing import Standing

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FACTS = Path(__file__).with_name("pull_requests.toml")
GUIDE = "CONTRIBUTING.md"
_RULES = {  # rules to quote from upstream's guide: topic -> pattern of a line about it
    "how a request is cut and how large it may be": re.compile(
        r"separate PRs|Limit your open PRs|unrelated changes", re.IGNORECASE
    ),
    "what has to be disclosed": re.compile(r"\bAI\b.*(?:requirements|accept)|disclose", re.IGNORECASE),
}


@dataclass(frozen=True)
class Exported:
    """`files`: the files written; `remarks`: (patch, violation of upstream's style); `unchecked`: checks that could not
    be made, and why.
    """

    files: tuple[Path, ...]
    remarks: tuple[tuple[str, str], ...]
    unchecked: tuple[str, ...]


def export(pin: Pin, folder: Path, *, force: bool = False, report: Report = silent) -> Exported:
    """Write the series and the drafts to `folder`.

    Raises SeriesUnfit (several authors), PatchConflict (a patch does not apply), OutputUnwritable (a file exists with
    other content).
    """
    path = require_tree(pin)
    series = read_series(pin)
    if not series:
        raise SeriesUnfit(f"nothing to export: the series of {pin.name} is empty", hint=verb(pin, "status"))
    check_author(pin, series)
    found = overview(pin)
    if stuck := next((one for one in found.standing if one.commit is None), None):
        raise PatchConflict(f"{stuck.patch.name}: {stuck.applies}: {stuck.detail or ''}", hint=verb(pin, "status"))
    guide = dict(further_files(pin, lambda name: name == GUIDE, report)).get(GUIDE, b"").decode("utf-8", "replace")
    program = style.clang_format()
    unchecked = [] if program else ["clang-format not found: code formatting was not checked"]
    unchecked += [] if guide else [f"the source of {pin.name} has no {GUIDE}: its rules were not quoted"]
    facts = export_facts()
    texts: dict[Path, bytes] = {}
    remarks: list[tuple[str, str]] = []
    for one in found.standing:
        assert one.commit
        said = style.check_editorconfig(style.editorconfig_of(path, one.commit), one.patch.diff)
        said += style.check_format(program, path, one.commit, one.patch.diff) if program else []
        remarks += [(one.patch.name, remark) for remark in said]
        texts[folder / one.patch.name] = one.patch.content
        text = _request(pin, one, facts.get(one.patch.subject, {}), found.whole, guide, said)
        texts[folder / one.patch.name.replace(".patch", ".md")] = text.encode()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for file, content in texts.items():
        check_text_free(file, content, force=force)
    for file, content in texts.items():
        with whole_file(file) as part:
            part.write_bytes(content)
    return Exported(tuple(texts), tuple(remarks), tuple(unchecked))


def check_author(pin: Pin, series: Sequence[Patch]) -> None:
    """Raises SeriesUnfit for several authors: upstream must know who submits the series."""
    authors: dict[str, list[str]] = {}
    for patch in series:
        authors.setdefault(f"{patch.author} <{patch.email}>", []).append(patch.name[:4])
    if len(authors) > 1:
        listed = "; ".join(f"{who}: {', '.join(numbers)}" for who, numbers in authors.items())
        raise SeriesUnfit(
            f"the patches of {pin.name} have several authors: {listed}",
            hint=f"{verb(pin, 'edit')}, then git commit --amend --author=... for the wrong ones",
        )


def export_facts() -> dict[str, Mapping[str, Any]]:
    """`tested` and `figures` (lists of sentences) by the subject of a patch."""
    data = tomllib.loads(_FACTS.read_text(encoding="utf-8"))
    return {subject: entry for entry in data["patch"] for subject in entry["subjects"]}


def _request(
    pin: Pin, one: Standing, facts: Mapping[str, Any], known: Known, guide: str, remarks: Sequence[str]
) -> str:
    patch = one.patch
    _, _, body = patch.message.partition("\n")
    files, plus, minus = _size(patch.diff)
    tests = known.tests
    ran = (
        f"llama.cpp's own tests on a CPU: {tests['passed']} of {tests['ran']} pass with the series; all that pass "
        f"without it still pass ({tests['when'][:10]})"
        if tests and not tests["broken"]
        else "llama.cpp's own tests: not run yet (`apex patch test`)"
    )
    lines = [f"# {patch.subject}", "", body.strip(), ""]
    lines += [
        f"{files} file{'s' * (files > 1)}, {plus} line{'s' * (plus != 1)} added, {minus} removed; against "
        f"{pin.commit[:12]}.",
        "",
    ]
    lines += ["## How it was tested", "", f"- {ran}", *(f"- {line}" for line in facts.get("tested", ())), ""]
    if facts.get("figures"):
        lines += ["## Figures", "", *(f"- {line}" for line in facts["figures"]), ""]
    lines += ["## Before you send it (not part of the text)", ""]
    lines += ["- This draft was made from the commit message. Rewrite it; you are responsible for what you send."]
    for what, section, quoted in guide_rules(guide):
        lines.append(f"- {GUIDE}, section '{section}', on {what}: \"{quoted}\"")
    lines += [f"- style: {remark}" for remark in remarks] or ["- style: no problems found"]
    return "\n".join(lines) + "\n"


def guide_rules(guide: str) -> list[tuple[str, str, str]]:
    """(topic, section, first line about it) for each rule found in upstream's guide."""
    found: dict[tuple[str, str], str] = {}
    section = ""
    for line in guide.splitlines():
        if line.startswith("#"):
            section = line.lstrip("#").strip()
        for what, words in _RULES.items():
            if words.search(line) and not line.startswith("#"):
                found.setdefault((what, section), line.strip("-> \t"))
    return [(what, section, quoted) for (what, section), quoted in found.items()]


def _size(diff: bytes) -> tuple[int, int, int]:
    lines = diff.split(b"\n")
    plus = sum(line.startswith(b"+") and not line.startswith(b"+++ ") for line in lines)
    minus = sum(line.startswith(b"-") and not line.startswith(b"--- ") for line in lines)
    return sum(line.startswith(b"diff --git ") for line in lines), plus, minus
