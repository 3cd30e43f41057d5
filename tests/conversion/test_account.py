"""Every tensor of a checkpoint is converted or left out for a known reason; otherwise the conversion fails."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from checkpoints import CONFIG, HIDDEN, QWEN3_NEXT, make_checkpoint, qwen3_next_shapes, shapes, write_safetensors
from click.testing import CliRunner

from apex_build.cli import apex
from apex_build.conversion import convert
from apex_build.conversion.account import Account, left_out, patterns_of
from apex_build.conversion.checkpoint import read_checkpoint
from apex_build.conversion.converter import family
from apex_build.errors import CheckpointInvalid, ParameterUnknown
from apex_build.gguf_model.header import read_header
from apex_build.gguf_model.metadata import parse_meta

Shapes = Mapping[str, tuple[int, ...]]


def checkpoint(folder: Path, tensors: Shapes, **config: object) -> Path:
    made = make_checkpoint(folder, config=config)
    write_safetensors(made / "model.safetensors", tensors)
    return made


def with_more(folder: Path, more: Shapes, **config: object) -> Path:
    return checkpoint(folder, {**shapes(), **more}, **config)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "out.gguf"


# --- before anything is started ---------------------------------------------------------------------------------------
def test_a_head_that_the_converter_drops(tmp_path: Path, source: Path, out: Path) -> None:
    """Qwen3-Next: the converter of this pin ignores mtp.*, so a third of the tensors was silently lost."""
    folder = checkpoint(tmp_path / "hf", qwen3_next_shapes(), **QWEN3_NEXT)
    with pytest.raises(
        CheckpointInvalid, match="has a draft head of 19 tensors, which the converter of pr-22673 does not know"
    ) as e:
        convert.prepare(folder, source, out)
    assert "Qwen3NextForCausalLM" in e.value.message and "mtp.fc.weight" in e.value.message
    assert "--no-head" in str(e.value.hint) and "--pin latest" in str(e.value.hint)


@pytest.mark.parametrize(
    "prefix", ["mtp.layers.0.", "model.mtp.layers.0.", "model.mtp_block.0.", "backbone.mtp.layers.0."]
)
@pytest.mark.parametrize(
    "config",
    [
        {"mtp_num_hidden_layers": 0, "num_nextn_predict_layers": 1},
        {"mtp_num_hidden_layers": 1},
        {"mtp_num_hidden_layers": 0},
        {"mtp_num_hidden_layers": 0, "num_nextn_predict_layers": 1, "architectures": ["NemotronHForCausalLM"]},
        {"mtp_num_hidden_layers": 0, "num_nextn_predict_layers": 1, "architectures": ["Glm4MoeForCausalLM"]},
    ],
    ids=["nextn", "mtp", "no key", "Nemotron", "GLM"],
)
def test_a_head_under_other_names(
    tmp_path: Path, source: Path, out: Path, prefix: str, config: dict[str, object]
) -> None:
    """As in MiMo, Nemotron and Ernie: the head is complete, so do not tell the user to fetch mtp.fc.weight."""
    tensors = {name: shape for name, shape in shapes().items() if not name.startswith("mtp.")}
    tensors |= {f"{prefix}{name}.weight": (HIDDEN,) for name in ("eh_proj", "enorm", "hnorm", "final_layernorm")}
    with pytest.raises(CheckpointInvalid) as caught:
        convert.prepare(checkpoint(tmp_path / "hf", tensors, **config), source, out)
    said = f"{caught.value.message} {caught.value.hint}"
    assert f"{prefix}eh_proj.weight" in said and "mtp.fc" not in said and "--no-head" in said


def test_a_family_that_has_heads_of_its_own_names(source: Path) -> None:
    assert family(source, "MiMoV2ForCausalLM").writes_heads and not family(source, "MiMoV2ForCausalLM").head_keys
    assert family(source, "Glm4MoeForCausalLM").head_keys == {"num_nextn_predict_layers"}
    assert family(source, "Qwen3_5MoeForCausalLM").can_omit_head
    assert (
        not family(source, "DeepseekV3ForCausalLM").writes_heads
        and not family(source, "NemotronHForCausalLM").writes_heads
    )


def test_a_block_after_the_trunks_last(tmp_path: Path, source: Path, out: Path) -> None:
    """DeepSeek-V3: the converter of this pin skips that block."""
    tensors = {
        name.replace("mtp.layers.0.", "model.layers.4."): shape
        for name, shape in shapes().items()
        if "mtp." not in name[:4]
    }
    tensors["model.layers.4.eh_proj.weight"] = (HIDDEN, 2 * HIDDEN)
    config = {"architectures": ["DeepseekV3ForCausalLM"], "mtp_num_hidden_layers": 0, "num_nextn_predict_layers": 1}
    with pytest.raises(CheckpointInvalid, match=r"draft head of 1 tensors.*model\.layers\.4\.eh_proj\.weight"):
        convert.prepare(checkpoint(tmp_path / "hf", tensors, **config), source, out)


def test_a_pattern_that_finds_nothing(tmp_path: Path, source: Path, out: Path) -> None:
    with pytest.raises(ParameterUnknown, match=r"--drop mpt\.\*: no tensor"):
        convert.prepare(make_checkpoint(tmp_path / "hf"), source, out, drop=["mpt.*"])


@pytest.mark.parametrize(
    ("method", "said"),
    [("awq", "by AWQ, which"), ("bitsandbytes", "by bitsandbytes, which"), ("exl2", "by exl2, which")],
)
def test_a_quantized_checkpoint_that_cannot_be_read(
    tmp_path: Path, source: Path, out: Path, method: str, said: str
) -> None:
    folder = make_checkpoint(tmp_path / "hf", config={"quantization_config": {"quant_method": method, "bits": 4}})
    with pytest.raises(CheckpointInvalid, match=said) as caught:
        convert.prepare(folder, source, out)
    assert "original checkpoint" in str(caught.value.hint)


def test_a_quantized_checkpoint_that_can_be_read(tmp_path: Path, source: Path, out: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", config={"quantization_config": {"quant_method": "gptq", "bits": 4}})
    (warning,) = convert.prepare(folder, source, out).warnings
    assert "by GPTQ: its loss is permanent" in warning


def test_quantized_tensors_without_a_word_in_the_config(tmp_path: Path, source: Path, out: Path) -> None:
    folder = with_more(tmp_path / "hf", {"model.layers.0.mlp.up_proj.qweight": (8, 8)})
    with pytest.raises(CheckpointInvalid, match="gptq or awq"):
        convert.prepare(folder, source, out)


def test_patterns_for_the_hint_name_no_other_tensor() -> None:
    names = ["a.b.0.w", "a.b.1.w", "a.b.0.x", "mtp.c.w", "mtp.d", "lone"]
    assert patterns_of(["mtp.c.w", "mtp.d"], names) == ["mtp.*"]
    assert patterns_of(["a.b.0.x", "lone"], names) == ["a.b.*.x", "lone"]
    assert patterns_of(["a.b.0.w"], names) == ["a.b.0.w"]


def test_a_tied_output_is_lost_only_if_it_is_not_the_same(tmp_path: Path) -> None:
    """Gemma's converter skips lm_head: fine if it equals the embedding, a loss if it differs."""
    folder = make_checkpoint(tmp_path / "hf")
    account = Account({}, frozenset(shapes()) - {"lm_head.weight"})
    options = {"head": True, "other_file": False, "source": "a tree"}
    same = left_out(read_checkpoint(folder), account, (), **options)  # type: ignore[arg-type]
    assert same == {"the same values as model.embed_tokens.weight": ["lm_head.weight"]}
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[read_checkpoint(folder).tensors["lm_head.weight"].place[1] - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointInvalid, match=r"would leave out 1 of the .*lm_head\.weight"):
        left_out(read_checkpoint(folder), account, (), **options)  # type: ignore[arg-type]


# --- with torch -------------------------------------------------------------------------------------------------------
def converted(folder: Path, source: Path, python: Path, out: Path, **options: object) -> dict[str, object]:
    job = convert.prepare(folder, source, out, pre_tokenizer="qwen2", python=python, **options)  # type: ignore[arg-type]
    dry = convert.account_for(job)
    manifest: dict[str, object] = {**convert.run(job).manifest.json()}
    assert dry == manifest["left_out"], "the dry run says the same"
    return manifest


def refused(folder: Path, source: Path, python: Path, out: Path) -> CheckpointInvalid:
    job = convert.prepare(folder, source, out, pre_tokenizer="qwen2", python=python)
    with pytest.raises(CheckpointInvalid) as dry:
        convert.account_for(job)
    with pytest.raises(CheckpointInvalid) as caught:
        convert.run(job)
    assert dry.value.message == caught.value.message
    assert [path.name for path in out.parent.iterdir()] == ["out.gguf.log"]
    return caught.value


def test_all_tensors_are_in_the_model(tmp_path: Path, source: Path, python: Path, out: Path) -> None:
    assert converted(make_checkpoint(tmp_path / "hf"), source, python, out)["left_out"] == {}


def test_experts_one_by_one_are_merged(tmp_path: Path, source: Path, python: Path, out: Path) -> None:
    tensors: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes().items():
        block, fused, part = name.partition(".mlp.experts.")
        if not fused:
            tensors[name] = shape
            continue
        parts = (
            {"down_proj": shape[1:]}
            if part == "down_proj"
            else dict.fromkeys(("gate_proj", "up_proj"), (shape[1] // 2, shape[2]))
        )
        tensors |= {
            f"{block}.mlp.experts.{n}.{one}.weight": size for n in range(shape[0]) for one, size in parts.items()
        }
    assert len(tensors) > len(shapes())
    assert converted(checkpoint(tmp_path / "hf", tensors), source, python, out)["left_out"] == {}


def test_a_tensor_that_would_be_lost(tmp_path: Path, source: Path, python: Path, out: Path) -> None:
    """The Qwen3-Next converter skips names that start with mtp; here it is no head, but must not be lost silently."""
    folder = checkpoint(tmp_path / "hf", {**qwen3_next_shapes(), "mtpx.value.weight": (4, 4)}, **QWEN3_NEXT)
    tensors = {name: shape for name, shape in qwen3_next_shapes().items() if not name.startswith("mtp.")}
    write_safetensors(folder / "model.safetensors", {**tensors, "mtpx.value.weight": (4, 4)})
    error = refused(folder, source, python, out)
    assert (
        f"would leave out 1 of the {len(tensors) + 1} tensors" in error.message and "mtpx.value.weight" in error.message
    )
    assert error.hint is not None and "--drop 'mtpx.*'" in error.hint
    manifest = converted(folder, source, python, out, drop=["mtpx.*"])
    assert manifest["left_out"] == {"left out by --drop": ["mtpx.value.weight"]}


def test_a_tensor_that_the_converter_does_not_know(tmp_path: Path, source: Path, python: Path, out: Path) -> None:
    folder = with_more(tmp_path / "hf", {"value_head.weight": (1, HIDDEN)})
    job = convert.prepare(folder, source, out, pre_tokenizer="qwen2", python=python)
    with pytest.raises(Exception, match=r"does not know one of the tensors(.|\n)*value_head") as caught:
        convert.run(job)
    assert "--drop" in str(getattr(caught.value, "hint", ""))
    assert converted(folder, source, python, out, drop=["value_head.*"])["left_out"] == {
        "left out by --drop": ["value_head.weight"]
    }


def test_without_the_head_of_a_family_that_keeps_none(tmp_path: Path, source: Path, python: Path, out: Path) -> None:
    folder = checkpoint(tmp_path / "hf", qwen3_next_shapes(), **QWEN3_NEXT)
    ((reason, names),) = converted(folder, source, python, out, head=False)["left_out"].items()  # type: ignore[attr-defined]
    assert "--no-head" in reason and len(names) == 19


def test_what_is_computed_and_what_is_there_twice(tmp_path: Path, source: Path, python: Path, out: Path) -> None:
    more = {"model.layers.3.self_attn.rotary_emb.inv_freq": (8,)}
    assert converted(with_more(tmp_path / "hf", more), source, python, out)["left_out"] == {
        "computed from the config": list(more)
    }


def test_what_sees_is_for_another_file(tmp_path: Path, source: Path, python: Path, out: Path) -> None:
    nested = {name: value for name, value in CONFIG.items() if name != "architectures"}
    folder = make_checkpoint(tmp_path / "hf")
    about = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "text_config": nested,
        "vision_config": {"depth": 1},
    }
    (folder / "config.json").write_text(json.dumps({**about, "model_type": "qwen3_5_moe"}))
    named = {name.replace("model.", "model.language_model.", 1): shape for name, shape in shapes().items()}
    write_safetensors(folder / "model.safetensors", {**named, "model.visual.blocks.0.attn.qkv.weight": (8, 8)})
    manifest = converted(folder, source, python, out)
    assert manifest["left_out"] == {"for an mmproj file (vision, audio)": ["model.visual.blocks.0.attn.qkv.weight"]}
    assert manifest["head_layers"] == 1


def test_the_command_says_what_is_left_out(tmp_path: Path, source: Path, python: Path, out: Path) -> None:
    folder = with_more(tmp_path / "hf", {"value_head.weight": (1, HIDDEN)})
    for more in (["--dry-run"], []):
        arguments = [
            "convert",
            str(folder),
            "-o",
            str(out),
            "--pre-tokenizer",
            "qwen2",
            "--drop",
            "value_head.*",
            *more,
        ]
        done = CliRunner().invoke(apex, [*arguments, "--python", str(python)])
        assert done.exit_code == 0, done.output
        assert "note: 1 tensors are not in the model, left out by --drop: value_head.weight" in done.stderr


# --- metadata ---------------------------------------------------------------------------------------------------------
def test_metadata_of_the_checkpoint_and_of_the_user(tmp_path: Path, source: Path, python: Path, out: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf")
    front = "---\nlicense: apache-2.0\nbase_model:\n- Qwen/Qwen3.6-35B-A3B\ntags:\n- moe\n---\n# A model\n"
    (folder / "README.md").write_text(front)
    meta = parse_meta(["name=My Model", "quantized_by=somebody", "tags=a,b", "my.own.key=x", "sampling.temp=0.5"])
    converted(folder, source, python, out, metadata=meta)
    found = read_header(out).metadata
    assert found["general.license"] == "apache-2.0", "of README.md"
    assert (
        found["general.base_model.0.name"] == "Qwen3.6 35B A3B" and found["general.base_model.0.organization"] == "Qwen"
    )
    assert (found["general.name"], found["general.quantized_by"]) == ("My Model", "somebody")
    assert found["general.tags"] == ("a", "b") and found["my.own.key"] == "x" and found["general.sampling.temp"] == 0.5
    assert found["general.size_label"]
    manifest = json.loads(out.with_name("out.gguf.json").read_text())
    assert manifest["metadata"]["general.name"] == "My Model"
