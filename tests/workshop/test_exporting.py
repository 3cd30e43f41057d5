"""`apex patch export`: mail for git am, a draft of a pull request for each patch, and upstream's style rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from source.tiny import IMATRIX, LINES, World, commit, edited, git
from workshop.conftest import MakeLater, Run

from apex_build.errors import OutputUnwritable, SeriesUnfit
from apex_build.source.fetch import fetch
from apex_build.source.series import save_series
from apex_build.source.tree import tree_identity
from apex_build.workshop import results
from apex_build.workshop.style import check_editorconfig, check_format, clang_format

RULES = """# https://EditorConfig.org
root = true

[*]
end_of_line = lf
insert_final_newline = true
trim_trailing_whitespace = true
charset = utf-8
indent_style = space
indent_size = 4

[Makefile]
indent_style = tab

[models/templates/*.jinja]
indent_style = unset
trim_trailing_whitespace = unset

[tools/{ui,web}/**]
trim_trailing_whitespace = unset
"""
GUIDE = """# Contributors

# AI Usage Policy

If AI is used to generate any portion of the code, contributors must adhere to the following requirements:

# Pull requests

- Create separate PRs for each feature or fix:
"""


def diff(file: str, *lines: str, end: str = "\n") -> bytes:
    added = "".join(f"+{line}\n" for line in lines).removesuffix("\n") + (end or "\n\\ No newline at end of file\n")
    return f"--- a/{file}\n+++ b/{file}\n@@ -4,1 +5,{len(lines) + 1} @@\n kept \t \n{added}".encode()


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("src/a.cpp", "    int a;", None),
        ("src/a.cpp", "    int a; ", "trailing whitespace"),
        ("src/a.cpp", "    ", "trailing whitespace"),
        ("src/a.cpp", "\tint a;", "indented with a tab, expected 4 spaces"),
        ("src/a.cpp", "    int a;\t// two", None),
        ("src/a.cpp", "int a;\r", "carriage return at the end of the line"),
        ("Makefile", "\tcc", None),
        ("tests/Makefile", "    cc", "indented with spaces, expected a tab"),
        ("models/templates/a.jinja", "\t{{ a }} ", None),
        ("models/templates/deeper/a.jinja", "{{ a }} ", "trailing whitespace"),
        ("tools/ui/src/a.ts", "a ", None),
        ("tools/other/a.ts", "a ", "trailing whitespace"),
    ],
)
def test_editorconfig(file: str, line: str, said: str | None) -> None:
    assert check_editorconfig(RULES, diff(file, "fine", line)) == ([f"{file}:7: {said}"] if said else [])


def test_editorconfig_at_the_end_of_a_file() -> None:
    assert check_editorconfig(RULES, diff("a.c", "x", "y", end="")) == ["a.c:7: no newline at the end of the file"]
    assert check_editorconfig(RULES, diff("a.c", "x", "y")) == []
    assert check_editorconfig("", diff("a.c", "x \t")) == [], "no rules, no remarks"


def test_clang_format(series: World) -> None:
    program = clang_format()
    if program is None:
        pytest.skip("no clang-format on this machine")
    before = "int  f( ){return 1;}\n"
    commit(series.tree, {".clang-format": b"BasedOnStyle: LLVM\n", "ggml/src/a.c": before.encode()}, "a.c")
    head = commit(
        series.tree, {"ggml/src/a.c": f"{before}int g( ) {{ return 2; }}\nint h() {{ return 3; }}\n".encode()}, "more"
    )
    patch = git(series.tree, "show", "--format=", "HEAD").encode() + b"\n"
    assert check_format(program, series.tree, head, patch) == [
        "ggml/src/a.c: clang-format would change 1 of the 2 lines added"
    ]


@pytest.fixture
def later(make_later: MakeLater) -> World:
    """A source with upstream's rules, and two patches, one of them with trailing whitespace."""
    later = make_later({".editorconfig": RULES.encode(), "CONTRIBUTING.md": GUIDE.encode()})
    fetch(later.pin)
    commit(later.tree, {IMATRIX: edited(10, "ten ")}, "imatrix: ten\n\nNine was too few.")
    commit(later.tree, {"ggml/src/new.c": b"new\n"}, "ggml: new")
    save_series(later.pin)
    return later


def test_export(later: World, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "to upstream"
    said = run("patch", "export", "--pin", later.toml, "--to", out)
    assert said.code == 0, said.err
    names = ["0001-imatrix-ten.md", "0001-imatrix-ten.patch", "0002-ggml-new.md", "0002-ggml-new.patch"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert f"style, 0001: {IMATRIX}:10: trailing whitespace" in said.out
    text = (out / names[0]).read_text()
    assert text.startswith("# imatrix: ten\n\nNine was too few.\n\n1 file, 1 line added, 1 removed; against ")
    assert "llama.cpp's own tests: not run yet" in text
    assert "CONTRIBUTING.md, section 'AI Usage Policy', on what has to be disclosed: \"If AI is used" in text
    assert (
        "CONTRIBUTING.md, section 'Pull requests', on how a request is cut and how large it may be: \"Create separate"
        in text
    )
    assert f"style: {IMATRIX}:10: trailing whitespace" in text
    assert "style: no problems found" in (out / names[2]).read_text()
    # upstream's own repository takes the mail
    git(later.upstream, "am", "--quiet", *(str(out / name) for name in names if name.endswith(".patch")))
    assert git(later.upstream, "log", "-1", "--format=%s %an") == "ggml: new Dev Élan"
    assert (later.upstream / IMATRIX).read_text() == LINES.replace("line 10\n", "ten \n")


def test_what_was_tested_is_in_it(later: World, run: Run, tmp_path: Path) -> None:
    found = {"ran": 40, "runnable": 40, "passed": 39, "broken": [], "left_out": {}}
    results.remember(tree_identity(later.tree), "tests", found)
    assert run("patch", "export", "--pin", later.toml, "--to", tmp_path / "out").code == 0
    assert (
        "39 of 40 pass with the series; all that pass without it still pass (20"
        in (tmp_path / "out/0002-ggml-new.md").read_text()
    )


def test_export_again(later: World, run: Run, tmp_path: Path) -> None:
    assert run("patch", "export", "--pin", later.toml, "--to", tmp_path / "out").code == 0
    assert run("patch", "export", "--pin", later.toml, "--to", tmp_path / "out").code == 0, "the same again is no loss"
    mine = tmp_path / "out" / "0001-imatrix-ten.md"
    mine.write_text("in my own words\n")
    said = run("patch", "export", "--pin", later.toml, "--to", tmp_path / "out")
    assert said.code == OutputUnwritable.exit_code and mine.read_text() == "in my own words\n"
    said = run("patch", "export", "--pin", later.toml, "--to", tmp_path / "out", "--force", "--json")
    assert [Path(file).name[:4] for file in json.loads(said.out)["files"]] == ["0001", "0001", "0002", "0002"]


def test_one_author(later: World, run: Run, tmp_path: Path) -> None:
    git(later.tree, "commit", "--quiet", "--amend", "--no-edit", "--author=Ada <ada@example.org>")
    save_series(later.pin)
    said = run("patch", "export", "--pin", later.toml, "--to", tmp_path / "out")
    assert said.code == SeriesUnfit.exit_code
    assert "several authors: Dev Élan <dev@example.org>: 0001; Ada <ada@example.org>: 0002" in said.err
    assert not (tmp_path / "out").exists()
