"""`apex quantize --split-size`: shards with the same content, and models that are already split."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from apex_runs import SMALL, run_apex

from apex_build.errors import ParameterUnknown, VerificationFailed
from apex_build.gguf_model.header import read_header
from apex_build.native.run import run_tool
from apex_build.native.toolset import Toolset
from apex_build.quantization import split as splitting
from apex_build.storage.artifacts import Artifact
from apex_build.storage.manifest import QUANTIZED, read_manifest

COMPACT = ("--policy", "compact", *SMALL)


def test_shards_are_whole_and_used_again(testbed: Path, tools: Toolset, tmp_path: Path) -> None:
    ran = run_apex("quantize", testbed, *COMPACT, "-o", tmp_path / "x.gguf", "--split-size", "4M", "--json")
    (one,) = json.loads(ran.stdout)
    shards = sorted(path.name for path in tmp_path.glob("*.gguf"))
    assert len(shards) >= 3 and shards == [f"x-{n:05}-of-{len(shards):05}.gguf" for n in range(1, len(shards) + 1)]
    assert one["path"] == str(tmp_path / shards[0]) and shards[0] in one["run"]
    assert all((tmp_path / name).stat().st_size < 8e6 for name in shards)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*shards, "x.gguf.json", "x.gguf.log"])
    manifest = json.loads((tmp_path / "x.gguf.json").read_text())
    assert [shard["name"] for shard in manifest["shards"]] == shards and manifest["split_size"] == "4M"
    run_apex("quantize", testbed, *COMPACT, "-o", tmp_path / "y.gguf")
    merged = tmp_path / "merged.gguf"
    command = [tools.tool("llama-gguf-split"), "--merge", tmp_path / shards[0], merged]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    ours, whole = read_header(merged), read_header(tmp_path / "y.gguf")
    data = [path.read_bytes()[header.data_offset :] for path, header in ((merged, ours), (tmp_path / "y.gguf", whole))]
    assert data[0] == data[1]
    before = (tmp_path / shards[0]).stat().st_mtime_ns
    (again,) = json.loads(
        run_apex("quantize", testbed, *COMPACT, "-o", tmp_path / "x.gguf", "--split-size", "4m", "--json").stdout
    )
    assert again["reused"] is True and (tmp_path / shards[0]).stat().st_mtime_ns == before
    ran = run_apex("quantize", testbed, *COMPACT, "-o", tmp_path / "x.gguf", "--split-size", "5M", code=71)
    assert "exists and was made from something else" in ran.stderr
    run_apex("quantize", testbed, *COMPACT, "-o", tmp_path / "x.gguf", "--split-size", "5M", "--force")
    assert len(list(tmp_path.glob("x-*.gguf"))) < len(shards), "shards of the other count are gone"


def test_a_model_that_is_split_already(testbed: Path, tools: Toolset, tmp_path: Path) -> None:
    command = [tools.tool("llama-gguf-split"), "--split", "--split-max-size", "12M", testbed, tmp_path / "in-f16"]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    shards = sorted(tmp_path.glob("in-f16-*.gguf"))
    assert len(shards) >= 3
    (tmp_path / "out").mkdir()
    run_apex("quantize", shards[1], *COMPACT, "-o", tmp_path / "out")
    run_apex("quantize", testbed, *COMPACT, "-o", tmp_path / "whole.gguf")
    (out,) = (tmp_path / "out").glob("*.gguf")
    assert out.name.startswith("in-") and "_COMPACTX" in out.name, "of no shard"
    of_shards, of_whole = read_header(out), read_header(tmp_path / "whole.gguf")
    assert {t.name: (t.type, t.n_bytes) for t in of_shards.tensors} == {
        t.name: (t.type, t.n_bytes) for t in of_whole.tensors
    }
    assert "split.count" not in of_shards.metadata


def test_small_enough_stays_whole(testbed: Path, tools: Toolset, tmp_path: Path) -> None:
    run_apex("quantize", testbed, *COMPACT, "-o", tmp_path / "x.gguf", "--split-size", "40G")
    assert [path.name for path in tmp_path.glob("*.gguf")] == ["x.gguf"]


@pytest.mark.parametrize("text", ["40", "4K", "G", "0G", "-1G", "4.5G", "40GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ParameterUnknown, match="expected a number of M or G"):
        splitting.parse_size(text)


def test_shards_that_are_not_the_same_are_refused(
    testbed: Path, tools: Toolset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_apex("quantize", testbed, *COMPACT, "-o", tmp_path / "x.gguf")
    before = sorted(path.name for path in tmp_path.iterdir())
    real = run_tool

    def damaging(*arguments: object, **options: object) -> object:
        done = real(*arguments, **options)  # type: ignore[arg-type]
        last = max(Path(str(options["cwd"])).glob("*.gguf"))
        data = bytearray(last.read_bytes())
        data[-40] ^= 1
        last.write_bytes(data)
        return done

    monkeypatch.setattr(splitting, "run_tool", damaging)
    made = read_manifest(tmp_path / "x.gguf.json")
    assert made is not None
    artifact = Artifact(tmp_path / "x.gguf", QUANTIZED, made.parts)
    with pytest.raises(VerificationFailed, match="differs from"):
        splitting.split(artifact, "4M", tools)
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "the whole file is still there, and no shard"
