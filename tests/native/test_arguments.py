"""Arguments that a user adds: options that apex sets are rejected under every name, and files count by content."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from apex_runs import run_apex

from apex_build.errors import ParameterUnknown
from apex_build.native.arguments import check_no_double, options_of, resolve
from apex_build.native.toolset import Toolset
from apex_build.storage.digests import sha256_file


@pytest.mark.parametrize(
    ("tool", "given", "said"),
    [
        ("llama-imatrix", ["-c", "256"], "--context"),
        ("llama-imatrix", ["--ctx-size", "256"], "--context"),
        ("llama-imatrix", ["--ctx_size", "256"], "--context"),
        ("llama-imatrix", ["--ctx-size=256"], "--context"),
        ("llama-imatrix", ["-fa", "on", "-b", "64"], "--context"),
        ("llama-imatrix", ["-f", "other.txt"], "--text"),
        ("llama-imatrix", ["-bf", "other.bin"], "--text"),
        ("llama-imatrix", ["-p", "some text"], "--text"),
        ("llama-imatrix", ["-o", "elsewhere.gguf"], "-o FILE"),
        ("llama-imatrix", ["--output-file", "elsewhere.gguf"], "-o FILE"),
        ("llama-imatrix", ["--from-chunk", "3"], "--from-chunk"),
        ("llama-imatrix", ["-ofreq", "3"], "-ofreq"),
        ("llama-imatrix", ["--in-file", "other.gguf"], "--in-file"),
        ("llama-imatrix", ["--no-escape"], "--no-escape"),
        ("llama-imatrix", ["-ngl", "3"], "--gpu-layers"),
        ("llama-imatrix", ["-t", "3"], "--threads"),
        ("llama-imatrix", ["-m", "other.gguf"], "the model is the file"),
        ("llama-imatrix", ["-hf", "user/model"], "the model is the file"),
        ("llama-imatrix", ["--show-statistics"], "apex inspect"),
        ("llama-imatrix", ["--log-disable"], "reads what the tool prints"),
        ("llama-imatrix", ["-lv", "0"], "reads what the tool prints"),
        ("llama-imatrix", ["--version"], "would exit without"),
        ("llama-perplexity", ["-c", "256"], "EVALUATOR.context"),
        ("llama-perplexity", ["--save-all-logits", "x"], "--only"),
        ("llama-server", ["-np", "4"], "-np"),
        ("llama-server", ["-md", "draft.gguf"], "--only"),
        ("llama-bench", ["-r", "4"], "speed.repetitions"),
        ("llama-bench", ["-pg", "4,4"], "speed.prompt"),
        ("llama-bench", ["-o", "md"], "reads what the tool prints"),
    ],
)
def test_what_apex_sets_is_refused_by_every_name(tool: str, given: list[str], said: str, tools: Toolset) -> None:
    with pytest.raises(ParameterUnknown) as caught:
        resolve(tools.tool(tool), given)
    assert said in f"{caught.value.message} {caught.value.hint}"
    assert "--tool-argument -" in caught.value.message


def test_names_and_values_as_the_help_has_them(tools: Toolset) -> None:
    found = options_of(tools.tool("llama-imatrix"))
    assert found["-ctk"].names == ("-ctk", "--cache-type-k") and found["-ctk"].values == 1
    assert found["-nkvo"] == found["--kv-offload"] and found["-nkvo"].values == 0
    assert found["--control-vector-layer-range"].values == 2
    assert found["--lora"].file and not found["-ot"].file
    bench = options_of(tools.tool("llama-bench"))
    assert bench["--delay"].values == bench["-mmp"].values == 1 and bench["--progress"].values == 0


def test_a_value_is_not_taken_for_an_option(tools: Toolset) -> None:
    given = ["-ot", "-c", "--keep", "-1", "--override-kv", "a=int:3", "stray"]
    assert resolve(tools.tool("llama-imatrix"), given).arguments == tuple(given)


def test_files_count_by_place_and_content(tools: Toolset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = (tmp_path / name for name in ("one.gguf", "two.gguf"))
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    found = resolve(tools.tool("llama-imatrix"), ["--lora-scaled", "one.gguf:0.5,two.gguf:-1", "--lora=one.gguf"])
    assert found.arguments == ("--lora-scaled", f"{one}:0.5,{two}:-1", f"--lora={one}")
    assert found.files == {str(one): sha256_file(one), str(two): sha256_file(two)}
    with pytest.raises(ParameterUnknown, match=r"--lora: three\.gguf: no such file"):
        resolve(tools.tool("llama-imatrix"), ["--lora", "three.gguf"])


def test_what_an_evaluator_sets_is_not_given_twice(tools: Toolset) -> None:
    server = tools.tool("llama-server")
    check_no_double(server, ["--fit", "off"], ["--no-warmup"])
    with pytest.raises(ParameterUnknown, match="--tool-argument -fit"):
        check_no_double(server, ["--fit", "off"], ["-fit", "on"])


def test_the_verbs_refuse_before_they_begin(tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path) -> None:
    text = ("--text", heldout / "chat.txt")
    wanted = ("calibrate", testbed, *text, "-o", tmp_path / "a.gguf")
    for more in ((), ("--dry-run",)):
        said = run_apex(
            *wanted, "--tool-argument=-c", "--tool-argument", 256, *more, code=ParameterUnknown.exit_code
        ).stderr
        assert "--tool-argument -c: apex sets this option of llama-imatrix itself" in said and "--context" in said
    evaluate = ("evaluate", testbed, "--only", "perplexity", *text, "--results", tmp_path / "r.jsonl", "--dry-run")
    for argument in ("-c", "llama-bench:-r", "llama-server:--port"):
        run_apex(*evaluate, "--tool-argument", argument, code=ParameterUnknown.exit_code)
    assert not list(tmp_path.iterdir())


def test_another_content_is_other_work(tools: Toolset, testbed: Path, heldout: Path, tmp_path: Path) -> None:
    grammar = tmp_path / "a.gbnf"
    wanted = ("evaluate", testbed, "--only", "perplexity", "--text", heldout / "chat.txt", "--dry-run", "--json")
    found = []
    for content in ('root ::= "a"', 'root ::= "b"'):
        grammar.write_text(content)
        given = ("--tool-argument", "--grammar-file", "--tool-argument", "a.gbnf")
        (row,) = json.loads(run_apex(*wanted, *given, cwd=tmp_path).stdout)
        found.append(row["tool_argument_files"])
    assert list(found[0]) == list(found[1]) == [str(grammar)]
    assert found[0] != found[1]
