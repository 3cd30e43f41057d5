"""The testbed's forward pass in NumPy, from the GGUF file alone: the reference for llama.cpp's numbers in tests.

Based on transformers' modeling_qwen3_5_moe.py; the order of the value heads, the `1 +` in the norms and the sign of
`ssm_a` are as convert_hf_to_gguf.py stores them. Everything is in float32, with one sequence and no cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


@dataclass
class Recorder:
    """Sums of squares of the input of each weight matrix, by tensor name: [columns], or [experts, columns]; and token
    counts.
    """

    sums: dict[str, Array] = field(default_factory=dict)
    counts: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)

    def add(self, name: str, rows: Array, expert: int = 0, experts: int = 1) -> None:
        total = self.sums.setdefault(name, np.zeros((experts, rows.shape[-1]), np.float32))
        count = self.counts.setdefault(name, np.zeros(experts, np.int64))
        total[expert] += np.square(rows).sum(0)
        count[expert] += len(rows)


class Reference:
    """The weights and some hyperparameters of a qwen35moe file."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.weights = {
            t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors
        }
        value = {
            key.removeprefix("qwen35moe."): f.contents()
            for key, f in reader.fields.items()
            if key.startswith("qwen35moe.")
        }
        self.eps = value["attention.layer_norm_rms_epsilon"]
        self.trunk_layers = value["block_count"] - value["nextn_predict_layers"]
        self.interval = value.get("full_attention_interval", 4)
        self.heads, self.kv_heads = value["attention.head_count"], value["attention.head_count_kv"]
        self.head_dim, self.n_rot = value["attention.key_length"], value["rope.dimension_count"]
        self.theta = value["rope.freq_base"]
        self.k_heads, self.v_heads, self.state = (
            value["ssm.group_count"],
            value["ssm.time_step_rank"],
            value["ssm.state_size"],
        )
        self.used = value["expert_used_count"]
        self.recorder = Recorder()

    def trunk(self, ids: list[int]) -> Array:
        """Hidden states before the final norm, [tokens, hidden]."""
        x = self.weights["token_embd.weight"][ids]
        for layer in range(self.trunk_layers):
            full = (layer + 1) % self.interval == 0
            mix = self.attention if full else self.delta_net
            x = self.block(x, layer, mix, np.arange(len(ids)))
        return x

    def fed(self, hidden: Array, rows: str, norm: str = "output_norm") -> Array:
        """The head's input rows: hidden states from `trunk` or `head`, or these after their norm."""
        return self.norm(hidden, norm) if rows == "post" else hidden

    def head(self, ids: list[int], rows: Array) -> Array:
        """The draft head on tokens x(p) and the rows of p-1 (see `fed`; zeros first): its states before the norm."""
        layer, tokens = self.trunk_layers, self.weights["token_embd.weight"][ids]
        before = np.concatenate([np.zeros_like(rows[:1]), rows[:-1]])
        both = np.concatenate(
            [self.norm(tokens, f"blk.{layer}.nextn.enorm"), self.norm(before, f"blk.{layer}.nextn.hnorm")], axis=-1
        )
        return self.block(self.linear(both, f"blk.{layer}.nextn.eh_proj"), layer, self.attention, np.arange(len(ids)))

    def logits(self, hidden: Array, norm: str = "output_norm") -> Array:
        found: Array = self.norm(hidden, norm) @ self.weights["output.weight"].T
        return found

    def block(
        self,
        x: Array,
        layer: int,
        mix: Callable[[Array, str, npt.NDArray[np.int64]], Array],
        positions: npt.NDArray[np.int64],
    ) -> Array:
        name = f"blk.{layer}"
        x = x + mix(self.norm(x, f"{name}.attn_norm"), name, positions)
        return x + self.experts(self.norm(x, f"{name}.post_attention_norm"), name)

    def norm(self, x: Array, name: str) -> Array:
        found: Array = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + self.eps) * self.weights[f"{name}.weight"]
        return found

    def linear(self, x: Array, name: str) -> Array:
        self.recorder.add(f"{name}.weight", x)
        found: Array = x @ self.weights[f"{name}.weight"].T
        return found

    def attention(self, x: Array, name: str, positions: npt.NDArray[np.int64]) -> Array:
        n, d = len(x), self.head_dim
        query, gate = np.split(self.linear(x, f"{name}.attn_q").reshape(n, self.heads, 2 * d), 2, axis=-1)
        key = self.linear(x, f"{name}.attn_k").reshape(n, self.kv_heads, d)
        value = self.linear(x, f"{name}.attn_v").reshape(n, self.kv_heads, d)
        query = self.rope(self.norm(query, f"{name}.attn_q_norm"), positions)
        key = self.rope(self.norm(key, f"{name}.attn_k_norm"), positions)
        repeat = self.heads // self.kv_heads
        key, value = key.repeat(repeat, axis=1), value.repeat(repeat, axis=1)
        scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(d)
        scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
        mixed = np.einsum("hqk,khd->qhd", softmax(scores), value) * sigmoid(gate)
        return self.linear(mixed.reshape(n, -1).astype(np.float32), f"{name}.attn_output")

    def rope(self, x: Array, positions: npt.NDArray[np.int64]) -> Array:
        half = self.n_rot // 2
        angle = positions[:, None] / self.theta ** (np.arange(half) * 2 / self.n_rot)
        cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
        a, b, rest = x[..., :half], x[..., half : self.n_rot], x[..., self.n_rot :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(np.float32)

    def delta_net(self, x: Array, name: str, _positions: npt.NDArray[np.int64]) -> Array:
        n, d, k_dim = len(x), self.state, self.k_heads * self.state
        mixed = causal_convolution(self.linear(x, f"{name}.attn_qkv"), self.weights[f"{name}.ssm_conv1d.weight"])
        mixed = mixed * sigmoid(mixed)
        query = unit(mixed[:, :k_dim].reshape(n, self.k_heads, d)) / np.sqrt(d)
        key = unit(mixed[:, k_dim : 2 * k_dim].reshape(n, self.k_heads, d))
        value = mixed[:, 2 * k_dim :].reshape(n, self.v_heads, d)
        # the converter lays value heads out so that head j belongs to key head j mod k_heads
        of_value = np.arange(self.v_heads) % self.k_heads
        query, key = query[:, of_value], key[:, of_value]
        beta = sigmoid(self.linear(x, f"{name}.ssm_beta"))
        step = np.logaddexp(0, self.linear(x, f"{name}.ssm_alpha") + self.weights[f"{name}.ssm_dt.bias"])
        decay = np.exp(step * self.weights[f"{name}.ssm_a"].reshape(-1))
        memory = np.zeros((self.v_heads, d, d), np.float32)
        out = np.empty((n, self.v_heads, d), np.float32)
        for t in range(n):
            memory = memory * decay[t][:, None, None]
            change = (value[t] - np.einsum("hkv,hk->hv", memory, key[t])) * beta[t][:, None]
            memory = memory + np.einsum("hk,hv->hkv", key[t], change)
            out[t] = np.einsum("hkv,hk->hv", memory, query[t])
        gate = self.linear(x, f"{name}.attn_gate").reshape(n, self.v_heads, d)
        out = self.norm(out, f"{name}.ssm_norm") * (gate * sigmoid(gate))
        return self.linear(out.reshape(n, -1), f"{name}.ssm_out")

    def experts(self, x: Array, name: str) -> Array:
        chances = softmax(self.linear(x, f"{name}.ffn_gate_inp"))
        chosen = np.argsort(-chances, axis=-1, kind="stable")[:, : self.used]
        weight = np.take_along_axis(chances, chosen, axis=-1)
        weight = weight / weight.sum(-1, keepdims=True)
        gates, ups, downs = (self.weights[f"{name}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
        out = np.zeros_like(x)
        for expert in range(len(gates)):
            rows, slots = np.nonzero(chosen == expert)
            inner = silu(x[rows] @ gates[expert].T) * (x[rows] @ ups[expert].T)
            for part, rows_in in (("gate", x[rows]), ("up", x[rows]), ("down", inner)):
                self.recorder.add(f"{name}.ffn_{part}_exps.weight", rows_in, expert, len(gates))
            out[rows] += (inner @ downs[expert].T) * weight[rows, slots][:, None]
        inner = silu(self.linear(x, f"{name}.ffn_gate_shexp")) * self.linear(x, f"{name}.ffn_up_shexp")
        shared = self.linear(inner, f"{name}.ffn_down_shexp")
        return out + shared * sigmoid(x @ self.weights[f"{name}.ffn_gate_inp_shexp.weight"].reshape(-1, 1))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    found: Array = (e / e.sum(-1, keepdims=True)).astype(np.float32)
    return found


def sigmoid(x: Array) -> Array:
    return (1 / (1 + np.exp(-x))).astype(np.float32)


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def unit(x: Array) -> Array:
    found: Array = x / np.sqrt(np.square(x).sum(-1, keepdims=True) + 1e-6)
    return found


def causal_convolution(x: Array, kernel: Array) -> Array:
    """Depthwise convolution over time: x [tokens, channels], kernel [channels, taps]."""
    taps = kernel.shape[1]
    padded = np.concatenate([np.zeros((taps - 1, x.shape[1]), np.float32), x])
    return sum(padded[i : i + len(x)] * kernel[:, i] for i in range(taps))  # type: ignore[return-value]
