"""A Qwen3.5-MoE with its MTP head and random weights, of any size: for timings, and for shapes that the testbed does
not have.

    python tests/patches/random_moe.py OUT.gguf --layers 4 --type q8_0     # layers like the 35B-A3B's, 256 experts
    python tests/patches/random_moe.py OUT.gguf --hidden 256 --experts 128 --width 64 # small

It needs NumPy and gguf-py (`pip install gguf`). The vocabulary is the testbed's 2048 tokens; --tokens fills it up with
tokens that no text has, as for the 35B-A3B's 248,320.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
TYPES = {name: gguf.GGMLQuantizationType[name.upper()] for name in ("f32", "f16", "q8_0")}
TESTBED = Path(__file__).parents[1] / "testbed" / "testbed-f16.gguf"
FULL_ATTENTION = 4  # each fourth layer; the others are linear


@dataclass(frozen=True)
class Shape:
    """The defaults are the 35B-A3B's, except for the number of layers."""

    layers: int = 4
    hidden: int = 2048
    experts: int = 256
    used: int = 8
    width: int = 512
    head_size: int = 256
    heads: int = 16
    kv_heads: int = 2
    state: int = 128
    groups: int = 16
    ranks: int = 32

    @property
    def inner(self) -> int:
        return self.state * self.ranks


def matrices(shape: Shape, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in NumPy's order; tensors other than matrices have one dimension or `conv1d` in their names."""
    hidden, width, size = shape.hidden, shape.width, shape.head_size
    yield "token_embd.weight", (vocabulary, hidden)
    yield "output.weight", (vocabulary, hidden)
    yield "output_norm.weight", (hidden,)
    for layer in range(shape.layers + 1):
        block, head = f"blk.{layer}", layer == shape.layers
        yield f"{block}.attn_norm.weight", (hidden,)
        yield f"{block}.post_attention_norm.weight", (hidden,)
        if head or (layer + 1) % FULL_ATTENTION == 0:
            yield f"{block}.attn_q.weight", (2 * shape.heads * size, hidden)
            yield f"{block}.attn_k.weight", (shape.kv_heads * size, hidden)
            yield f"{block}.attn_v.weight", (shape.kv_heads * size, hidden)
            yield f"{block}.attn_output.weight", (hidden, shape.heads * size)
            yield f"{block}.attn_q_norm.weight", (size,)
            yield f"{block}.attn_k_norm.weight", (size,)
        else:
            mixed = 2 * shape.groups * shape.state + shape.inner
            yield f"{block}.attn_qkv.weight", (mixed, hidden)
            yield f"{block}.attn_gate.weight", (shape.inner, hidden)
            yield f"{block}.ssm_conv1d.weight", (mixed, 4)
            yield f"{block}.ssm_a", (shape.ranks,)
            yield f"{block}.ssm_dt.bias", (shape.ranks,)
            yield f"{block}.ssm_alpha.weight", (shape.ranks, hidden)
            yield f"{block}.ssm_beta.weight", (shape.ranks, hidden)
            yield f"{block}.ssm_norm.weight", (shape.state,)
            yield f"{block}.ssm_out.weight", (hidden, shape.inner)
        yield f"{block}.ffn_gate_inp.weight", (shape.experts, hidden)
        yield f"{block}.ffn_gate_inp_shexp.weight", (hidden,)
        for part in ("gate", "up"):
            yield f"{block}.ffn_{part}_exps.weight", (shape.experts, width, hidden)
            yield f"{block}.ffn_{part}_shexp.weight", (width, hidden)
        yield f"{block}.ffn_down_exps.weight", (shape.experts, hidden, width)
        yield f"{block}.ffn_down_shexp.weight", (hidden, width)
        if head:
            yield f"{block}.nextn.eh_proj.weight", (hidden, 2 * hidden)
            for part in ("enorm", "hnorm", "shared_head_norm"):
                yield f"{block}.nextn.{part}.weight", (hidden,)


def values(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, random: np.random.Generator) -> Array:
    """Weights scaled so that activations keep their size; large tensors repeat a few million random values."""
    if "norm" in name:
        return np.ones(shape, np.float32)
    if name.endswith("ssm_a"):
        return -random.uniform(0.1, 2, shape).astype(np.float32)
    if kind == gguf.GGMLQuantizationType.F32:
        return random.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
    count, pool = int(np.prod(shape)), 1 << 22
    if kind == gguf.GGMLQuantizationType.F16:
        some = random.normal(0, shape[-1] ** -0.5, min(count, pool + 1)).astype(np.float16)
        return np.resize(some, shape)
    blocks = np.empty((min(count // 32, pool // 32 + 1), 34), np.uint8)
    blocks[:, :2] = np.array([shape[-1] ** -0.5 / 73], np.float16).view(np.uint8)  # 73: the deviation of the integers
    blocks[:, 2:] = random.integers(0, 255, (len(blocks), 32)) - 127
    return np.resize(blocks, (*shape[:-1], shape[-1] // 32 * 34))


def filled(name: str, value: Any, count: int) -> Any:
    """The list of tokens or of their types, with unused ones up to `count`."""
    if name == "tokenizer.ggml.tokens":
        return [*value, *(f"<|unused_{number}|>" for number in range(len(value), count))]
    if name == "tokenizer.ggml.token_type":
        return [*value, *[int(gguf.TokenType.UNUSED)] * (count - len(value))]
    return value


def random_moe(
    out: Path, shape: Shape, kind: str = "f16", vocabulary: Path = TESTBED, seed: int = 0, tokens: int = 0
) -> Path:
    if shape.layers < FULL_ATTENTION:
        raise ValueError("llama.cpp cannot run a trunk without a layer of full attention: at least 4 layers")
    random = np.random.default_rng(seed)
    reader = gguf.GGUFReader(vocabulary)
    writer = gguf.GGUFWriter(out, "qwen35moe")
    count = max(tokens, len(reader.fields["tokenizer.ggml.tokens"].data))
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            first = field.types[0]
            last = field.types[-1] if first == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, filled(name, field.contents(), count), first, sub_type=last)
    writer.add_block_count(shape.layers + 1)
    writer.add_nextn_predict_layers(1)
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size // 4)
    writer.add_rope_dimension_sections(
        [shape.head_size // 8 - 2 * (shape.head_size // 24), *[shape.head_size // 24] * 2, 0]
    )
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.used)
    writer.add_expert_feed_forward_length(shape.width)
    writer.add_expert_shared_feed_forward_length(shape.width)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_state_size(shape.state)
    writer.add_ssm_group_count(shape.groups)
    writer.add_ssm_time_step_rank(shape.ranks)
    writer.add_ssm_inner_size(shape.inner)
    writer.add_full_attention_interval(FULL_ATTENTION)

    plan = []
    for name, size in matrices(shape, count):
        small = len(size) == 1 or "conv1d" in name or "gate_inp" in name
        plan.append((name, size, TYPES["f32" if small else kind]))
        dtype = {"q8_0": np.uint8, "f16": np.float16, "f32": np.float32}["f32" if small else kind]
        stored = (*size[:-1], size[-1] // 32 * 34) if dtype == np.uint8 else size
        writer.add_tensor_info(
            name, stored, np.dtype(dtype), int(np.prod(stored)) * np.dtype(dtype).itemsize, plan[-1][2]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, size, type_ in plan:
        writer.write_tensor_data(values(name, size, type_, random))
    writer.close()
    return out


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--type", choices=TYPES, default="f16")
    arguments.add_argument("--tokens", type=int, default=0, help="size of the vocabulary")
    for name, value in vars(Shape()).items():
        arguments.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    given = vars(arguments.parse_args())
    out, kind, tokens = given.pop("out"), given.pop("type"), given.pop("tokens")
    print(random_moe(out, kind=kind, tokens=tokens, shape=Shape(**given)))


if __name__ == "__main__":
    main()
