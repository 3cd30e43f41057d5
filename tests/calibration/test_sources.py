"""Sources: formats of public data sets, folders, and Hugging Face datasets through the real library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apex_build.errors import CalibrationSetInvalid
from apex_build.hookspecs import Document
from apex_build.plugins import load_plugins

datasets = pytest.importorskip("datasets", reason="the extra hub has datasets")
ROOT = Path(__file__).parents[2]
ASKED = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _no_cache_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def read(source: str, at: Path, /, **options: Any) -> list[Document]:
    return list(load_plugins().calibration_sources()[source].read(options, at))


def one(folder: Path, row: object, **options: Any) -> Document:
    (folder / "row.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = read("jsonl", folder, file="row.jsonl", **options)
    return found


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASKED},
        {"messages": json.dumps(ASKED)},
        {"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]},
        {"conversation": ASKED, "id": 7},
        {"prompt": "1 + 1?", "completion": "2"},
        {"prompt": ASKED[:1], "completion": ASKED[1:]},
        {"instruction": "1 + 1?", "input": "", "output": "2"},
        {"question": "1 + 1?", "answer": "2"},
        {"problem": "1 + 1?", "solution": "2"},
    ],
)
def test_shapes_of_public_sets_are_known(row: dict[str, Any], tmp_path: Path) -> None:
    assert list(one(tmp_path, row).messages) == ASKED


def test_instruction_with_input_and_system(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1, 1", "output": "2", "system": "Be brief."}
    roles = [(message["role"], message["content"]) for message in one(tmp_path, row).messages]
    assert roles == [("system", "Be brief."), ("user", "Add.\n\n1, 1"), ("assistant", "2")]


def test_tool_calls_and_tools_as_json_texts(tmp_path: Path) -> None:
    text = {"function": {"name": "add", "arguments": '{"a": 1}'}, "type": "function"}
    shapes = [[CALL], [text], json.dumps([CALL]), json.dumps([text]), [{"name": "add", "arguments": '{"a": 1}'}]]
    for calls in shapes:
        for tools in ([ADD], json.dumps([ADD]), [ADD["function"]]):
            messages = [ASKED[0], {"role": "assistant", "content": "", "tool_calls": calls}]
            found = one(tmp_path, {"messages": messages, "tools": tools})
            assert list(found.messages[1]["tool_calls"]) == [CALL] and list(found.tools) == [ADD]
    turns = [{"from": "human", "value": "?"}, {"from": "function_call", "value": json.dumps(CALL["function"])}]
    turns += [{"from": "observation", "value": "3"}]
    found = one(tmp_path, {"conversations": turns})
    assert [message["role"] for message in found.messages] == ["user", "assistant", "tool"]
    assert found.messages[1]["tool_calls"] == [CALL]


def test_reasoning_of_its_own_column_or_as_a_think_block(tmp_path: Path) -> None:
    told = {"role": "assistant", "content": "2", "reasoning_content": "I add."}
    block = {"role": "assistant", "content": "<think>\nI add.\n</think>\n\n2"}
    assert one(tmp_path, {"messages": [ASKED[0], block]}).messages[1] == told
    assert one(tmp_path, {"messages": [ASKED[0], told]}).messages[1] == told
    assert one(tmp_path, {"question": "?", "answer": "2", "reasoning": "I add."}).messages[1] == told
    empty = {"role": "assistant", "content": "<think>\n\n</think>\n\n2"}
    assert one(tmp_path, {"messages": [ASKED[0], empty]}).messages[1] == empty


def test_columns_say_what_is_where(tmp_path: Path) -> None:
    row = {"chat": ASKED, "functions_available": [ADD], "body": "x"}
    found = one(tmp_path, row, columns={"messages": "chat", "tools": "functions_available"})
    assert list(found.messages) == ASKED and list(found.tools) == [ADD]
    assert one(tmp_path, row, columns={"text": "body"}).text == "x"
    with pytest.raises(CalibrationSetInvalid, match=r"no column 'talk'; there are: chat, functions_available, body"):
        one(tmp_path, row, columns={"messages": "talk"})
    with pytest.raises(CalibrationSetInvalid, match="'columns' has no 'mesages'; a column can be taken for: messages"):
        one(tmp_path, row, columns={"mesages": "chat"})


def test_a_row_of_no_known_shape_says_its_columns(tmp_path: Path) -> None:
    with pytest.raises(CalibrationSetInvalid, match=r"row\.jsonl:1: .*its columns are: label \(int\), body") as caught:
        one(tmp_path, {"label": 1, "body": ["a"]})
    assert "conversations" in str(caught.value.hint) and "columns = " in str(caught.value.hint)


def test_a_message_without_role(tmp_path: Path) -> None:
    with pytest.raises(CalibrationSetInvalid, match=r"row\.jsonl:1: message 2 has no role: .* found content"):
        one(tmp_path, {"messages": [ASKED[0], {"content": "2"}]})
    with pytest.raises(CalibrationSetInvalid, match=r"message 1 \(user\): 'content' is '3', expected a text"):
        one(tmp_path, {"messages": [{"role": "user", "content": 3}]})


def test_a_folder_of_texts_rows_and_tables(tmp_path: Path) -> None:
    (tmp_path / "all" / ".git").mkdir(parents=True)
    (tmp_path / "all" / ".git" / "index").write_bytes(b"\0\1")
    (tmp_path / "all" / "a.txt").write_text("words")
    (tmp_path / "all" / "b.md").write_text("# A title\n" + "a line of it\n" * 1000)
    (tmp_path / "all" / "c.jsonl").write_text(json.dumps({"messages": ASKED}) + "\n")
    (tmp_path / "all" / "empty.txt").write_text("")
    datasets.Dataset.from_list([{"messages": ASKED, "tools": None}]).to_parquet(tmp_path / "all" / "d.parquet")
    found = read("files", tmp_path, folder="all")
    assert [one.text for one in found if one.origin == "a.txt"] == ["words"]
    assert len([one for one in found if one.origin == "b.md"]) == 3
    assert [list(one.messages) for one in found if one.messages] == [ASKED, ASKED]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", b"words\0\1\2", r"a\.txt: not a text: byte 5 is 0"),
        ("a.txt", b"\xff\xfewords", r"a\.txt: not UTF-8: byte 0 is 0xff"),
        ("a.jsonl", b"", r"a\.jsonl: the file is empty"),
        ("a.parquet", b"PAR1 broken", r"a\.parquet: not parquet that can be read: "),
        ("a.parquet", b"", r"a\.parquet: not parquet that can be read: "),
    ],
)
def test_an_empty_binary_or_broken_file(name: str, data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / name).write_bytes(data)
    with pytest.raises(CalibrationSetInvalid, match=said):
        read("files", tmp_path, folder="all")


def rows() -> Any:
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    return datasets.Dataset.from_list([{"messages": ASKED}, {"messages": [ASKED[0], call]}])


@pytest.mark.parametrize("form", ["parquet", "json", "arrow", "saved"])
@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_of_a_local_folder(form: str, streaming: bool, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    if form == "parquet":
        rows().to_parquet(folder / "train-00000-of-00001.parquet")
    elif form == "json":
        rows().to_json(folder / "train.jsonl")
    elif form == "arrow":
        rows().save_to_disk(tmp_path / "saved")
        (arrow,) = (tmp_path / "saved").glob("*.arrow")
        arrow.rename(folder / "train.arrow")
    else:
        datasets.DatasetDict({"train": rows()}).save_to_disk(folder)
    found = read("datasets", tmp_path, dataset="set", streaming=streaming)
    assert list(found[0].messages) == ASKED
    assert found[1].messages[1]["tool_calls"] == [CALL] and "content" not in found[1].messages[1]
    assert [one.origin for one in found] == ["set:1", "set:2"]
    with pytest.raises(CalibrationSetInvalid, match=r"set.*other"):
        read("datasets", tmp_path, dataset="set", split="other", streaming=streaming)


def test_column_as_it_was_before_columns(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list([{"body": "words", "talk": ASKED}]).to_parquet(tmp_path / "set" / "train.parquet")
    assert [one.text for one in read("datasets", tmp_path, dataset="set", column="body")] == ["words"]
    assert list(read("datasets", tmp_path, dataset="set", column="talk")[0].messages) == ASKED


@pytest.mark.parametrize("streaming", [True, False])
def test_a_broken_parquet_of_a_dataset(streaming: bool, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(CalibrationSetInvalid, match=r"dataset set: cannot be read: .*[Pp]arquet"):
        read("datasets", tmp_path, dataset="set", streaming=streaming)


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:7]])
def test_a_dataset_of_the_hub_is_pinned(revision: str | None, tmp_path: Path) -> None:
    with pytest.raises(CalibrationSetInvalid, match=r"some/set: not pinned: .*the 40 digits of a commit") as caught:
        read("datasets", tmp_path, dataset="some/set", **({"revision": revision} if revision else {}))
    assert "apex calibration-sets pin" in str(caught.value.hint)


CHILD = """
import sys, time
slept, sleep = [], time.sleep
time.sleep = lambda seconds: (slept.append(seconds), sleep(seconds))
from pathlib import Path
from apex_build.errors import CalibrationSetInvalid
from apex_build.plugins import load_plugins
read = load_plugins().calibration_sources()["datasets"].read
try:
    print(list(read({"dataset": "some/set", "revision": sys.argv[1]}, Path("."))))
except CalibrationSetInvalid as error:
    print(error.message, "|", error.hint)
print(f"slept {sum(slept):.0f} s")
"""


def child(folder: Path, *, revision: str = COMMIT, **environment: str) -> str:
    """In a separate process: the libraries read the environment on import."""
    given = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "home"), **environment}
    given = {name: value for name, value in given.items() if not name.lower().endswith("_proxy")}
    command = [sys.executable, "-c", CHILD, revision]
    ran = subprocess.run(command, env=given, capture_output=True, text=True, timeout=300, check=False)
    assert not ran.returncode, ran.stderr
    return ran.stdout


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_without_network_what_is_missing_is_named_at_once(environment: dict[str, str], tmp_path: Path) -> None:
    said = child(tmp_path, **environment)
    assert (
        f"dataset some/set: the Hub cannot be reached, and the cache lacks it (revision {COMMIT}, split train)" in said
    )
    assert "streaming = false" in said and "slept 0 s" in said
