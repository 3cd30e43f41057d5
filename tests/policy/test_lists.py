"""Shared lists of types, with plan and quantize."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from apex_runs import SMALL, run_apex

from apex_build.errors import TemplateFailed, TypeUnknown
from apex_build.gguf_model.header import read_header
from apex_build.native.ggml import Ggml
from apex_build.native.toolset import Toolset
from apex_build.policy.lists import read_list

LLAMA = "token_embd=q8_0\nattn_q=Q5_K attn_k=Q5_K\nffn_.*_exps=iq4_nl\n"
IK = "token_embd=q8_0,attn_[qk]=Q5_K,blk\\.[0-9]{1,2}\\.ffn_.*_exps=IQ4_NL,\n"
RECIPE = r"""
## Quant mix recipe, 3.4 bpw, of another program
## Model head & embeddings
^token_embd\.weight$=q8_0
^output_norm\.weight$ = f32   # never quantized

## Attention
^blk\.([0-9]|[1-5][0-9]|60)\.attn_q\.weight$=q5_K
^blk\.([0-9]|[1-5][0-9]|60)\.attn_k\.weight$=q5_k
## Experts
^blk\.(?:[0-5])\.ffn_(up|down|gate)_exps\.weight$=iq4_nl
^blk\.61\.ffn_up_exps\.weight$=iq4_xs
# GPU Total: 11.2 GiB (95%) | 12.2 GiB max, if all were q8_0
"""


def listed(folder: Path, text: str) -> Path:
    path = folder / "my list.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        (LLAMA, ["token_embd=Q8_0", "attn_q=Q5_K", "attn_k=Q5_K", "ffn_.*_exps=IQ4_NL"]),
        (IK, ["token_embd=Q8_0", "attn_[qk]=Q5_K", r"blk\.[0-9]{1,2}\.ffn_.*_exps=IQ4_NL"]),
        ("a{1,3}=q4_k,b=Q5_K", ["a{1,3}=Q4_K", "b=Q5_K"]),
        ("Token_Embd=Q8_0", ["token_embd=Q8_0"]),
        ("a=q4_k, \\\nb=q5_k\\\n", ["a=Q4_K", "b=Q5_K"]),
        ("\ufeff# comment\r\na=q4_k\r\n".replace("\ufeff", ""), ["a=Q4_K"]),
    ],
)
def test_the_styles(tools: Toolset, tmp_path: Path, text: str, rules: list[str]) -> None:
    assert [rule.line for rule in read_list(listed(tmp_path, text), Ggml(tools)).rules] == rules


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("a=q4_k\nb=iq4_k\nc=iq2_kt\n", TypeUnknown, r"list.txt:2: 'iq4_k'(.|\n)*list.txt:3: 'iq2_kt'"),
        ("a=q8_k", TypeUnknown, "cannot write tensors of type Q8_K"),
        ("token_embd q8_0", TemplateFailed, "list.txt:1: .* is not of the form regex=type"),
        ("a=q4_k\n(=q4_k", TemplateFailed, "list.txt:2: .* is not a regular expression"),
        (r"blk\.\D=q4_k", TemplateFailed, "lower-cases patterns"),
        ("# nothing\n", TemplateFailed, "no rule of the form"),
        ("\xff\x00".encode("latin1").decode("latin1"), TemplateFailed, "is not of the form"),
    ],
)
def test_what_is_no_list(tools: Toolset, tmp_path: Path, text: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        read_list(listed(tmp_path, text), Ggml(tools))


def test_a_model_is_no_list(testbed: Path, tools: Toolset, tmp_path: Path) -> None:
    before = testbed.stat()
    ran = run_apex("plan", testbed, "--policy", "compact", "--tensor-types", testbed, code=63)
    assert "not a list of types" in ran.stderr and testbed.stat().st_mtime_ns == before.st_mtime_ns
    ran = run_apex("plan", testbed, "--policy", "compact", "--tensor-types", "rules.txt", cwd=tmp_path, code=63)
    assert "--write-rules rules.txt" in ran.stderr and not list(tmp_path.iterdir()), "what the option did before"
    assert "--policy NAME" in run_apex("plan", testbed, code=2).stderr


@pytest.mark.parametrize("text", [LLAMA, IK, RECIPE], ids=["llama.cpp", "ik_llama.cpp", "recipe"])
def test_alone_it_does_what_llama_quantize_does_with_it(
    text: str, testbed: Path, tools: Toolset, tmp_path: Path
) -> None:
    path = listed(tmp_path, text)
    ran = run_apex("plan", testbed, "--tensor-types", path, "--set", "base_type=Q4_0", "--json")
    types = {tensor["name"]: tensor["type"] for tensor in json.loads(ran.stdout)["tensors"]}
    assert (types["token_embd.weight"], types["blk.0.ffn_up_exps.weight"]) == ("Q8_0", "IQ4_NL")
    assert types["blk.0.ffn_up_shexp.weight"] == "Q4_0"
    plain = "\n".join(rule.line for rule in read_list(path, Ggml(tools)).rules)
    (tmp_path / "plain.txt").write_text(plain)
    rules = tmp_path / "plain.txt"
    command: list[str | Path] = [
        tools.tool("llama-quantize"),
        "--dry-run",
        "--tensor-type-file",
        rules,
        testbed,
        "Q4_0",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    total = sum(tensor["n_bytes"] for tensor in json.loads(ran.stdout)["tensors"])
    assert f"quant size  = {total / (1 << 20):8.2f} MiB" in said.stdout + said.stderr


def test_before_a_policy_and_what_is_told(testbed: Path, tools: Toolset, tmp_path: Path) -> None:
    path = listed(tmp_path, RECIPE)
    ran = run_apex("quantize", testbed, "--policy", "compact", *SMALL, "--tensor-types", path, "-o", tmp_path)
    (out,) = tmp_path.glob("*.gguf")
    types = {tensor.name: tensor.type for tensor in read_header(out).tensors}
    assert (types["token_embd.weight"], types["blk.0.ffn_up_exps.weight"]) == ("Q8_0", "IQ4_NL")
    assert types["blk.6.ffn_up_exps.weight"] not in ("IQ4_NL", "F16"), "the policy's"
    assert (
        "note: 1 of the 6 rules of" in ran.stderr and r"^blk\.61\.ffn_up_exps\.weight$=IQ4_XS (line 12)" in ran.stderr
    )
    assert "policy 'compact' decides" in ran.stderr
    metadata = read_header(out).metadata
    other = run_apex("quantize", testbed, "--policy", "compact", *SMALL, "-o", tmp_path, "--dry-run").stdout
    assert out.name not in other and metadata["apex.policy"] == "compact", "another file, so another name"


def test_alone_as_a_file(testbed: Path, tools: Toolset, tmp_path: Path) -> None:
    path = listed(tmp_path, LLAMA)
    ran = run_apex("quantize", testbed, "--tensor-types", path, "-o", tmp_path)
    (out,) = tmp_path.glob("*.gguf")
    assert "_OWNTYPESX" in out.name and "the base type, Q8_0 decides" in ran.stderr.replace(":", "")
