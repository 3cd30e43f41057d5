"""The testbed's models: transformers' Qwen3.5 trunks, and our own multi-token-prediction heads.

transformers drops `mtp.*` tensors on load and has no module for them. The heads here compute the same as `graph_mtp`
in llama.cpp's qwen35moe and qwen35, and their parameters have the names used in Qwen's checkpoints, so that the
converter understands them.

The final norm is uneven: its weights are log-normal random numbers, frozen before training. In such a small model
trained weights would stay nearly equal, and the hidden rows before and after the norm would look the same to a head
that normalizes them again; in real models they differ. Groups of CHANNELS neighbouring channels share a weight, so that
basis.py can rotate them into one another.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig, Qwen3_5TextConfig
from transformers.models.qwen3_5 import modeling_qwen3_5 as dense
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe

VOCAB_SIZE = 2048
HIDDEN = 192  # basis.py widens it to 256, the row length that k- and i-quants need
CHANNELS = 3  # neighbouring channels of the hidden state that share a weight of the final norm
SPREAD = 0.8  # sigma of the log-normal weights of the final norm


def config(token_ids: dict[str, int], kind: str) -> Any:
    """`moe`: every feature of the 35B-A3B that a quantizer meets, small. `dense`: the same for Qwen3.6-27B."""
    shared = {
        "vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN, "max_position_embeddings": 4096,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        "full_attention_interval": 4, "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
        "eos_token_id": token_ids["<|im_end|>"], "pad_token_id": token_ids["<|endoftext|>"], "bos_token_id": None,
    }  # fmt: skip
    if kind == "dense":
        return Qwen3_5TextConfig(**shared, num_hidden_layers=4, intermediate_size=768)
    return Qwen3_5MoeTextConfig(
        **shared, num_hidden_layers=6, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=256,
        shared_expert_intermediate_size=256,
    )  # fmt: skip


class MTPHead(nn.Module):
    """fc(cat(norm_e(embed(x[t+1])), norm_h(h[t]))) -> one full-attention block -> norm; the LM head is the trunk's."""

    def __init__(self, cfg: Any, kind: str) -> None:
        super().__init__()
        if kind == "dense":
            layer, norm = dense.Qwen3_5DecoderLayer, dense.Qwen3_5RMSNorm
        else:
            layer, norm = moe.Qwen3_5MoeDecoderLayer, moe.Qwen3_5MoeRMSNorm
        # transformers wants exactly num_hidden_layers layer types: take the index of an existing full-attention layer.
        full = cfg.layer_types.index("full_attention")
        self.fc = nn.Linear(2 * cfg.hidden_size, cfg.hidden_size, bias=False)
        self.pre_fc_norm_embedding = norm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.pre_fc_norm_hidden = norm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.layers = nn.ModuleList([layer(cfg, full)])
        self.norm = norm(cfg.hidden_size, eps=cfg.rms_norm_eps)

    def forward(
        self, embeddings: torch.Tensor, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """embeddings of x(p) and normed rows h(p-1), both [batch, positions, hidden] -> normed rows that predict
        x(p+1).
        """
        x = self.fc(torch.cat([self.pre_fc_norm_embedding(embeddings), self.pre_fc_norm_hidden(hidden)], dim=-1))
        return self.norm(self.layers[0](x, position_embeddings=rotary))


class Testbed(nn.Module):
    """Trunk and head together; `forward` returns the logits of both."""

    def __init__(self, cfg: Any, kind: str) -> None:
        super().__init__()
        self.trunk = (Qwen3_5ForCausalLM if kind == "dense" else Qwen3_5MoeForCausalLM)(cfg)
        self.mtp = MTPHead(cfg, kind)
        self.mtp.apply(self.trunk._init_weights)
        self._uneven_norms(cfg.hidden_size)
        self.rows: torch.Tensor | None = None
        self.routing: list[torch.Tensor] = []
        self.trunk.model.norm.register_forward_hook(lambda _module, _inputs, out: setattr(self, "rows", out))
        for module in self.modules():
            if isinstance(module, moe.Qwen3_5MoeTopKRouter):
                module.register_forward_hook(lambda _module, _inputs, out: self.routing.append(out[0]))

    def _uneven_norms(self, hidden: int) -> None:
        """Final norms of trunk and head: log-normal weights of mean square 1, the same for both, not trained."""
        drawn = torch.exp(SPREAD * torch.randn(-(-hidden // CHANNELS), generator=torch.Generator().manual_seed(24025)))
        weights = (drawn / drawn.square().mean().sqrt()).repeat_interleave(CHANNELS)[:hidden]
        for norm in (self.trunk.model.norm, self.mtp.norm):
            norm.weight.data.copy_(weights - 1)  # Qwen3.5 stores w and uses 1 + w
            norm.weight.requires_grad_(False)

    def forward(self, ids: torch.Tensor, depth: int = 2) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """ids [batch, T] -> trunk logits [batch, T, vocab], and the head's for each depth d >= 1: [batch, T-d, vocab].

        Row t of the trunk predicts x(t+1); row t of the head at depth 1 has seen x(t+1) and h(t), and predicts
        x(t+2). At depth 2 it gets its own normed row instead of h, as in drafting.
        """
        self.routing.clear()
        logits = self.trunk(input_ids=ids, use_cache=False).logits
        assert self.rows is not None
        drafted, rows = [], self.rows
        for d in range(1, depth + 1):
            positions = torch.arange(d, ids.shape[1], device=ids.device)[None, None, :].expand(3, ids.shape[0], -1)
            rotary = self.trunk.model.rotary_emb(rows, positions)
            rows = self.mtp(self.trunk.model.embed_tokens(ids[:, d:]), rows[:, :-1], rotary)
            drafted.append(self.trunk.lm_head(rows))
        return logits, drafted

    def balance_loss(self) -> torch.Tensor:
        """Switch Transformer's load-balancing loss (arXiv 2101.03961, equations 4 to 6), mean over the routers; 1 is
        even.
        """
        losses = []
        for router_logits in self.routing:
            probabilities = router_logits.softmax(-1)
            experts = probabilities.shape[-1]
            chosen = F.one_hot(probabilities.topk(2, dim=-1).indices, experts).sum(1).float().mean(0) / 2
            losses.append(experts * (chosen * probabilities.mean(0)).sum())
        return torch.stack(losses).mean() if losses else torch.zeros(())

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors like Qwen's checkpoints, with the head as `mtp.*`, in float32."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().float().cpu().contiguous() for name, value in self.trunk.state_dict().items()}
        tensors |= {
            f"mtp.{name}": value.detach().float().cpu().contiguous() for name, value in self.mtp.state_dict().items()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        written = self.trunk.config.to_dict() | {
            "architectures": [type(self.trunk).__name__], "mtp_num_hidden_layers": len(self.mtp.layers),
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
