"""Builds as files: packed, and imported on another machine."""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import shutil
from pathlib import Path

import pytest
import zstandard
from apex_runs import run_apex
from click.testing import CliRunner
from fake_programs import nvidia_smi
from packed_builds import Origin, contents, edited, manifested
from tiny_project import TINY

from apex_build.cli import apex
from apex_build.errors import BuildMissing, DiskTooSmall, OutputUnwritable
from apex_build.native.run import run_tool
from apex_build.native.toolset import Toolset, open_build
from apex_build.source.pins import load_pin
from apex_build.source.tree import require_tree
from apex_build.storage.digests import sha256_file
from apex_build.storage.json_files import read_json, write_json
from apex_build.toolchain.backends import BACKENDS, TOOLS
from apex_build.toolchain.build import cache as build_cache
from apex_build.toolchain.build.run import build, plan_build
from apex_build.toolchain.packed import packing
from apex_build.toolchain.packed.licences import licence_texts
from apex_build.toolchain.packed.packing import MANIFEST, SUMS, key_of, pack
from apex_build.toolchain.packed.unpacking import take_in


@pytest.fixture
def source(origin: Origin) -> Path:
    return origin.source


@pytest.fixture
def toolset(origin: Origin, cache: Path) -> Toolset:
    """The build, in a cache used only by this test."""
    shutil.copytree(origin.cache / "builds", cache / "builds", symlinks=True)
    (root,) = (path for path in (cache / "builds").iterdir())
    return open_build(root)


def test_there_and_back(packed: Path, toolset: Toolset, source: Path, elsewhere: Path, tmp_path: Path) -> None:
    taken = take_in(packed)
    assert not taken.reused
    assert taken.toolset.root == elsewhere / "builds" / toolset.root.name
    assert run_tool([taken.toolset.tool("tool")]).lines == ("42",)
    assert build_cache.verify(taken.toolset) == 5
    assert (taken.toolset.bin / "libpart.so.1").readlink() == Path("libpart.so.1.2")
    assert (taken.toolset.root / "licenses/llama.cpp/LICENSE").read_text() == "Do as you please.\n"
    assert [item.key for item in build_cache.all_builds()] == [toolset.root.name]
    assert take_in(packed).reused
    again = pack(taken.toolset, tmp_path / "no source", tmp_path / "again.tar.zst")  # the licences have come along
    assert again.sha256 == sha256_file(packed)


def test_the_same_build_gives_the_same_bytes(packed: Path, toolset: Toolset, source: Path, tmp_path: Path) -> None:
    assert pack(toolset, source, tmp_path / "second.tar.zst").sha256 == sha256_file(packed)
    files = contents(packed)
    assert list(files)[:2] == [SUMS, MANIFEST]
    listed = {name: digest for digest, name in (line.split("  ") for line in files[SUMS].decode().splitlines())}
    assert listed == {name: hashlib.sha256(content).hexdigest() for name, content in files.items() if name != SUMS}


def test_it_runs_when_it_is_unpacked_by_hand(packed: Path, tmp_path: Path) -> None:
    for name, content in contents(packed).items():
        (tmp_path / "hand" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hand" / name).write_bytes(content)
    tool = tmp_path / "hand/bin/tool"
    tool.chmod(0o755)
    assert run_tool([tool]).lines == ("42",)


def test_the_key_in_a_manifest_can_be_computed_again(toolset: Toolset, source: Path) -> None:
    """Manifest keys that build.py adds and inputs of the build's key are told apart by name."""
    assert key_of(toolset.manifest) == toolset.manifest["key"]
    plan = plan_build(source, TINY)
    native = build(plan).toolset
    assert key_of(native.manifest) == native.manifest["key"] == plan.key != toolset.manifest["key"]


def test_places_that_cannot_be_packed_to(toolset: Toolset, source: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputUnwritable, match=r"expected a name that ends with \.tar\.zst"):
        pack(toolset, source, tmp_path / "model.gguf")
    with pytest.raises(OutputUnwritable, match="no such folder"):
        pack(toolset, source, tmp_path / "nowhere" / "x.tar.zst")
    assert sorted(tmp_path.iterdir()) == before


def test_no_file_but_a_packed_build_is_replaced(packed: Path, toolset: Toolset, source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.tar.zst"
    for content in (b"", b"precious", zstandard.compress(b"precious"), packed.read_bytes()[:100]):
        mine.write_bytes(content)
        with pytest.raises(OutputUnwritable, match="exists and is not a packed build"):
            pack(toolset, source, mine)
        assert mine.read_bytes() == content
    mine.unlink()
    tool = toolset.tool("tool")
    mine.symlink_to(tool)
    with pytest.raises(OutputUnwritable, match="exists and is not a packed build"):
        pack(toolset, source, mine)
    mine.unlink()
    mine.write_bytes(packed.read_bytes())
    assert pack(toolset, source, mine).sha256 == sha256_file(packed)
    said = CliRunner().invoke(apex, ["build", "--backend", "cpu", "--export", str(tmp_path)])
    assert said.exit_code != 0


def test_a_disk_without_room_for_the_packed_build(
    toolset: Toolset, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(DiskTooSmall, match=rf"{tmp_path}: 0\.0 MB free, expected .* the build .*, unpacked, takes"):
        pack(toolset, source, tmp_path / "x.tar.zst")
    assert not (tmp_path / "x.tar.zst").exists()


def test_a_damaged_build_is_not_packed(toolset: Toolset, source: Path, tmp_path: Path) -> None:
    tool = toolset.tool("tool")
    content = bytearray(tool.read_bytes())
    content[-1] ^= 1
    tool.write_bytes(content)
    with pytest.raises(BuildMissing, match=r"were changed since the build: bin/tool"):
        pack(toolset, source, tmp_path / "x.tar.zst")
    assert not list(tmp_path.glob("*x.tar.zst*"))


def test_a_failure_while_packing_keeps_the_file_that_was_there(
    packed: Path, toolset: Toolset, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = packed.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(packing, "_write", full)
    with pytest.raises(DiskTooSmall):
        pack(toolset, source, packed)
    assert packed.read_bytes() == before
    assert not list(packed.parent.glob(".*.part"))


@pytest.fixture
def with_runtime(toolset: Toolset) -> Toolset:
    """The build with one of NVIDIA's libraries, as recorded in a CUDA build's manifest."""
    manifest = copy.deepcopy(read_json(toolset.root / MANIFEST))
    for name, text, more in (
        ("bin/libcudart.so.13", b"NVIDIA's", {"part": "cuda-runtime"}),
        ("licenses/nvidia-cuda-runtime/License.txt", b"End User License Agreement", {}),
    ):
        path = toolset.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
        manifest["files"][name] = {"sha256": hashlib.sha256(text).hexdigest(), "size": len(text), **more}
    identity = {
        "origin": "pypi",
        "version": "13.0.88",
        "packages": {"nvidia-cublas": {"version": "13.1", "sha256": "0"}},
    }
    manifest["cuda"] = identity | {"architectures": ["121a-real"], "gpus": ["dgx-spark"], "device_code": {}}
    manifest["from"]["cuda"] = identity
    manifest["key"] = key_of(manifest)
    write_json(toolset.root / MANIFEST, manifest)
    root = toolset.root.rename(toolset.root.with_name(manifest["key"]))
    return open_build(root)


def test_with_nvidias_libraries_and_their_licence(
    with_runtime: Toolset, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pack(with_runtime, source, tmp_path / "whole.tar.zst")
    assert whole.left_out == ()
    assert {"bin/libcudart.so.13", "licenses/nvidia-cuda-runtime/License.txt"} <= set(contents(whole.path))
    monkeypatch.setenv("APEX_CACHE_DIR", str(tmp_path / "another machine"))
    nvidia_smi(tmp_path / "bin", monkeypatch, ["NVIDIA GB10, 12.1, [N/A], 580.1", "NVIDIA L4, 8.9, 23034, 580.1"])
    said = CliRunner().invoke(apex, ["build", "--import", str(whole.path)]).stdout
    assert (
        "it has code for GPUs of 121a-real\nbut none for NVIDIA L4, which needs 89-real" in said and "GB10" not in said
    )
    taken = take_in(whole.path)
    assert taken.left_out == () and taken.toolset.manifest["files"]["bin/libcudart.so.13"]["part"] == "cuda-runtime"


def test_without_nvidias_libraries(
    with_runtime: Toolset, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That makes it another build: it must not pass for the complete one."""
    small = pack(with_runtime, source, tmp_path / "small.tar.zst", cuda_runtime=False)
    assert small.left_out == ("libcudart.so.13",)
    assert "bin/libcudart.so.13" not in contents(small.path)
    assert small.manifest["key"] != with_runtime.manifest["key"]
    monkeypatch.setenv("APEX_CACHE_DIR", str(tmp_path / "another machine"))
    ran = CliRunner().invoke(apex, ["build", "--import", str(small.path)])
    assert ran.exit_code == 0, ran.output
    assert "not included, and needed from this machine for its GPU: libcudart.so.13" in ran.stdout
    assert build_cache.look_up(str(with_runtime.manifest["key"])) is None
    taken = take_in(small.path)
    assert taken.reused and taken.left_out == ("libcudart.so.13",)
    assert pack(taken.toolset, source, tmp_path / "again.tar.zst").sha256 == small.sha256


def test_nvidias_libraries_without_their_licence(with_runtime: Toolset, source: Path, tmp_path: Path) -> None:
    manifest = read_json(with_runtime.root / MANIFEST)
    del manifest["files"]["licenses/nvidia-cuda-runtime/License.txt"]
    write_json(with_runtime.root / MANIFEST, manifest)
    with pytest.raises(BuildMissing, match=r"holds bin/libcudart\.so\.13 without NVIDIA's licence") as caught:
        pack(open_build(with_runtime.root), source, tmp_path / "x.tar.zst")
    assert "--no-cuda-runtime" in str(caught.value.hint)
    assert not (tmp_path / "x.tar.zst").exists()


def test_the_command_line(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ensure_source", "require_tree"):
        monkeypatch.setattr(f"apex_build.cli.build.{name}", lambda *_: source)
    monkeypatch.setitem(BACKENDS, "cpu", TINY.__class__("cpu", {}, TINY.targets))
    run = CliRunner().invoke
    out = tmp_path / "tools.tar.zst"
    done = run(apex, ["build", "--backend", "cpu", "--export", str(out)])
    assert done.exit_code == 0, done.output
    assert f"{out}: 5 files, " in done.stdout and f"sha256 {sha256_file(out)}" in done.stdout
    assert "needs every instruction set of this CPU; --no-native" in done.stdout
    exported = json.loads(run(apex, ["build", "--backend", "cpu", "--export", str(out), "--json"]).stdout)["exported"]
    assert exported == {"path": str(out), "sha256": sha256_file(out), "size": out.stat().st_size}

    monkeypatch.setenv("APEX_CACHE_DIR", str(tmp_path / "second"))
    done = run(apex, ["build", "--import", str(out)])
    assert "verified, tried and installed" in done.stdout and "APEX_TOOLS=" in done.stdout
    assert not list((tmp_path / "second" / "builds").glob("current-*"))
    taken = json.loads(run(apex, ["build", "--import", str(out), "--make-current", "--json"]).stdout)
    assert taken["reused"] and Path(taken["root"]).parent == tmp_path / "second" / "builds"
    (listed,) = json.loads(run(apex, ["build", "--list", "--json"]).stdout)
    assert listed["current"]
    assert run(apex, ["build", "--verify"]).stdout.startswith("5 files of ")


@pytest.mark.parametrize(
    "given", [("--list", "--verify"), ("--import", "x", "--export", "x.tar.zst"), ("--make-current",)]
)
def test_options_that_do_not_go_together(given: tuple[str, ...]) -> None:
    assert CliRunner().invoke(apex, ["build", *given]).exit_code == 2


def test_the_real_tools_on_another_machine(tools: Toolset, cache: Path, tmp_path: Path) -> None:
    if not tools.manifest:
        pytest.skip("APEX_TOOLS names a build that is not ours")
    source = require_tree(load_pin())
    out = pack(tools, source, tmp_path / "tools.tar.zst").path
    texts = contents(out)
    assert b"MIT License" in texts["licenses/llama.cpp/LICENSE"]
    assert (
        b"Mozilla Foundation" in texts["licenses/llama.cpp/NOTICES"]
        and b"Sean Barrett" in texts["licenses/llama.cpp/NOTICES"]
    )
    assert "licenses/llama.cpp/vendor/cpp-httplib/LICENSE" in licence_texts(source)
    run_apex("build", "--import", out, "--make-current")  # into the cache of this test, which is empty
    run_apex("build", "--verify")
    root = cache / "builds" / tools.root.name
    ran = run_tool([root / "bin" / "llama-quantize", "--help"], check=False)
    assert any(line.startswith("usage: ") for line in ran.lines)
    for name in TOOLS:
        assert sha256_file(root / "bin" / name) == sha256_file(tools.tool(name))
    foreign = edited(out, manifested(host="aarch64" if platform.machine() != "aarch64" else "x86_64"))
    shutil.rmtree(root)
    ran_ = run_apex("build", "--import", foreign, code=27)
    assert "was built for" in ran_.stderr and not root.exists()
