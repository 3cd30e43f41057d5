"""Sets whose data is on the Hugging Face Hub: pinned, refused, and of the shapes that the built-in ones take."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from apex_runs import run_apex

from apex_build.calibration.sets import CalibrationText, compose, load_set
from apex_build.errors import CalibrationSetInvalid
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.model import read_model
from apex_build.plugins import load_plugins

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def model(testbed: Path) -> Model:
    return read_model(testbed, load_plugins().role_of)


def words(texts: Sequence[bytes]) -> list[int]:
    return [len(text.split()) for text in texts]


def composed(path: str, model: Model) -> CalibrationText:
    return compose(load_set(path), load_plugins().calibration_sources(), model, count=words)


class _Hub(BaseHTTPRequestHandler):
    """What the Hub answers about a dataset that it has, one that it lacks, and a revision that it lacks."""

    def do_GET(self) -> None:
        if self.path in ("/api/datasets/some/set", f"/api/datasets/some/set/revision/{COMMIT}"):
            self._answer(200, {"id": "some/set", "sha": COMMIT, "tags": [], "siblings": []})
        else:
            kind = "RevisionNotFound" if self.path.startswith("/api/datasets/some/set/") else "RepoNotFound"
            self._answer(404, {"error": "not found"}, {"X-Error-Code": kind})

    def _answer(self, code: int, value: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        for name, of in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, of)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The real client asks a server here, which answers as the Hub does."""
    pytest.importorskip("huggingface_hub")
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    for name, value in {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    yield address
    server.shutdown()
    thread.join()
    server.server_close()


def test_pinning_writes_the_revisions_that_the_hub_has(hub: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '# a comment\n[[part]]\ndomain = "x"\nsource = "datasets"\ndataset = "some/set"\nrevision = "main"\n'
    )
    out = tmp_path / "pinned.toml"
    missing = run_apex("calibration-sets", "pin", path, "-o", out, code=50)
    assert "dataset some/set: the Hub has no revision main" in missing.stderr
    path.write_text(path.read_text().replace('revision = "main"\n', ""))
    assert COMMIT in run_apex("calibration-sets", "pin", path, "-o", out).stdout
    assert load_set(str(out)).parts[0].options == {"dataset": "some/set", "revision": COMMIT}
    assert out.read_text().startswith("# a comment\n")


def test_a_revision_or_a_dataset_that_does_not_exist(hub: str, testbed: Path, tmp_path: Path) -> None:
    path, other = tmp_path / "mine.toml", COMMIT[::-1]
    for dataset, said in (("some/set", f"the Hub has no revision {other}"), ("no/set", "the Hub has no such dataset")):
        path.write_text(f'[[part]]\ndomain = "x"\nsource = "datasets"\ndataset = "{dataset}"\nrevision = "{other}"\n')
        ran = run_apex("calibrate", testbed, "--calibration-set", path, "--write-text", tmp_path / "text.txt", code=50)
        assert f"dataset {dataset}: {said}" in ran.stderr


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
    "CohereForAI/aya_dataset": {
        "inputs": "Wie?", "targets": "So.", "language": "German", "language_code": "deu", "annotation_type": "a",
        "user_id": "b",
    },
    "wikimedia/wikipedia": {"id": "1", "url": "a", "title": "T", "text": "Ein Artikel."},
    "Salesforce/wikitext": {"text": " = Title = \n"},
}  # fmt: skip


@pytest.mark.parametrize("name", ["apex-diverse", "multilingual", "wikitext"])
def test_built_in_sets_take_the_shapes_of_their_data(name: str, model: Model, tmp_path: Path) -> None:
    """On local copies of the columns: the data itself cannot be fetched here."""
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
def test_built_in_sets_are_refused_until_they_are_pinned(name: str, model: Model) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(CalibrationSetInvalid, match="not pinned: it has no 'revision'"):
        composed(name, model)
