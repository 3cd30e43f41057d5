"""Check the lines that a patch adds against upstream's style, as its .editorconfig and .clang-format define it."""

from __future__ import annotations

import configparser
import difflib
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from apex_build.source.git import git, run

_HUNK = re.compile(r"@@ -\d+(?:,\d+)? \+(\d+)(?:,(\d+))? @@")
_FORMATTED = (".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp")


@dataclass(frozen=True)
class Added:
    """A line that a patch adds. `ends`: whether a newline follows it, which only the last line of a file may lack."""

    file: str
    number: int
    text: bytes
    ends: bool = True


def added_lines(diff: bytes) -> Iterator[Added]:
    file, number, held = "", 0, None
    for line in diff.split(b"\n"):
        if held is not None:
            yield Added(held.file, held.number, held.text, ends=not line.startswith(b"\\ No newline"))
            held = None
        if line.startswith(b"+++ "):
            file = line[4:].decode("utf-8", "replace").strip('"').removeprefix("b/")
        elif head := _HUNK.match(line.decode("utf-8", "replace")):
            number = int(head[1])
        elif line.startswith(b"+"):
            held = Added(file, number, line[1:])
            number += 1
        elif line.startswith(b" "):
            number += 1
    if held is not None:
        yield held


def check_editorconfig(text: str, diff: bytes) -> list[str]:
    """Violations of an .editorconfig in the lines that a diff adds, such as `src/a.cpp:12: trailing whitespace`."""
    sections = _sections(text)
    found: list[str] = []
    for line in added_lines(diff):
        rules: dict[str, str] = {}
        for glob, pattern, values in sections:
            if pattern.fullmatch(line.file if "/" in glob else line.file.rpartition("/")[2]):
                rules |= values
        found += [f"{line.file}:{line.number}: {what}" for what in _faults(line, rules)]
    return found


def _faults(line: Added, rules: Mapping[str, str]) -> Iterator[str]:
    text = line.text.removesuffix(b"\r")
    indent = text[: len(text) - len(text.lstrip(b" \t"))]
    if rules.get("end_of_line") == "lf" and text != line.text:
        yield "carriage return at the end of the line"
    if rules.get("trim_trailing_whitespace") == "true" and text != text.rstrip(b" \t"):
        yield "trailing whitespace"
    if rules.get("indent_style") == "space" and b"\t" in indent and text.strip():
        yield f"indented with a tab, expected {rules.get('indent_size', '4')} spaces"
    if rules.get("indent_style") == "tab" and indent.startswith(b"    ") and text.strip():
        yield "indented with spaces, expected a tab"
    if rules.get("insert_final_newline") == "true" and not line.ends:
        yield "no newline at the end of the file"
    if rules.get("charset") == "utf-8":
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            yield "not UTF-8"


def _sections(text: str) -> list[tuple[str, re.Pattern[str], dict[str, str]]]:
    parser = configparser.RawConfigParser(strict=False, comment_prefixes=("#", ";"), inline_comment_prefixes=None)
    try:
        parser.read_string("[\0]\n" + text)  # lines before the first section apply to no file
    except configparser.Error:
        return []
    return [
        (name, _pattern(name), {key: value.strip().lower() for key, value in parser.items(name)})
        for name in parser.sections()
        if name != "\0"
    ]


def _pattern(glob: str) -> re.Pattern[str]:
    """Compile an editorconfig glob: `*` stops at a slash, `**` does not, `{a,b}` are alternatives."""
    parts = {r"\*\*": ".*", r"\*": "[^/]*", r"\?": "[^/]", r"\{": "(?:", r"\}": ")", ",": "|", r"\[": "[", r"\]": "]"}
    escaped = re.escape(glob.removeprefix("/")).replace(r"\,", ",")
    return re.compile(re.sub(r"\\\*\\\*|\\[*?{}\[\]]|,", lambda found: parts[found[0]], escaped))


def clang_format() -> Path | None:
    found = shutil.which("clang-format")
    return Path(found) if found else None


def check_format(program: Path, tree: Path, commit: str, diff: bytes) -> list[str]:
    """Remarks such as `src/a.cpp: clang-format would change 3 of the 40 lines added`, by the tree's .clang-format."""
    lines: dict[str, list[int]] = {}
    for line in added_lines(diff):
        if line.file.endswith(_FORMATTED):
            lines.setdefault(line.file, []).append(line.number)
    found: list[str] = []
    for file, numbers in lines.items():
        content = run(tree, "cat-file", "blob", f"{commit}:{file}").stdout
        ranges = [f"--lines={number}:{number}" for number in numbers]
        command = [str(program), "--style=file", f"--assume-filename={tree / file}", *ranges]
        done = subprocess.run(command, input=content, capture_output=True, cwd=tree, check=False)
        if done.returncode != 0:
            words = done.stderr.decode("utf-8", "replace").strip().splitlines()
            found.append(f"{file}: clang-format failed: {words[0] if words else done.returncode}")
            continue
        match = difflib.SequenceMatcher(None, content.splitlines(), done.stdout.splitlines(), autojunk=False)
        changed = {
            at + 1 for tag, i1, i2, _, _ in match.get_opcodes() if tag != "equal" for at in range(i1, max(i2, i1 + 1))
        }
        if touched := changed & set(numbers):
            found.append(f"{file}: clang-format would change {len(touched)} of the {len(numbers)} lines added")
    return found


def editorconfig_of(tree: Path, commit: str) -> str:
    """The .editorconfig of a commit; empty if it has none."""
    if run(tree, "cat-file", "-e", f"{commit}:.editorconfig").returncode != 0:
        return ""
    return git(tree, "cat-file", "blob", f"{commit}:.editorconfig")
