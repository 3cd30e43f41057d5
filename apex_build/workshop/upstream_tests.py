"""Build and run llama.cpp's own tests, without the series and with it: those that need only a CPU and no download.

Source trees do not include the tests; they come from the archive of the pin. Outcomes are remembered by the identity of
the source, so that after a change to the series only the side with it runs again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from apex_build.errors import BuildFailed, PatchConflict, SeriesUnfit, ToolTimeout
from apex_build.native.run import run_tool
from apex_build.progress import Report, Step, silent
from apex_build.source.fetch import further_files
from apex_build.source.git import git
from apex_build.source.pins import Pin
from apex_build.source.series import read_series, verb
from apex_build.source.tree import BASE, check_out, commit_identity, require_tree
from apex_build.source.tree_digest import digest_of, is_executable
from apex_build.storage.digests import sha256_json
from apex_build.storage.disk import check_room, writing
from apex_build.storage.locks import locked
from apex_build.toolchain.backends import BACKENDS
from apex_build.toolchain.build import cache, cmake
from apex_build.toolchain.build.launcher import Launcher, launcher
from apex_build.toolchain.build.run import WORK_SIZE
from apex_build.toolchain.machine.compilers import Compiler, find_compiler
from apex_build.workshop import results
from apex_build.workshop.each_builds import compilers_words, workplace
from apex_build.workshop.standing import stand

State = Literal["passed", "failed", "timeout"]
RECIPE = 3  # raise it when the way of running a test changes
_FOLDERS = ("tests/", "models/ggml-vocab-")
_LABELS = {"model": "needs a model to be downloaded", "python": "needs Python packages"}
# Only the operations that the series uses: all of ggml's take hours on a CPU.
_OPERATIONS = "MUL_MAT,MUL_MAT_ID,GET_ROWS,SET_ROWS,REPEAT,REPEAT_BACK,SQR,SUM_ROWS,ADD,SCALE,CPY,CONT,CONCAT,RMS_NORM"
_SMALL = r"^(?!.*(n_mats=\d{3}|\b[mk]=\d{4}))"  # hundreds of experts or thousands of rows take minutes each
# Arguments that a test needs to test anything on a machine without a GPU.
_ARGUMENTS = {"test-backend-ops": ("test", "-b", "CPU", "-o", _OPERATIONS, "-p", _SMALL)}
_UNLISTED = tuple(_ARGUMENTS)  # the CMake files of some pins build these without registering them with ctest
# `name`, `"name"` or `[=[name]=]`, depending on the characters in the name
ADDED = re.compile(r'^add_test\((?:\[=*\[|")?(?P<name>[^\s"\]]+)(?:\]=*\]|")? "(?P<program>[^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class OwnTest:
    """A test that CMake lists. `command` is empty until its program is built; `why_not`: why it is skipped.

    `makes`, `needs`: ctest's fixtures, such as models that one test writes for others.
    """

    name: str
    command: tuple[str, ...]
    folder: str
    skip_code: int | None
    why_not: str | None
    makes: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Outcome:
    """`without` and `with_`: name -> outcome, without and with the series. `left_out`: name -> why it was skipped.

    `broken`: tests that pass without the series and fail with it. `runnable`: number of tests that can run here.
    `reused`: number of outcomes known before, for each side.
    """

    identity: str
    without: Mapping[str, State]
    with_: Mapping[str, State]
    left_out: Mapping[str, str]
    runnable: int
    reused: tuple[int, int]

    @property
    def broken(self) -> tuple[str, ...]:
        return tuple(
            sorted(
                name for name, state in self.with_.items() if state != "passed" and self.without.get(name) == "passed"
            )
        )


@dataclass(frozen=True)
class _Bench:
    """Where the tests are built and run, and how."""

    pin: Pin
    tree: Path
    folder: Path
    compiler: Compiler
    front: Launcher
    jobs: int
    timeout: float
    only: tuple[re.Pattern[str], ...]
    key: str
    report: Report

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @property
    def work(self) -> Path:
        return self.folder / "build"


def run_both_sides(
    pin: Pin, *, only: Sequence[str] = (), jobs: int | None = None, timeout: float = 1800, report: Report = silent
) -> Outcome:
    """Run the tests whose names match one of the regular expressions `only` (default: all) without and with the series,
    and remember the outcomes.

    Raises PatchConflict if a patch does not apply, BuildFailed if the tests of one side cannot be built, SeriesUnfit if
    there are none.
    """
    tree = require_tree(pin)
    standing = list(stand(tree, read_series(pin)))
    if stuck := next((one for one in standing if one.applies == "conflict"), None):
        raise PatchConflict(f"{stuck.patch.name} does not apply: {stuck.detail}", hint=verb(pin, "status"))
    base = git(tree, "rev-parse", "--verify", f"refs/tags/{BASE}^{{commit}}")
    head = next((one.commit for one in reversed(standing) if one.commit), base)
    folder, compiler = workplace(pin), find_compiler()
    with locked(folder, wait=True, report=report), writing(folder):
        report(Step("reading the tests", 0))
        files = list(further_files(pin, lambda name: name.startswith(_FOLDERS), report))
        if not any(name == "tests/CMakeLists.txt" for name, _ in files):
            raise SeriesUnfit(f"the archive of {pin.name} has no tests/CMakeLists.txt", hint=verb(pin, "status"))
        key = sha256_json([RECIPE, digest_of(files), compiler.kind, compiler.version, compiler.target, timeout])
        check_room(cache.work_root(), WORK_SIZE, "a build of the tests", hint="APEX_CACHE_DIR=FOLDER: another disk")
        for name in ("build", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        with launcher(cache.work_root().parent, [folder / "source", folder / "build"]) as front:
            expressions = tuple(re.compile(one) for one in only)
            bench = _Bench(
                pin, tree, folder, compiler, front, jobs or cmake.default_jobs(), timeout, expressions, key, report
            )
            without, reused, _ = _side(bench, base, "without the series", files)
            with_, reused_with, tests = _side(bench, head, "with the series", files)
    left_out = {test.name: test.why_not for test in tests if test.why_not}
    names = {test.name for test in tests}
    found = Outcome(
        commit_identity(tree, head),
        {name: state for name, state in without.items() if _wanted(bench, name)},
        {name: state for name, state in with_.items() if name in names and _wanted(bench, name)},
        left_out,
        len(names) - len(left_out),
        (reused, reused_with),
    )
    _remember(found, without, {name: state for name, state in with_.items() if name in names - left_out.keys()})
    return found


def _remember(found: Outcome, without: Mapping[str, State], with_: Mapping[str, State]) -> None:
    """Store a summary for `apex patch status`: all tests that ever ran on this source, not only in this run."""
    whole = Outcome(found.identity, without, with_, found.left_out, found.runnable, (0, 0))
    summary = {
        "ran": len(with_),
        "passed": sum(state == "passed" for state in with_.values()),
        "runnable": found.runnable,
        "broken": list(whole.broken),
        "failed_without_too": sorted(
            name for name, state in with_.items() if state != "passed" and name not in whole.broken
        ),
        "left_out": dict(found.left_out),
    }
    results.remember(found.identity, "tests", summary)


def logs(pin: Pin) -> Path:
    """The folder with the output of each test's last run."""
    return workplace(pin) / "logs"


def _wanted(bench: _Bench, name: str) -> bool:
    return not bench.only or any(one.search(name) for one in bench.only)


def _side(
    bench: _Bench, commit: str, which: str, files: Sequence[tuple[str, bytes]]
) -> tuple[dict[str, State], int, list[OwnTest]]:
    """Run the wanted tests on a commit. Returns all known outcomes, the number known before, and the tests."""
    identity = commit_identity(bench.tree, commit)
    known = _known(identity, bench.key)
    check_out(bench.tree, commit, bench.source)
    _lay_out(bench.source, files)
    options = {**BACKENDS["cpu"].cmake_options(native=True), "LLAMA_BUILD_TESTS": "ON"}
    cmake.configure(bench.source, bench.work, options, bench.compiler, bench.front, _told(bench.report, which))
    tests = _list(bench)
    todo = _with_fixtures(
        tests,
        [test for test in tests if test.why_not is None and test.name not in known and _wanted(bench, test.name)],
    )
    reused = sum(test.name in known and _wanted(bench, test.name) for test in tests)
    if not todo:
        return known, reused, tests
    try:
        programs = _programs(bench)
        targets = sorted({programs[test.name] for test in todo if test.name in programs})
        if targets:  # without targets Ninja would build everything
            cmake.compile_targets(
                bench.source, bench.work, targets, bench.jobs, bench.front, _told(bench.report, which)
            )
    except BuildFailed as error:
        raise BuildFailed(
            f"llama.cpp's tests cannot be built {which}:\n{compilers_words(error)}", hint=error.hint
        ) from None
    tests = _list(bench)  # ctest knows the commands only after the build
    names = [test.name for test in todo]
    todo = sorted((test for test in tests if test.name in names), key=lambda test: names.index(test.name))
    for number, test in enumerate(todo):
        bench.report(Step(f"testing {which}", number, len(todo), "tests", detail=test.name))
        known[test.name] = _run(bench, test)
        results.remember(identity, "upstream", {"key": bench.key, "outcomes": known})
    bench.report(Step(f"testing {which}", len(todo), len(todo), "tests"))
    return known, reused, tests


def _with_fixtures(tests: Sequence[OwnTest], todo: Sequence[OwnTest]) -> list[OwnTest]:
    """Tests to run, after those that make their fixtures, even if the outcomes of these are known: both sides share a
    folder, and its fixtures may be from the other side.
    """
    needed = frozenset().union(*(test.needs for test in todo))
    makers = [test for test in tests if test.makes & needed]
    return [*makers, *(test for test in todo if test not in makers)]


def _told(report: Report, which: str) -> Report:
    return lambda step: report(step if step.said else replace(step, task=f"{step.task} {which}"))


def _known(identity: str, key: str) -> dict[str, State]:
    found: dict[str, Any] = results.recall(identity).get("upstream") or {}
    return dict(found.get("outcomes", {})) if found.get("key") == key else {}


def _lay_out(source: Path, files: Sequence[tuple[str, bytes]]) -> None:
    """Write the files, but do not touch those that are up to date, so that nothing is recompiled for them."""
    for name, content in files:
        path = source / name
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            path.chmod(0o755 if is_executable(content) else 0o644)


def _list(bench: _Bench) -> list[OwnTest]:
    program = cmake.programs()[0].with_name("ctest")
    said = run_tool([program, "--test-dir", bench.work, "--show-only=json-v1"], cwd=bench.work)
    text = "\n".join(said.lines)
    programs = _programs(bench)
    tests = [_test(entry, programs) for entry in json.loads(text[text.index("{") :])["tests"]]
    names = {test.name for test in tests}
    tests += [
        OwnTest(name, (str(bench.work / "bin" / name),), ".", None, None)
        for name in _UNLISTED
        if name not in names and (bench.source / "tests" / f"{name}.cpp").is_file()
    ]
    lost = frozenset().union(*(test.makes for test in tests if test.why_not))
    return [replace(test, why_not=test.why_not or _LABELS["model"]) if test.needs & lost else test for test in tests]


def _test(entry: Mapping[str, Any], programs: Mapping[str, str]) -> OwnTest:
    properties = {one["name"]: one["value"] for one in entry.get("properties", ())}
    command = tuple(map(str, entry.get("command", ())))
    labels = properties.get("LABELS", ())
    makes, needs = (frozenset(properties.get(f"FIXTURES_{what}", ())) for what in ("SETUP", "REQUIRED"))
    why_not = next((why for label, why in _LABELS.items() if label in labels), None)
    # fixtures made by a test program are made here; anything else downloads them
    if (makes and entry["name"] not in programs) or any("://" in one for one in command):
        why_not = _LABELS["model"]
    if properties.get("DISABLED"):
        why_not = "disabled by upstream"
    code = properties.get("SKIP_RETURN_CODE")
    return OwnTest(entry["name"], command, str(properties.get("WORKING_DIRECTORY", ".")), code, why_not, makes, needs)


def _programs(bench: _Bench) -> dict[str, str]:
    """Test -> the target of its program, from the files that ctest reads: ctest tells only after the build."""
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in bench.work.rglob("CTestTestfile.cmake")]
    found = [match for text in texts for match in ADDED.finditer(text)]
    of_tests = {match["name"]: Path(match["program"]).name for match in found if f"{bench.work}/" in match["program"]}
    return {**{name: name for name in _UNLISTED}, **of_tests}


def _run(bench: _Bench, test: OwnTest) -> State:
    if not test.command:
        return "failed"
    command = [*test.command, *_ARGUMENTS.get(test.name, ())]
    folder = bench.work / test.folder
    try:
        done = run_tool(
            command, cwd=folder, timeout=bench.timeout, check=False, log=logs(bench.pin) / f"{test.name}.log"
        )
    except ToolTimeout:
        return "timeout"
    return "passed" if done.returncode in (0, test.skip_code) else "failed"
