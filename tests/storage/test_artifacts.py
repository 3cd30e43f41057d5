"""The mechanism that makes all files and folders: a kill at any system call, a concurrent run, existing outputs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from kill_points import run_until, traceable

from apex_build.errors import DiskTooSmall, OutputUnwritable
from apex_build.storage.artifacts import Artifact, Replace, check_free, making, making_folder
from apex_build.storage.digests import sha256_file, sha256_json
from apex_build.storage.locks import Busy, locked, locked_in_thread
from apex_build.storage.manifest import (
    IMATRIX,
    QUANTIZED,
    REPLACES,
    SCHEMA,
    Manifest,
    Parts,
    details_of,
    manifest_of,
    parse,
    read_manifest,
)
from apex_build.storage.mounts import lock_doubt, mount_of
from apex_build.storage.outputs import MANIFEST, beside
from apex_build.storage.work import remove_work, unfinished_work


@dataclass(frozen=True)
class Said:
    words: str
    more: int | None = None


def make(out: Path, content: str, *, reuse: bool = True, replace: Replace = "own") -> bool:
    """Make it; returns whether it was made now."""
    with making(Artifact(out, IMATRIX, {"content": content}), reuse=reuse, replace=replace) as draft:
        if draft.found:
            return False
        draft.part.write_text(content)
        draft.done(Said(content))
    return True


def make_folder(folder: Path, content: str, *, movable: bool = True) -> bool:
    artifact = Artifact(folder, IMATRIX, {"content": content}, folder / "manifest.json")
    with making_folder(
        artifact, intact=lambda found: found is not None and artifact.found() is not None, movable=movable
    ) as draft:
        if draft.found:
            return False
        (draft.part / "inside").mkdir(parents=True)
        (draft.part / "inside" / "file").write_text(content)
        draft.done(Said(content))
    return True


def state_of_file(out: Path) -> str:
    """The existing output, by its manifest. Raises AssertionError if the two are from different runs."""
    if not out.exists():
        return "nothing"
    found = manifest_of(out, beside(out, MANIFEST))
    assert found is not None and found.describes(out), "a file without its manifest"
    assert found.details["words"] == out.read_text() and found.identity == sha256_json({"content": out.read_text()})
    return out.read_text()


def state_of_folder(folder: Path) -> str:
    if not folder.exists():
        return "nothing"
    found = read_manifest(folder / "manifest.json")
    if found is None:  # one that is made at its place counts as not there
        return "nothing"
    text = (folder / "inside" / "file").read_text()
    assert found.details["words"] == text
    return text


def kill_everywhere(
    root: Path, before: Callable[[Path], object], work: Callable[[Path], object], state: Callable[[Path], str]
) -> int:
    """Do the work repeatedly, killing it one stop later each time. Returns the number of stops."""
    seen: list[str] = []
    for stop in range(100_000):
        place = root / f"{stop}"
        place.mkdir()
        before(place)
        ended = run_until(partial(work, place), stop) is None
        seen.append(state(place))
        work(place)  # the next run
        assert state(place) == "new", f"after a kill at stop {stop}"
        assert not [path.name for path in place.iterdir() if path.name.startswith(".") and path.name != ".keep"], stop
        shutil.rmtree(place)
        if ended:
            assert seen[-1] == "new"
            assert seen == sorted(seen, key=["nothing", "old", "new"].index), "once it is new, it stays new"
            return stop
    raise AssertionError("it never ends")


needs_tracing = pytest.mark.skipif(not traceable(), reason="the system does not let a process trace its child")


@pytest.mark.slow
@needs_tracing
@pytest.mark.parametrize("old", [False, True], ids=["nothing before", "an old one before"])
def test_a_file_that_is_killed_at_any_system_call(
    tmp_path: Path, old: bool, record_property: Callable[[str, object], None]
) -> None:
    stops = kill_everywhere(
        tmp_path,
        lambda place: old and make(place / "x", "old"),
        lambda place: make(place / "x", "new"),
        lambda place: state_of_file(place / "x"),
    )
    print(f"a file, {'replaced' if old else 'new'}: killed before and after each system call, {stops} times")
    assert stops > 60


@pytest.mark.slow
@needs_tracing
@pytest.mark.parametrize("movable", [True, False], ids=["moved in", "made at its place"])
@pytest.mark.parametrize("old", [False, True], ids=["nothing before", "an old one before"])
def test_a_folder_that_is_killed_at_any_system_call(tmp_path: Path, old: bool, movable: bool) -> None:
    if old and not movable:
        pytest.skip("such a folder's name holds its identity: none is ever replaced")
    stops = kill_everywhere(
        tmp_path,
        lambda place: old and make_folder(place / "x", "old"),
        lambda place: make_folder(place / "x", "new", movable=movable),
        lambda place: state_of_folder(place / "x"),
    )
    print(f"a folder, {'replaced' if old else 'new'}: killed before and after each system call, {stops} times")
    assert stops > 60


def test_a_file_system_that_cannot_exchange_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apex_build.storage.folders._exchange", lambda _one, _two: False)
    assert (
        make_folder(tmp_path / "x", "old")
        and make_folder(tmp_path / "x", "new")
        and state_of_folder(tmp_path / "x") == "new"
    )
    (tmp_path / "x").rename(tmp_path / ".x.old")  # killed between the two renames
    assert not make_folder(tmp_path / "x", "new") and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_the_same_parts_are_made_once(tmp_path: Path) -> None:
    out = tmp_path / "x"
    assert make(out, "one") and not make(out, "one") and make(out, "one", reuse=False)
    assert make(out, "two") and state_of_file(out) == "two"
    out.write_text("2wo")
    assert make(out, "two") and state_of_file(out) == "two"
    value = json.loads(beside(out, MANIFEST).read_text())
    assert value.keys() == {"apex", "bytes", "from", "identity", "kind", "schema", "sha256", "words"}
    assert value["schema"] == SCHEMA and value["from"] == {"content": "two"} and REPLACES not in value


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    out = tmp_path / "x"
    out.write_text("mine")
    kinds: tuple[Replace, ...] = ("nothing", "own")
    for replace in kinds:
        with pytest.raises(OutputUnwritable, match="is not an output of this command"):
            make(out, "one", replace=replace)
    assert make(out, "one", replace="anything") and state_of_file(out) == "one"
    with pytest.raises(OutputUnwritable, match="was made from something else"):
        make(out, "two", replace="nothing")
    with pytest.raises(OutputUnwritable, match="is not an output of this command"):
        check_free(Artifact(out, QUANTIZED, {}), "own")
    with pytest.raises(OutputUnwritable, match="is the input itself"), making(Artifact(out, IMATRIX, {}), inputs=[out]):
        raise AssertionError
    with (
        pytest.raises(DiskTooSmall, match="x takes"),
        making(Artifact(out, IMATRIX, {}), reuse=False, replace="anything", n_bytes=1 << 60),
    ):
        raise AssertionError
    assert {path.name for path in tmp_path.iterdir()} == {"x", "x.json"}


def test_a_run_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "x"
    make(out, "old")
    with pytest.raises(ZeroDivisionError), making(Artifact(out, IMATRIX, {}), replace="own") as draft:
        draft.part.write_text("half")
        raise ZeroDivisionError
    assert state_of_file(out) == "old" and {path.name for path in tmp_path.iterdir()} == {"x", "x.json"}


def test_manifests_from_before_there_was_a_schema(tmp_path: Path) -> None:
    """Manifests from earlier versions are understood; one from a newer version is recognized, but its output is not
    reused.
    """
    out = tmp_path / "x"
    out.write_text("text")
    parts: Parts = {"model": "m", "settings": {"chunks": 24}, "text": "t", "tools": "k"}
    old = {"identity": sha256_json(parts), "from": parts, "sha256": sha256_file(out), "bytes": 4, "text": {"name": "t"}}
    beside(out, MANIFEST).write_text(json.dumps(old))
    artifact = Artifact(out, IMATRIX, parts)
    found = artifact.found()
    assert found and found.schema == 0 and found.describes(out) and found.details == {"text": {"name": "t"}}
    beside(out, MANIFEST).write_text(json.dumps({**old, "schema": SCHEMA + 1, "kind": IMATRIX}))
    assert artifact.found() is None
    with pytest.raises(OutputUnwritable, match="was made from something else"):
        check_free(artifact)
    quantized = parse(
        {"identity": "i", "provenance": {"apex.plan": "p"}, "policy": "i-nano", "sha256": "s", "bytes": 3}
    )
    assert quantized and (quantized.kind, quantized.parts) == (QUANTIZED, {"apex.plan": "p"})
    values: tuple[object, ...] = (
        None,
        [],
        3,
        {},
        {"mine": True},
        {"kind": 3},
        {"kind": "x", "bytes": "y"},
        {"kind": "x", "from": 3},
    )
    for nonsense in values:
        assert parse(nonsense) is None


def test_what_a_dataclass_says() -> None:
    assert details_of(Said("a")) == {"words": "a"} and details_of(Said("a", 1)) == {"words": "a", "more": 1}
    assert parse(Manifest(IMATRIX, "i", {"a": 1}, "s", 3, {"words": "w"}).json()) == Manifest(
        IMATRIX, "i", {"a": 1}, "s", 3, {"words": "w"}
    )


HOLD = """
import sys, time
from pathlib import Path
from apex_build.storage.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_run_is_refused_or_waited_for(tmp_path: Path) -> None:
    out, said = tmp_path / "x", []
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        with pytest.raises(Busy, match="is being written by another run of apex"), making(Artifact(out, IMATRIX, {})):
            raise AssertionError

        def let_go(step: object) -> None:
            said.append(getattr(step, "task", ""))
            other.communicate(b"")

        with making(Artifact(out, IMATRIX, {}), wait="another that makes x", report=let_go) as draft:
            draft.part.write_text("x")
            draft.done(Said("x"))
    assert said == ["waiting for another that makes x"]
    with locked_in_thread(out, what=""), locked_in_thread(out, what=""), pytest.raises(Busy), locked(out):
        raise AssertionError
    assert {path.name for path in tmp_path.iterdir()} == {"x", "x.json"}


TABLE = """
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:40 / /shared rw,relatime - nfs4 host:/shared rw,vers=4.2,local_lock=none,addr=1.2.3.4
31 22 0:41 / /old rw,relatime - nfs host:/old rw,vers=3,nolock,local_lock=all
32 22 0:42 / /my\\040disk rw - fuse.sshfs me@host:/ rw,user_id=0
33 22 0:43 / /scratch rw - lustre 1@tcp:/scratch rw,flock,lazystatfs
34 22 0:44 / /scratch/old rw - lustre 1@tcp:/scratch rw,localflock
35 22 0:45 / /ram rw - tmpfs tmpfs rw
broken line
"""


@pytest.mark.parametrize(
    ("path", "doubt"),
    [
        ("/var/x", ""),
        ("/shared/me/x", ""),
        ("/old/x", "mounted as nfs with local_lock=all, nolock: other machines do not see locks"),
        ("/older/x", ""),
        ("/my disk/x", "locks on fuse.sshfs may not be seen by other machines"),
        ("/scratch/x", ""),
        ("/scratch/old/x", "mounted as lustre without flock: other machines do not see locks"),
        ("/ram/x", ""),
    ],
)
def test_locks_on_network_file_systems(path: str, doubt: str) -> None:
    assert lock_doubt(mount_of(Path(path), TABLE)) == doubt


def test_a_doubt_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from apex_build.storage import locks

    monkeypatch.setattr(locks, "_doubted", set())
    monkeypatch.setattr(locks, "lock_doubt", lambda _mount: "locks may not be seen by other machines")
    said: list[str] = []
    monkeypatch.setattr(locks._log, "warning", lambda text, *words: said.append(text % words))
    for name in ("x", "y"):
        with locked(tmp_path / name):
            pass
    assert len(said) == 1 and "let no other apex write the same files" in said[0]


def test_work_is_kept_for_the_same_parts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APEX_CACHE_DIR", str(tmp_path / "cache"))
    out = tmp_path / "x"

    def run(name: str, *, kept: bool) -> str:
        artifact = Artifact(out, IMATRIX, {"of": name})
        with pytest.raises(ZeroDivisionError), unfinished_work(artifact, {"a": b"1"}, lambda _: kept) as work:
            found = (work / "done").read_text() if (work / "done").exists() else "nothing"
            (work / "done").write_text(name)
            raise ZeroDivisionError
        return found

    runs = [("one", True), ("one", True), ("two", True), ("two", False), ("two", True)]
    assert [run(name, kept=kept) for name, kept in runs] == ["nothing", "one", "nothing", "two", "nothing"]
    remove_work(out)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"] and not list(
        (tmp_path / "cache" / "calibrations").iterdir()
    )
