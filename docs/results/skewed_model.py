"""A random qwen35moe model of 64 experts whose router prefers some of them: the testbed's tokenizer, random weights.

python docs/results/skewed_model.py tests/testbed/testbed-f16.gguf skewed.gguf
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np

EXPERTS, WIDTH = 64, 64
SKEW = 0.3  # of the router's rows, log-normal: the larger, the rarer are the rare experts


def write(base: Path, out: Path, seed: int = 1, skew: float = SKEW) -> None:
    reader, writer = gguf.GGUFReader(base), gguf.GGUFWriter(out, "qwen35moe")
    random = np.random.default_rng(seed)
    changed = {"qwen35moe.expert_count": EXPERTS, "qwen35moe.expert_feed_forward_length": WIDTH}
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.name"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, changed.get(key, field.contents()), kind, inner)
    writer.add_string("general.name", "skewed router, random weights")
    for tensor in reader.tensors:
        rows, *more = (int(extent) for extent in reversed(tensor.shape))
        shape = (rows, *more)
        if "_exps." in tensor.name:
            shape = (EXPERTS, shape[2], WIDTH)[:1] + ((shape[1], WIDTH) if "down" in tensor.name else (WIDTH, shape[2]))
        elif tensor.name.endswith("ffn_gate_inp.weight"):
            shape = (EXPERTS, shape[1])
        if len(shape) == 1 or "ssm_" in tensor.name or "norm" in tensor.name:
            writer.add_tensor(tensor.name, np.array(tensor.data))
            continue
        values = random.standard_normal(shape, dtype=np.float32) / np.sqrt(np.float32(shape[-1]))
        if tensor.name.endswith("ffn_gate_inp.weight"):
            values *= np.exp(skew * random.standard_normal((EXPERTS, 1), dtype=np.float32)) * 4
        wide = tensor.tensor_type == gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, values if wide else values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--skew", type=float, default=SKEW)
    given = parser.parse_args()
    write(given.base, given.out, given.seed, given.skew)
