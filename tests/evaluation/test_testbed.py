"""The shipped model is the trained one, and its draft head is good enough for measurements."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from reference import Reference, softmax

from apex_build.evaluation.run import Inputs, plan_work
from apex_build.evaluation.task import read_prompts
from apex_build.gguf_model.model import read_model
from apex_build.native.server import serve
from apex_build.native.toolset import Toolset
from apex_build.plugins import load_plugins
from apex_build.storage.digests import sha256_file


@pytest.mark.parametrize(
    ("file", "log", "last"),
    [("testbed-f16.gguf", "train", "2199/2200"), ("testbed-dense-f16.gguf", "train-dense", "1099/1100")],
)
def test_the_file_is_the_one_that_was_trained(testbed: Path, file: str, log: str, last: str) -> None:
    path = testbed.with_name(file)
    expected, name = path.with_name(f"{file}.sha256").read_text().split()
    assert name == file and sha256_file(path) == expected
    assert path.stat().st_size <= 32_000_000
    steps = [line for line in path.with_name(f"{log}.log").read_text().splitlines() if line.startswith("step")]
    assert last in steps[-1]


def test_the_final_norm_is_uneven_as_in_real_models(testbed: Path) -> None:
    """Otherwise rows before and after the norm look the same to a head, and no test could tell them apart."""
    for file in ("testbed-f16.gguf", "testbed-dense-f16.gguf"):
        tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(testbed.with_name(file)).tensors}
        weights = np.log(tensors["output_norm.weight"])
        assert 0.6 < weights.std() < 1.0


def test_it_has_what_the_large_models_have(testbed: Path) -> None:
    model = read_model(testbed, load_plugins().role_of)
    assert (model.architecture, model.trunk_layers, model.head_layers) == ("qwen35moe", 6, 1)
    assert (model.n_expert, model.n_expert_used) == (8, 2)
    assert {tensor.role for tensor in model.tensors if tensor.draft_head} >= {"routed", "shared", "attention", "nextn"}
    assert {t.role for t in model.tensors if not t.draft_head} >= {
        "routed",
        "shared",
        "attention",
        "ssm",
        "router",
        "embedding",
        "output",
    }
    rows = {tensor.shape[0] for tensor in model.tensors if tensor.type == "F16"}
    assert all(row % 256 == 0 for row in rows), "every k- and i-quant fits"
    fields = gguf.GGUFReader(testbed).fields
    assert fields["tokenizer.ggml.pre"].contents() == "qwen35"
    assert {"<think>", "</think>", "<tool_call>", "<|im_start|>"} <= set(fields["tokenizer.ggml.tokens"].contents())


def test_half_of_the_drafted_tokens_are_accepted(tools: Toolset, testbed: Path, heldout: Path) -> None:
    """llama-server with draft-mtp, drafts of up to 2, greedy, on held-out prompts from the four domains."""
    plugins = load_plugins()
    evaluator = plugins.evaluators()["draft-acceptance"]
    settings = {"draft-acceptance.lengths": "2", "draft-acceptance.temperature": "0"}
    inputs = Inputs(prompts=read_prompts(heldout / "prompts.jsonl")[::2], settings=settings)
    figures = evaluator.evaluate(
        plan_work(evaluator, read_model(testbed, plugins.role_of), inputs, tools, threads=1).task
    )
    values = {(figure.name, figure.domain): figure.value or 0.0 for figure in figures}
    assert {domain for _, domain in values} == {"", "chat", "code", "reasoning", "tool-calling"}
    assert values["greedy.n2.drafted", ""] > 500
    assert values["greedy.n2.acceptance", ""] >= 50
    assert all(values["greedy.n2.acceptance", domain] > 40 for _, domain in values)


def test_trunk_and_head_in_numpy_predict_the_held_out_text(tools: Toolset, testbed: Path, heldout: Path) -> None:
    """The model is trained: its choices are right far more often than by chance, and head and trunk mostly agree."""
    text = (heldout / "reasoning.txt").read_text()[:4000]
    with serve(tools, testbed, arguments=["--ctx-size", "512"]) as server:
        ids = server.post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"][:400]
    reference = Reference(testbed)
    hidden = reference.trunk(ids)
    trunk = reference.logits(hidden)
    head = reference.logits(reference.head(ids, reference.fed(hidden, "post")), "blk.6.nextn.shared_head_norm")
    following = np.array(ids[1:])
    assert (trunk[:-1].argmax(-1) == following).mean() > 0.25
    assert np.log(softmax(trunk[:-1])[np.arange(len(following)), following]).mean() > -4.5, "chance is -7.6"
    # row p of the head has seen x(p) and h(p-1), and predicts x(p+1) as row p of the trunk does
    assert (head.argmax(-1) == trunk.argmax(-1))[1:].mean() > 0.45
