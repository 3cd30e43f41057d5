"""Disks that are too small, and disks that fill up: messages, and what is kept."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from apex_runs import SMALL

from apex_build.cli import main
from apex_build.errors import DiskTooSmall, OutputUnwritable
from apex_build.native.toolset import Toolset
from apex_build.storage.disk import sync_folder
from apex_build.storage.outputs import put, whole_file

Disk = Callable[[int], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """disk(n): a file system of n bytes."""
    made: list[Path] = []

    def make(n_bytes: int) -> Path:
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "none", str(folder)], capture_output=True
        )
        if mounted.returncode:
            pytest.skip("a file system can only be mounted by root")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def apex(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def filled(folder: Path, *, but: int = 0) -> Path:
    """Fill the disk with a file, leaving `but` bytes."""
    path = folder / "filling"
    path.write_bytes(bytes(shutil.disk_usage(folder).free - but))
    return path


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check beforehand finds enough space, but another program uses it later."""
    for module in (
        "apex_build.calibration.disk", "apex_build.evaluation.run", "apex_build.quantization.preflight",
        "apex_build.toolchain.packed.packing", "apex_build.storage.artifacts",
    ):  # fmt: skip
        monkeypatch.setattr(f"{module}.check_room", lambda *_, **__: None)


# --- before -----------------------------------------------------------------------------------------------------------
def test_it_is_said_before_anything_is_run(
    disk: Disk, testbed: Path, calibrated: Path, heldout: Path, tools: Toolset, capsys: pytest.CaptureFixture[str]
) -> None:
    place = disk(1 << 20)
    text = heldout / "chat.txt"
    commands = (
        ("calibrate", testbed, "--text", text, "-o", place / "i.gguf"),
        ("quantize", testbed, "--policy", "compact", *SMALL, "-o", place / "q.gguf"),
        ("evaluate", testbed, "--only", "perplexity", "--text", text, "--results", place / "r.jsonl"),
        ("sweep", testbed, "--over", "draft_head=Q8_0", "--imatrix", calibrated, "--text", text, "-o", place / "s"),
    )
    for command in commands:
        assert apex(*command) == DiskTooSmall.exit_code
        said = capsys.readouterr().err
        assert f"{place}" in said and "MB free, expected" in said, said
        assert not list(place.iterdir()), "nothing was begun"


# --- in the middle ----------------------------------------------------------------------------------------------------
def test_llama_imatrix_without_room_for_its_file(
    disk: Disk, testbed: Path, heldout: Path, tools: Toolset, blind: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """It exits with code 0, but its file is missing or cut short."""
    place = disk(1 << 20)
    out = place / "i.gguf"
    command = ("calibrate", testbed, "--chunks", 3, "--text", heldout / "chat.txt", "--threads", 1, "-o", out)
    assert apex(*command) == 0
    before = out.read_bytes()
    filled(place, but=130_000)
    capsys.readouterr()
    assert apex(*command, "--force", "--context", 256) == DiskTooSmall.exit_code
    said = capsys.readouterr().err
    assert str(out) in said and "llama-imatrix ended with code 0, but wrote" in said and f"are free in {place}" in said
    assert "download" not in said and "not an imatrix" not in said
    assert out.read_bytes() == before


def test_llama_quantize_without_room_for_its_file(
    disk: Disk, testbed: Path, tools: Toolset, blind: None, capsys: pytest.CaptureFixture[str]
) -> None:
    place = disk(30 << 20)
    out = place / "q.gguf"
    command = ("quantize", testbed, *SMALL, "-o", out)
    assert apex(*command, "--policy", "compact") == 0
    before, manifest = out.read_bytes(), out.with_name("q.gguf.json").read_bytes()
    filled(place, but=5 << 20)
    capsys.readouterr()
    assert apex(*command, "--policy", "quality", "--force") == DiskTooSmall.exit_code
    said = capsys.readouterr().err
    assert f"{out}: the disk is full: " in said and f"free in {place}, after" in said
    assert out.read_bytes() == before and out.with_name("q.gguf.json").read_bytes() == manifest
    assert {path.name for path in place.iterdir()} == {"q.gguf", "q.gguf.json", "q.gguf.log", "filling"}


@pytest.mark.parametrize("option", ["--write-rules", "--write-text"])
def test_a_text(option: str, disk: Disk, testbed: Path, tools: Toolset, capsys: pytest.CaptureFixture[str]) -> None:
    place = disk(1 << 20)
    out = place / "out.txt"
    out.write_text("what was there")
    filled(place)
    verb = ("plan", "--policy", "compact") if option == "--write-rules" else ("calibrate",)
    assert apex(*verb, testbed, option, out, "--force") == DiskTooSmall.exit_code
    assert f"{out}: the disk is full" in capsys.readouterr().err
    assert out.read_text() == "what was there" and len(list(place.iterdir())) == 2


def test_results_of_an_evaluation(
    disk: Disk, testbed: Path, heldout: Path, tools: Toolset, blind: None, capsys: pytest.CaptureFixture[str]
) -> None:
    place = disk(1 << 20)
    results = place / "r.jsonl"
    command = (
        "evaluate",
        testbed,
        "--only",
        "perplexity",
        "--text",
        heldout / "chat.txt",
        "--results",
        results,
        "--threads",
        1,
    )
    assert apex(*command, "--set", "perplexity.chunks=2") == 0
    before = results.read_bytes()
    filled(place)
    capsys.readouterr()
    assert apex(*command, "--set", "perplexity.chunks=3") == DiskTooSmall.exit_code
    said = capsys.readouterr()
    assert f"{results}: the disk is full" in said.err
    assert "perplexity" in said.out, "what was measured is shown all the same"
    assert results.read_bytes() == before


def test_no_file_that_is_too_large_for_the_limit_of_the_shell(tmp_path: Path) -> None:
    """ulimit -f"""
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
    code += "from pathlib import Path; from apex_build.storage.outputs import whole_file\n"
    code += f"with whole_file(Path({str(tmp_path / 'out')!r})) as part: part.write_bytes(bytes(2000))"
    import sys

    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "DiskTooSmall" in ran.stderr and f"{tmp_path / 'out'}: a file may not be so large" in ran.stderr
    assert not list(tmp_path.iterdir())


# --- the mechanism ----------------------------------------------------------------------------------------------------
def test_a_file_is_on_the_disk_before_and_after_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync = __import__("os").fsync

    def watched(handle: int) -> None:
        done.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    monkeypatch.setattr("os.fsync", watched)
    with whole_file(tmp_path / "out") as part:
        part.write_text("x")
        assert not done
    assert len(done) == 2 and done[0].startswith(".out.") and done[1] == tmp_path.name
    done.clear()
    (tmp_path / "folder" / "below").mkdir(parents=True)
    (tmp_path / "folder" / "below" / "file").write_text("x")
    sync_folder(tmp_path / "folder")
    assert set(done) == {"folder", "below", "file"}


def test_an_error_of_something_else_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "out"):
        (tmp_path / "gone").read_bytes()
    with pytest.raises(PermissionError, match="mine"), whole_file(tmp_path / "out"):
        raise PermissionError(13, "no", "mine")
    (tmp_path / "part").write_text("x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputUnwritable, match="cannot be written"):
        put(tmp_path / "part", tmp_path / "file" / "out")
