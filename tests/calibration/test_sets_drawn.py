"""Which documents of a set are used: weights in tokens, duplicates, held-out text; and `apex calibration-sets`."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf_edit
import pytest
from apex_runs import run_apex
from waiting import until

from apex_build.calibration.sets import CalibrationText, compose, load_set
from apex_build.errors import CalibrationSetInvalid, LoadFailed
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.model import read_model
from apex_build.native.token_counts import count_tokens
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins

WORDS = [f"w{n}" for n in range(20)]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def model(testbed: Path) -> Model:
    return read_model(testbed, load_plugins().role_of)


def words(texts: Sequence[bytes]) -> list[int]:
    return [len(text.split()) for text in texts]


def jsonl(path: Path, n: int, length: int = 50, first: int = 0) -> None:
    """`n` texts of `length` words each, no two alike."""
    lines = []
    for number in range(first, first + n):
        text = [WORDS[(number * 7 + at * (number % 5 + 1)) % len(WORDS)] + str(number) for at in range(length)]
        lines.append(json.dumps({"text": " ".join(text)}))
    path.write_text("\n".join(lines) + "\n")


def make(folder: Path, head: str, **weights: object) -> str:
    """A set with a part for each name; its texts are in NAME.jsonl."""
    parts = [f'[[part]]\ndomain="{name}"\nsource="jsonl"\nfile="{name}.jsonl"\n{of}\n' for name, of in weights.items()]
    path = folder / "mine.toml"
    path.write_text("\n".join([head, *parts]))
    return str(path)


def composed(path: str, model: Model, **options: Any) -> CalibrationText:
    return compose(load_set(path), load_plugins().calibration_sources(), model, **{"count": words, **options})


def test_weights_are_in_tokens(model: Model, tmp_path: Path) -> None:
    jsonl(tmp_path / "short.jsonl", 300, 10)
    jsonl(tmp_path / "long.jsonl", 40, 100, first=1000)
    path = make(tmp_path, "tokens = 2000", short="weight = 3", long="weight = 1")
    text = composed(path, model)
    assert {part.domain: part.tokens for part in text.parts} == {"short": 1500, "long": 500}
    assert text.tokens == 2000 and not text.warnings


def test_without_a_total_the_scarcest_part_decides(model: Model, tmp_path: Path) -> None:
    jsonl(tmp_path / "few.jsonl", 10, 100)
    jsonl(tmp_path / "many.jsonl", 100, 100, first=1000)
    text = composed(make(tmp_path, "", few="weight = 1", many="weight = 2"), model)
    assert [part.tokens for part in text.parts] == [1000, 2000]


def test_a_source_that_has_too_little_is_told(model: Model, tmp_path: Path) -> None:
    jsonl(tmp_path / "few.jsonl", 10, 100)
    jsonl(tmp_path / "many.jsonl", 100, 100, first=1000)
    text = composed(make(tmp_path, "tokens = 4000", few="weight = 1", many="weight = 1"), model)
    assert text.warnings == ("the part few has 1000 tokens, and its weight asks for 2000",)


def test_the_seed_decides_the_order_and_gives_the_same_each_time(model: Model, tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", 50)
    texts = [composed(make(tmp_path, f"seed = {seed}\ntokens = 500", a="weight = 1"), model) for seed in (1, 1, 2)]
    assert texts[0].sha256 == texts[1].sha256 != texts[2].sha256


def test_the_same_text_is_taken_once_and_nearly_the_same_if_asked(model: Model, tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    jsonl(tmp_path / "a.jsonl", 5, 200)
    rows = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    near = rows[1].rsplit(" ", 1)[0] + " other"
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in (rows[0], near, "new words"))
    )
    plain = composed(make(tmp_path, "", a="", b=""), model)
    assert [(part.documents, part.duplicates, part.near_duplicates) for part in plain.parts] == [(5, 0, 0), (2, 1, 0)]
    asked = composed(make(tmp_path, "near_duplicates = 0.8", a="", b=""), model)
    assert [(part.documents, part.duplicates, part.near_duplicates) for part in asked.parts] == [(5, 0, 0), (1, 1, 1)]


def test_what_is_held_out_is_not_calibrated_on_and_stays_when_the_set_grows(model: Model, tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", 200, 20)
    path = make(tmp_path, "heldout = 0.1", a="")
    before = composed(path, model)
    (held,) = before.heldout
    assert 8 <= held.documents <= 35 and held.documents + before.parts[0].documents == 200
    apart = set(held.data.split(b"\n\n")) - {b""}
    assert not apart & set(before.data.split(b"\n\n"))
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": "one text more"}\n')
    assert apart <= set(composed(path, model).heldout[0].data.split(b"\n\n"))
    assert not composed(make(tmp_path, "", a=""), model).heldout


@pytest.mark.parametrize(
    ("head", "part", "said"),
    [
        ("", "weight = 0", r"part 1: 'weight' is 0, expected a number above 0"),
        ("", "weight = -1.5", r"part 1: 'weight' is -1\.5"),
        ("", "weight = nan", r"part 1: 'weight' is nan"),
        ("", "weight = 1\nbytes = 9", r"part 1 has 'bytes' and 'weight', expected one of them"),
        ("", "wieght = 1", r"part 1 has no key 'wieght'; near it: weight"),
        ("tokns = 4", "", r"a set has no key 'tokns'; near it: tokens"),
        ("tokens = 4", "", r"'tokens' is given, and no part has a 'weight'"),
        ("tokens = 0", "weight = 1", r"'tokens' is 0, expected a whole number from 1"),
        ("seed = 1.5", "", r"'seed' is 1\.5"),
        ("heldout = 1", "", r"'heldout' is 1, expected a number between 0 and 1"),
        ("near_duplicates = true", "", r"'near_duplicates' is True"),
    ],
)
def test_a_wrong_number_or_key(head: str, part: str, said: str, model: Model, tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", 5)
    with pytest.raises(CalibrationSetInvalid, match=said):
        composed(make(tmp_path, head, a=part), model)


def test_a_wrong_key_of_the_last_part_is_told_before_the_first_is_read(model: Model, tmp_path: Path) -> None:
    with pytest.raises(CalibrationSetInvalid, match="part 2 has no key 'fil'; near it: file"):
        composed(make(tmp_path, "", gone="", b='fil = "x"'), model)


def test_weights_in_some_parts_and_a_missing_domain(model: Model, tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", 5)
    with pytest.raises(CalibrationSetInvalid, match="part 2 has no 'weight', and others have"):
        composed(make(tmp_path, "", a="weight = 1", b=""), model)
    (tmp_path / "mine.toml").write_text('[[part]]\nsource = "jsonl"\nfile = "a.jsonl"\n')
    with pytest.raises(CalibrationSetInvalid, match=r"mine\.toml: part 1: 'domain' is None, expected a text"):
        load_set(str(tmp_path / "mine.toml"))


def test_the_beginning_of_text_is_not_written_twice(model: Model, tmp_path: Path) -> None:
    """The tools add it to a text themselves."""
    end = model.metadata["tokenizer.ggml.eos_token_id"]
    assert isinstance(end, int)
    (tmp_path / "bos.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %};")
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    (tmp_path / "b.jsonl").write_text('{"messages": [{"role": "user", "content": "again"}]}\n')
    path = make(tmp_path, "", a="", b="")
    assert composed(path, model, template_file=tmp_path / "bos.jinja").data == b"hello;again;"  # it has none
    given = {**model.metadata, "tokenizer.ggml.bos_token_id": end}
    for adds, expected in ((None, b"hello;<|im_end|>again;"), (False, b"<|im_end|>hello;<|im_end|>again;")):
        changed = Model(**{**vars(model), "metadata": {**given, "tokenizer.ggml.add_bos_token": adds}})
        assert composed(path, changed, template_file=tmp_path / "bos.jinja").data == expected


def test_llama_imatrix_reads_one_beginning_of_text(tools: Toolset, testbed: Path, tmp_path: Path) -> None:
    """A model that wants one, and a template that writes it too: as many tokens as with a template that does not."""
    end = 2041  # <|im_end|>
    begins = {"tokenizer.ggml.add_bos_token": True}
    model = gguf_edit.copy(testbed, tmp_path / "m.gguf", keys=begins, new={"tokenizer.ggml.bos_token_id": end})
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "hello and again"}]}\n')
    path = make(tmp_path, "", a="")
    texts = {}
    for name, begin in (("plain", ""), ("begins", "{{ bos_token }}")):
        template, text = tmp_path / f"{name}.jinja", tmp_path / f"{name}.txt"
        template.write_text(begin + "{% for m in messages %}{{ m.content }}{% endfor %};")
        common = ["--calibration-set", path, "--chat-template", template]
        run_apex("calibrate", model, *common, "--write-text", text)
        texts[name] = text.read_bytes()
    texts["twice"] = b"<|im_end|>" + texts["plain"]  # what the template itself writes
    read = {name: tokens_read(tools, model, text, tmp_path) for name, text in texts.items()}
    (alone,) = count_tokens(tools, model, [texts["plain"]])
    assert read == {"plain": alone + 1, "begins": alone + 1, "twice": alone + 2}


def tokens_read(tools: Toolset, model: Path, text: bytes, folder: Path) -> int:
    """By llama-imatrix, which says it of a text that is too short for it."""
    (folder / "text.txt").write_bytes(text)
    command = [tools.tool("llama-imatrix"), "-m", model, "-f", folder / "text.txt", "-o", folder / "x.gguf"]
    ran = subprocess.run([*map(str, command), "-c", "512", "--parse-special"], capture_output=True, text=True)
    (found,) = re.findall(r"tokenizes to only (\d+) tokens", ran.stdout + ran.stderr)
    return int(found)


def test_a_template_falls_back_only_when_it_is_asked_to(model: Model, tmp_path: Path) -> None:
    (tmp_path / "no.jinja").write_text("{{ raise_exception('not today') if messages[1] }}{{ messages[0].content }}")
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    one = {"role": "user", "content": "hello"}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": of}) + "\n" for of in ([one], [one, one])))
    path = make(tmp_path, "", a="")
    left = composed(path, model, template_file=tmp_path / "no.jinja")
    assert left.data == b"hello" and "'not today', at line 1 of the template" in left.warnings[0]
    taken = composed(path, model, template_file=tmp_path / "no.jinja", fallback=tmp_path / "plain.jinja")
    assert b"[user] hello[user] hello" in taken.data and not taken.parts[0].refused
    (warning,) = taken.warnings
    assert "1 conversations of the part a are written with " in warning and "plain.jinja" in warning


def test_tokens_are_counted_by_the_models_own_tokenizer(tools: Toolset, testbed: Path, tmp_path: Path) -> None:
    assert count_tokens(tools, testbed, [b"<|im_start|><|im_end|>", b"", b"hello world"])[:2] == [2, 0]

    (tmp_path / "bad.gguf").write_bytes(b"GGUF but no more")
    with pytest.raises(LoadFailed, match=r"bad\.gguf: its vocabulary cannot be loaded"):
        count_tokens(tools, tmp_path / "bad.gguf", [b"a"])


@pytest.fixture
def three_sources(tmp_path: Path) -> Path:
    """A set made from a parquet dataset, a folder and the standard library."""
    datasets = pytest.importorskip("datasets")
    from apex_build.places import data_root

    lines = (data_root() / "calibration_sets" / "data" / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "chats").mkdir()
    rows = [{"messages": json.loads(line)["messages"]} for line in lines]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "chats" / "train.parquet")
    (tmp_path / "notes").mkdir()
    for n in range(30):
        (tmp_path / "notes" / f"{n}.md").write_text(f"# Note {n}\n" + " ".join(f"{w}{n}" for w in WORDS) + "\n")
    path = tmp_path / "three.toml"
    path.write_text("""
tokens = 12_000
seed = 1
heldout = 0.1
[[part]]
domain = "chat"
source = "datasets"
dataset = "chats"
weight = 2
origin = "written for a test"
licence = "MIT"
[[part]]
domain = "notes"
source = "files"
folder = "notes"
weight = 1
[[part]]
domain = "code"
source = "python-stdlib"
modules = ["heapq.py", "bisect.py", "textwrap.py", "shlex.py", "queue.py"]
weight = 3
""")
    return path


def test_check_shows_tokens_by_domain_and_how_each_part_begins(
    tools: Toolset, testbed: Path, three_sources: Path
) -> None:
    ran = run_apex("calibration-sets", "check", three_sources, "--model", testbed)
    assert "three.toml, " in ran.stdout and "chat (datasets) begins:" in ran.stdout
    assert "<|im_start|>user" in ran.stdout and "MIT" in ran.stdout
    found = json.loads(run_apex("calibration-sets", "check", three_sources, "--model", testbed, "--json").stdout)
    tokens = {part["domain"]: part["tokens"] for part in found["parts"]}
    assert sum(tokens.values()) == found["tokens"] and set(tokens) == {"chat", "notes", "code"}
    assert 3000 <= tokens["chat"] <= 4000 and 1500 <= tokens["notes"] <= 2000 and 4000 <= tokens["code"] <= 6500
    assert {one["domain"] for one in found["heldout"]} == set(tokens)


def test_a_calibration_keeps_a_text_apart_that_is_then_measured_on(
    tools: Toolset, testbed: Path, three_sources: Path, tmp_path: Path
) -> None:
    out, apart = tmp_path / "testbed.imatrix.gguf", tmp_path / "apart"
    three_sources.write_text(three_sources.read_text().replace("heldout = 0.1", "heldout = 0.4"))
    options = ("--calibration-set", three_sources, "--heldout", apart, "--chunks", 4, "--threads", 1, "--no-rows-check")
    run_apex("calibrate", testbed, "-o", out, *options)
    about = json.loads((apart / "heldout.json").read_text())
    assert {one["file"] for one in about["parts"]} == {"chat.txt", "notes.txt", "code.txt"}
    recorded = json.loads((tmp_path / "testbed.imatrix.gguf.json").read_text())["text"]
    assert recorded["heldout"]["folder"] == str(apart)
    assert [(one["origin"], one["licence"]) for one in recorded["parts"] if "origin" in one] == [
        ("written for a test", "MIT")
    ]
    assert recorded["tokens"] == sum(one["tokens"] for one in recorded["parts"])
    quantized = tmp_path / "small.gguf"
    run_apex("quantize", testbed, "-o", quantized, "--imatrix", out, "--policy", "i-mini", "--threads", 1)
    said = f"the text that was kept apart from calibration: {apart}"
    evaluate = ("evaluate", quantized, "--only", "perplexity", "--dry-run")
    sweep = ("sweep", testbed, "--over", "draft_head=Q8_0,Q4_K", "--imatrix", out, "-o", tmp_path / "s", "--dry-run")
    check = ("check", quantized, "--prompts-per-domain", 1, "--threads", 1, "--json")
    assert said in run_apex(*evaluate).stderr
    assert said in run_apex(*sweep).stderr
    checked = run_apex(*check)
    assert said in checked.stderr
    assert set(json.loads(checked.stdout)["perplexity"]) == {"all", "chat", "code"}, "the notes are too short"
    (apart / "chat.txt").write_text("something else")
    assert "kept apart" not in run_apex(*evaluate).stderr
    refused = run_apex(*sweep, code=77)
    assert "kept apart" not in refused.stderr and "--text" in refused.stderr


def test_ctrl_c_while_a_set_is_read(testbed: Path, tmp_path: Path) -> None:
    """Nothing is left behind, and the exit code tells."""
    plugin = tmp_path / "slow"
    plugin.mkdir()
    (plugin / "plugin.py").write_text(
        "import time\nfrom apex_build.plugin_api import Source, hookimpl\nAPEX_API = 2\n\n\n"
        "def read(options, folder):\n    (folder / 'began').touch()\n    time.sleep(3600)\n    yield\n\n\n"
        "@hookimpl\ndef apex_calibration_sources():\n    return [Source('slow', read, ())]\n"
    )
    (tmp_path / "mine.toml").write_text('[[part]]\ndomain = "x"\nsource = "slow"\n')
    command = [sys.executable, "-m", "apex_build", "calibrate", str(testbed), "--plugin", str(plugin)]
    command += ["--calibration-set", str(tmp_path / "mine.toml"), "--write-text", str(tmp_path / "text.txt")]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until((tmp_path / "began").exists, child)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=120)
    assert child.returncode == 130 and "Traceback" not in said
    assert not (tmp_path / "text.txt").exists()
