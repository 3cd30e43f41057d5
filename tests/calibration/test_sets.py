"""Calibration sets: the built-in data, and the text made from a set."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from apex_runs import run_apex

from apex_build.calibration.sets import CalibrationText, compose, load_set, text_of_file
from apex_build.errors import CalibrationSetInvalid
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.model import read_model
from apex_build.places import data_root
from apex_build.plugins import load_plugins

DATA = data_root() / "calibration_sets" / "data"


@pytest.fixture(scope="module")
def model(testbed: Path) -> Model:
    return read_model(testbed, load_plugins().role_of)


def make(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", ["chat", "reasoning", "tool_calling"])
def test_embedded_dialogues_are_large_and_well_formed(name: str) -> None:
    path = DATA / f"{name}.jsonl"
    assert path.stat().st_size >= 40_000
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles[-1] == "assistant" and set(roles) <= {"system", "user", "assistant", "tool"}
        known = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row.get("tools", [])}
        for message in row["messages"]:
            for call in message.get("tool_calls", []):
                parameters = known[call["function"]["name"]]
                assert set(parameters.get("required", [])) <= set(call["function"]["arguments"])
    assert len({json.dumps(row) for row in rows}) == len(rows)


def test_the_default_set_holds_every_domain_from_the_start(model: Model) -> None:
    text = compose(load_set("default"), load_plugins().calibration_sources(), model)
    assert {part.domain for part in text.parts} == {"chat", "reasoning", "tool-calling", "code"}
    assert sum(part.n_bytes for part in text.parts) == len(text.data)
    for start in range(0, len(text.data) - 60_000, 60_000):
        piece = text.data[start : start + 60_000].decode(errors="ignore")
        assert "<think>" in piece and "<tool_call>" in piece and "<|im_start|>user" in piece and "def " in piece


@pytest.mark.slow
def test_the_text_is_the_same_each_time(model: Model) -> None:
    texts = [compose(load_set("default"), load_plugins().calibration_sources(), model).sha256 for _ in range(2)]
    assert texts[0] == texts[1]


def test_one_domain_alone(model: Model) -> None:
    text = compose(load_set("default"), load_plugins().calibration_sources(), model, domains=("code",))
    assert [part.domain for part in text.parts] == ["code"] and b"<|im_start|>" not in text.data
    with pytest.raises(CalibrationSetInvalid, match=r"there is no domain 'poetry'. There are: chat, code"):
        compose(load_set("default"), load_plugins().calibration_sources(), model, domains=("poetry",))


def test_sources_of_a_set_of_ones_own(model: Model, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("# Notes\n" + "a line of notes\n" * 1000)
    (tmp_path / "talk.jsonl").write_text(
        '{"text": "plain words"}\n\n{"messages": [{"role": "user", "content": "Grüße"}]}\n'
    )
    chosen = load_set(make(tmp_path, """
[[part]]
domain = "notes"
source = "files"
folder = "notes"
pattern = "*.md"
bytes = 9000
[[part]]
domain = "talk"
source = "jsonl"
file = "talk.jsonl"
"""))  # fmt: skip
    text = compose(chosen, load_plugins().calibration_sources(), model)
    notes, talk = text.parts
    assert notes.n_bytes <= 9000 and talk.documents == 2
    assert "plain words" in text.data.decode() and "<|im_start|>user\nGrüße<|im_end|>" in text.data.decode()


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("part = [", "not TOML"),
        ("", "expected at least one"),
        ("part = [1, 2]", "part 1 is 1, expected a table"),
        ('[[part]]\ndomain = "x"', "'source' is None"),
        ('[[part]]\ndomain = "x"\nsource = "jsonl"\nbytes = true', "'bytes' is True"),
        ('[[part]]\ndomain = "x"\nsource = "jsonl"\nbytes = -3', "'bytes' is -3"),
        (
            '[[part]]\ndomain = "x"\nsource = "nothing"',
            "there is no source 'nothing'.* There are: datasets, files, jsonl",
        ),
        ('[[part]]\ndomain = "x"\nsource = "jsonl"', r"mine\.toml: the part x \(jsonl\): .*needs 'file'"),
        ('[[part]]\ndomain = "x"\nsource = "files"\nfolder = "."\npattern = "/*"', "'pattern' is '/\\*'"),
        ('[[part]]\ndomain = "x"\nsource = "jsonl"\nfile = "gone.jsonl"', "gone.jsonl: cannot be read"),
        ('[[part]]\ndomain = "x"\nsource = "files"\nfolder = "."\npattern = "*.none"', "no file matches"),
    ],
)
def test_a_wrong_set_is_refused(toml: str, said: str, model: Model, tmp_path: Path) -> None:
    with pytest.raises(CalibrationSetInvalid, match=said):
        compose(load_set(make(tmp_path, toml)), load_plugins().calibration_sources(), model)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"messages": 3}', r"bad\.jsonl:2: expected an object with 'messages' or 'text'"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": 7}', r"bad\.jsonl:2: expected an object"),
        ('{"text": good}', r"bad\.jsonl:2: not JSON: Expecting value at column 10"),
        ('{"text": "half \\ud800"}', r"bad\.jsonl:2: '\\ud800' is not a character"),
    ],
)
def test_a_damaged_line_is_named(line: str, said: str, model: Model, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    chosen = load_set(make(tmp_path, '[[part]]\ndomain = "x"\nsource = "jsonl"\nfile = "bad.jsonl"'))
    with pytest.raises(CalibrationSetInvalid, match=said):
        compose(chosen, load_plugins().calibration_sources(), model)


def test_a_part_without_a_word_is_refused(model: Model, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    chosen = load_set(make(tmp_path, '[[part]]\ndomain = "x"\nsource = "jsonl"\nfile = "empty.jsonl"'))
    with pytest.raises(CalibrationSetInvalid, match="gave no text"):
        compose(chosen, load_plugins().calibration_sources(), model)
    (tmp_path / "empty.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    (tmp_path / "no.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(CalibrationSetInvalid, match="the chat template refused all of its 1 conversations"):
        compose(chosen, load_plugins().calibration_sources(), model, template_file=tmp_path / "no.jinja")


def test_a_domain_is_no_path(model: Model, tmp_path: Path) -> None:
    (tmp_path / "ok.jsonl").write_text('{"text": "plain words"}\n')
    chosen = load_set(make(tmp_path, '[[part]]\ndomain = "../a/b"\nsource = "jsonl"\nfile = "ok.jsonl"'))
    assert compose(chosen, load_plugins().calibration_sources(), model, domains=("../a/b",)).name == "mine-.._a_b.txt"


# What fine-tunes of these families carry, in short.
GEMMA = """{% for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate') }}{% endif %}
<start_of_turn>{{ m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}"""
CARELESS = "{% for m in messages %}[{{ m.role }}] {{ m.content + '!' }}{% endfor %}"  # fails where there is no content
TOOLS = (
    '{"messages": [{"role": "user", "content": "now?"}, {"role": "assistant", "content": null}, {"role": "tool", '
    '"content": "1"}]}'
)


def one_with_tools(model: Model, folder: Path, template: str, *, system: bool = False) -> CalibrationText:
    """The text of a set of two parts, one with tools."""
    (folder / "template.jinja").write_text(template)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    if system:
        messages.insert(0, {"role": "system", "content": "be good"})
    (folder / "talk.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (folder / "tools.jsonl").write_text(TOOLS + "\n")
    parts = "".join(f'[[part]]\ndomain="{name}"\nsource="jsonl"\nfile="{name}.jsonl"\n' for name in ("talk", "tools"))
    return compose(
        load_set(make(folder, parts)),
        load_plugins().calibration_sources(),
        model,
        template_file=folder / "template.jinja",
    )


@pytest.mark.parametrize(
    ("template", "words"), [(GEMMA, "Conversation roles must alternate"), (CARELESS, "UndefinedError")]
)
def test_a_template_that_knows_no_tools_costs_that_part_alone(
    template: str, words: str, model: Model, tmp_path: Path
) -> None:
    text = one_with_tools(model, tmp_path, template)
    assert [part.domain for part in text.parts] == ["talk"] and b"hello" in text.data
    (warning,) = text.warnings
    assert words in warning and "The part tools is left out; --domain talk does that without this warning" in warning


def test_a_system_message_goes_before_the_users_words_where_the_template_takes_none(
    model: Model, tmp_path: Path
) -> None:
    text = one_with_tools(model, tmp_path, GEMMA, system=True)
    assert b"user\nbe good\n\nhello<end_of_turn>" in text.data
    assert "1 conversations of the part talk" in text.warnings[0] and "'System role not supported'" in text.warnings[0]


def test_a_template_that_takes_nothing_is_quoted(model: Model, tmp_path: Path) -> None:
    with pytest.raises(CalibrationSetInvalid, match="refused all of its 1 conversations: 'not today'") as caught:
        one_with_tools(model, tmp_path, "{{ raise_exception('not today') }}")
    assert "--chat-template FILE" in str(caught.value.hint)


@pytest.mark.slow
def test_the_whole_default_set_with_a_template_that_knows_neither(testbed: Path, tmp_path: Path) -> None:
    """Found in fine-tunes of Gemma 2."""
    (tmp_path / "gemma.jinja").write_text(GEMMA)
    ran = run_apex(
        "calibrate", testbed, "--chat-template", tmp_path / "gemma.jinja", "--write-text", tmp_path / "text.txt"
    )
    assert "warning: " in ran.stderr and "the part tool-calling" in ran.stderr and "--domain chat" in ran.stderr
    assert (tmp_path / "text.txt").read_text().count("<start_of_turn>user") > 50


@pytest.mark.slow
def test_a_system_that_cannot_bound_a_template(testbed: Path, tmp_path: Path) -> None:
    """macOS has no sched_getaffinity and rejects the memory limit: do not blame the template."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, resource\ndel os.sched_getaffinity\n"
        "def refuse(*_): raise ValueError('current limit exceeds maximum limit')\nresource.setrlimit = refuse\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    ran = run_apex("calibrate", testbed, "--write-text", tmp_path / "text.txt", env=environment, code=81)
    assert "this system cannot limit the time and memory of a template: setrlimit" in ran.stderr
    assert "try:   apex-build runs on Linux" in ran.stderr and "chat template of" not in ran.stderr
    run_apex("inspect", testbed, env=environment)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("byts=3", "part 1 has no key 'byts'; near it: bytes"),
        ('fiel="talk.jsonl"', "part 1 has no key 'fiel'; near it: file"),
        ('pattern="*.py"', "part 1 has no key 'pattern'.*The source 'jsonl' takes: file"),
    ],
)
def test_a_key_that_no_part_has(line: str, said: str, model: Model, tmp_path: Path) -> None:
    (tmp_path / "talk.jsonl").write_text('{"text": "hello"}\n')
    chosen = load_set(make(tmp_path, f'[[part]]\ndomain="talk"\nsource="jsonl"\nfile="talk.jsonl"\n{line}\n'))
    with pytest.raises(CalibrationSetInvalid, match=said):
        compose(chosen, load_plugins().calibration_sources(), model)


def test_an_unknown_set_lists_the_known_ones() -> None:
    with pytest.raises(CalibrationSetInvalid, match="there is no calibration set 'defualt'; near it: default"):
        load_set("defualt")


def test_a_text_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "größe.txt"
    path.write_text("Wörter")
    assert text_of_file(path).data == "Wörter".encode()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CalibrationSetInvalid, match="not UTF-8: byte 0 is 0xff"):
        text_of_file(path)
    path.write_text(" \n")
    with pytest.raises(CalibrationSetInvalid, match="empty"):
        text_of_file(path)
    with pytest.raises(CalibrationSetInvalid, match="cannot be read"):
        text_of_file(tmp_path / "gone")
