"""The files of the checkout as a whole: nothing from the machine they were written on, and no names of moved files."""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from apex_runs import run_apex

from apex_build.errors import BuildMissing
from apex_build.native.toolset import find_toolset

ROOT = Path(__file__).parents[1]
# Text that models read: paths and hosts in it are invented.
TEXTS = re.compile(r"tests/testbed/heldout/|calibration_sets/data/|evaluation_sets/data/|\.gguf$")
MACHINE = re.compile(r"(?<![\w}.-])/(?:work|root|tmp/\w+|home/\w+|Users/\w+|opt/(?!cuda)\w+|mnt/\w+)\b")
HOST = re.compile(r"\w+://(?:[^\s/@\"']*@)?([\w.-]+)")
PUBLIC = {
    *(
        "creativecommons.org",
        "distributed.dask.org",
        "editorconfig.org",
        "github.com",
        "huggingface.co",
        "jobqueue.dask.org",
        "keepachangelog.com",
        "matplotlib.org",
        "purl.org",
        "semver.org",
        "www.w3.org",
    ),
    *("git-lfs", "localhost"),
}
INVENTED = re.compile(r"[\d.]+|127|host|node\d|.*\.(?:example|invalid|test)|(?:.*\.)?example\.(?:com|net|org)")


def texts() -> Iterator[tuple[str, str]]:
    """Name and content of each committed file."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split("\0"):
        if name and not TEXTS.search(name) and (ROOT / name).is_file():
            yield name, (ROOT / name).read_text(encoding="utf-8", errors="replace")


def test_no_file_names_a_machine() -> None:
    """No folder of one machine, and only public hosts: a private package index belongs in pip's configuration."""
    found = []
    for name, text in texts():
        found += [f"{name}: {match[0]}" for match in MACHINE.finditer(text)]
        hosts = (match[1].lower().rstrip(".") for match in HOST.finditer(text))
        found += [f"{name}: {host}" for host in hosts if host not in PUBLIC and not INVENTED.fullmatch(host)]
    assert found == []


def there(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name) or bool(importlib.import_module(f"{module}.{name}"))
    except ImportError:
        return False


def test_what_is_imported_or_named_by_its_path_is_there() -> None:
    """Also in code that tests run as text, in comments and in docs."""
    found = []
    for name, text in texts():
        if name == "CHANGELOG.md" or name.startswith("patches/"):
            continue
        rooms = "apex_build|plugins|tests" + ("" if name.startswith("tests/") else "|docs")  # tests invent pages
        for match in re.finditer(r"from (apex_build[\w.]*) import (\w+(?:, \w+)*)", text):
            found += [f"{name}: {match[1]}.{one}" for one in match[2].split(", ") if not there(match[1], one)]
        for path in re.findall(rf"\b(?:{rooms})/(?:[\w-]+/)*[\w-]+\.(?:py|md|toml|sh|jinja)\b", text):
            if not (ROOT / path).is_file() and not path.startswith("apex_build/data/"):  # the wheel has that folder
                found.append(f"{name}: {path}")
    assert set(found) <= {"tests/plugins/test_authors.py: apex_build.plugin_api.of_the_future"}


def test_pre_commit_runs_what_lint_runs() -> None:
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    wanted = re.findall(r"\$\(VENV\)/bin/(.+)", recipe)
    hooks = re.findall(r"entry: \.venv/bin/(.+)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert hooks == wanted and len(wanted) >= 3


def test_a_test_that_does_not_ask_for_the_tools_finds_none(testbed: Path) -> None:
    with pytest.raises(BuildMissing):
        find_toolset()
    assert "the native tools have not been built" in run_apex("plan", testbed, "--policy", "compact", code=22).stderr
