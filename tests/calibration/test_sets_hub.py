"""Sets with data on the Hugging Face Hub: pinned, rejected, and in the formats of the built-in sets."""

from __future__ import annotations

import json
import os
import re
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from apex_runs import run_apex
from hub_server import COMMIT, NAME, serving

from apex_build.calibration.sets import CalibrationText, compose, load_set
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.model import read_model
from apex_build.plugins import load_plugins


@pytest.fixture(scope="module")
def model(testbed: Path) -> Model:
    return read_model(testbed, load_plugins().role_of)


def words(texts: Sequence[bytes]) -> list[int]:
    return [len(text.split()) for text in texts]


def composed(path: str, model: Model) -> CalibrationText:
    return compose(load_set(path), load_plugins().calibration_sources(), model, count=words)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """For a separate process, since the libraries read it on import."""
    given = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {**given, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    datasets = pytest.importorskip("datasets", reason="the extra hub has datasets")
    turns = [[{"role": "user", "content": f"How {n}?"}, {"role": "assistant", "content": "So."}] for n in range(7)]
    datasets.Dataset.from_list([{"messages": of} for of in turns]).to_parquet(tmp_path / "train.parquet")
    return {"README.md": b"# A set\n", "data/train-00000-of-00001.parquet": (tmp_path / "train.parquet").read_bytes()}


@pytest.fixture
def hub(environment: dict[str, str], files: dict[str, bytes]) -> Iterator[dict[str, str]]:
    """The environment, with the server's address."""
    with serving(files) as address:
        yield {**environment, "HF_ENDPOINT": address}


def written(folder: Path, *lines: str, dataset: str = NAME) -> Path:
    path = folder / "mine.toml"
    part = ['domain = "x"', 'source = "datasets"', f'dataset = "{dataset}"', *lines]
    path.write_text("# a comment\n[[part]]\n" + "\n".join(part) + "\n")
    return path


@pytest.mark.slow
def test_pinning_writes_the_revisions_that_the_hub_has(hub: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "pinned.toml"
    path = written(tmp_path, 'revision = "main"')
    missing = run_apex("calibration-sets", "pin", path, "-o", out, env=hub, code=50)
    assert "dataset some/set: the Hub has no revision main" in missing.stderr
    path = written(tmp_path)
    assert COMMIT in run_apex("calibration-sets", "pin", path, "-o", out, env=hub).stdout
    assert load_set(str(out)).parts[0].options == {"dataset": NAME, "revision": COMMIT}
    assert out.read_text().startswith("# a comment\n")


@pytest.mark.slow
def test_a_revision_or_a_dataset_that_does_not_exist(hub: dict[str, str], testbed: Path, tmp_path: Path) -> None:
    other = COMMIT[::-1]
    for dataset, said in ((NAME, f"the Hub has no revision {other}"), ("no/set", "not found on the Hub")):
        path = written(tmp_path, f'revision = "{other}"', dataset=dataset)
        given = ("calibrate", testbed, "--calibration-set", path, "--write-text", tmp_path / "text.txt")
        assert f"dataset {dataset}: {said}" in run_apex(*given, env=hub, code=50).stderr


@pytest.mark.slow
def test_what_is_cached_is_used_without_network_and_no_other_revision(
    environment: dict[str, str], files: dict[str, bytes], testbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "text.txt"

    def calibrate(*, revision: str = COMMIT, streaming: bool, env: dict[str, str], code: int = 0) -> str:
        out.unlink(missing_ok=True)
        path = written(tmp_path, f'revision = "{revision}"', f"streaming = {str(streaming).lower()}")
        return run_apex("calibrate", testbed, "--calibration-set", path, "--write-text", out, env=env, code=code).stderr

    with serving(files) as address:
        online = {**environment, "HF_ENDPOINT": address}
        calibrate(streaming=True, env=online)
        assert out.read_text().count("<|im_start|>user\nHow ") == 7
        offline = {**environment, "HF_HUB_OFFLINE": "1"}
        said = calibrate(streaming=True, env=offline, code=50)  # streamed rows are not kept
        assert "the Hub cannot be reached, and the cache lacks it" in said
        calibrate(streaming=False, env=online)
    for without in (online, offline):  # the server is gone now
        calibrate(streaming=True, env=without)
        assert out.read_text().count("<|im_start|>user\nHow ") == 7
        said = calibrate(revision=COMMIT[::-1], streaming=True, env=without, code=50)
        assert "the cache has another revision of it" in said


@pytest.mark.slow
def test_a_hub_that_never_answers_is_not_waited_for(
    environment: dict[str, str], files: dict[str, bytes], testbed: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        env = {**environment, "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        path = written(tmp_path, f'revision = "{COMMIT}"')
        given = ("calibrate", testbed, "--calibration-set", path, "--write-text", tmp_path / "text.txt")
        assert f"dataset {NAME}: the Hub cannot be reached" in run_apex(*given, env=env, code=50).stderr
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):  # asked once
            silent.accept()


@pytest.mark.slow
def test_a_stream_that_breaks_off_is_told(
    environment: dict[str, str], files: dict[str, bytes], testbed: Path, tmp_path: Path
) -> None:
    """The library retries for half a minute, not for two."""
    asked: list[str] = []
    with serving(files, breaks_off="train-00000-of-00001.parquet", requests=asked) as address:
        env = {**environment, "HF_ENDPOINT": address}
        given = (
            "--calibration-set",
            written(tmp_path, f'revision = "{COMMIT}"'),
            "--write-text",
            tmp_path / "text.txt",
        )
        assert f"dataset {NAME}: cannot be read: " in run_apex("calibrate", testbed, *given, env=env, code=50).stderr
    tries = sum(path.endswith(".parquet") for path in asked)
    assert tries < 20 and not (tmp_path / "text.txt").exists()


# What each built-in set takes from the Hub: its columns and their shapes, as the data sets' own pages give them.
_TURNS = [{"content": "How?", "role": "user"}, {"content": "So.", "role": "assistant"}]
_THOUGHT = [_TURNS[0], {"content": "<think>\nHm.\n</think>\n\nSo.", "role": "assistant"}]
_HERMES = [
    {"from": "system", "value": "You call functions."},
    {"from": "human", "value": "How?"},
    {"from": "gpt", "value": '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'},
    {"from": "tool", "value": '<tool_response>\n{"a": 1}\n</tool_response>'},
    {"from": "gpt", "value": "So."},
]
_TOOLS = json.dumps([{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}])
ROWS: dict[str, dict[str, Any]] = {
    "HuggingFaceH4/ultrachat_200k": {"prompt": "How?", "prompt_id": "a", "messages": _TURNS},
    "HuggingFaceTB/smoltalk": {"messages": _TURNS, "source": "a"},
    "ise-uiuc/Magicoder-OSS-Instruct-75K": {
        "lang": "python", "raw_index": 1, "index": 1, "seed": "x = 1", "openai_fingerprint": "", "problem": "How?",
        "solution": "So.",
    },
    "open-r1/OpenR1-Math-220k": {
        "problem": "How?", "solution": "So.", "answer": "1", "generations": ["a"], "messages": _THOUGHT,
    },
    "NousResearch/hermes-function-calling-v1": {
        "id": "a", "conversations": _HERMES, "tools": _TOOLS, "category": "a", "subcategory": "b", "task": "c",
    },
    "CohereLabs/aya_dataset": {
        "inputs": "Wie?", "targets": "So.", "language": "German", "language_code": "deu", "annotation_type": "a",
        "user_id": "b",
    },
    "wikimedia/wikipedia": {"id": "1", "url": "a", "title": "T", "text": "Ein Artikel."},
    "Salesforce/wikitext": {"text": " = Title = \n"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["apex-diverse", "multilingual", "wikitext"])
def test_built_in_sets_take_the_shapes_of_their_data(name: str, model: Model, tmp_path: Path) -> None:
    """With local data in the same columns: the real data cannot be fetched here."""
    datasets = pytest.importorskip("datasets")
    chosen = load_set(name)
    for number, part in enumerate(chosen.parts):
        row, folder = ROWS[part.options["dataset"]], tmp_path / f"set{number}"
        (folder / "data").mkdir(parents=True)
        many = [json.loads(json.dumps(row).replace("o.", f"o {number} {n}.").replace("Artikel", f"A {number} {n}"))
                for n in range(12)]  # fmt: skip
        split = part.options.get("split", "train")
        datasets.Dataset.from_list(many).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    toml = chosen.path.read_text()
    for number, part in enumerate(chosen.parts):
        toml = toml.replace(f'dataset = "{part.options["dataset"]}"', f'dataset = "set{number}"', 1)
        if "name" in part.options:
            toml = toml.replace(f'name = "{part.options["name"]}"\n', "", 1)
    (tmp_path / "local.toml").write_text(toml.replace("tokens = 1_", "tokens = 1"))
    text = composed(str(tmp_path / "local.toml"), model)
    assert Counter(part.domain for part in text.parts) == Counter(part.domain for part in chosen.parts)
    assert all(part.documents and part.licence and part.origin for part in text.parts)
    if name == "apex-diverse":
        assert b"<think>\nHm.\n</think>" in text.data and b'"name": "f"' in text.data


@pytest.mark.parametrize("name", ["apex-diverse", "multilingual", "wikitext"])
def test_built_in_sets_are_pinned(name: str) -> None:
    for part in load_set(name).parts:
        assert re.fullmatch("[0-9a-f]{40}", str(part.options["revision"])), part
