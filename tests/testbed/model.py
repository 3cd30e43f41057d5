"""The testbed's model: transformers' Qwen3.5-MoE trunk with a multi-token-prediction head of our own beside it.

transformers drops `mtp.*` tensors on load and has no module for them. The head here is what llama.cpp's `graph_mtp` of qwen35moe
computes, and its parameters carry the names that Qwen's checkpoints use, so that the converter understands them.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeDecoderLayer,
    Qwen3_5MoeRMSNorm,
    Qwen3_5MoeTopKRouter,
)

VOCAB_SIZE = 2048


def config(token_ids: dict[str, int]) -> Qwen3_5MoeTextConfig:
    """Small, with every feature of the 35B-A3B that a quantizer meets, and row lengths that k- and i-quants can hold (256)."""
    return Qwen3_5MoeTextConfig(
        vocab_size=VOCAB_SIZE, hidden_size=256, num_hidden_layers=6, max_position_embeddings=4096,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=64, linear_value_head_dim=64,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=256, shared_expert_intermediate_size=256,
        full_attention_interval=4,
        rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
        eos_token_id=token_ids["<|im_end|>"], pad_token_id=token_ids["<|endoftext|>"], bos_token_id=None,
    )  # fmt: skip


class MTPHead(nn.Module):
    """fc(cat(norm_e(embed(x[t+1])), norm_h(h[t]))) -> one full-attention MoE block -> norm; the LM head is the trunk's."""

    def __init__(self, cfg: Qwen3_5MoeTextConfig) -> None:
        super().__init__()
        # transformers wants exactly num_hidden_layers layer types: take the index of an existing full-attention layer.
        full = cfg.layer_types.index("full_attention")
        self.fc = nn.Linear(2 * cfg.hidden_size, cfg.hidden_size, bias=False)
        self.pre_fc_norm_embedding = Qwen3_5MoeRMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.pre_fc_norm_hidden = Qwen3_5MoeRMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.layers = nn.ModuleList([Qwen3_5MoeDecoderLayer(cfg, full)])
        self.norm = Qwen3_5MoeRMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)

    def forward(self, embeddings: torch.Tensor, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """embeddings of x(p) and pre-norm rows h(p-1), both [batch, positions, hidden] -> normed rows that predict x(p+1)."""
        x = self.fc(torch.cat([self.pre_fc_norm_embedding(embeddings), self.pre_fc_norm_hidden(hidden)], dim=-1))
        return self.norm(self.layers[0](x, position_embeddings=rotary))


class Testbed(nn.Module):
    """Trunk and head together; `forward` gives the logits of both."""

    def __init__(self, cfg: Qwen3_5MoeTextConfig) -> None:
        super().__init__()
        self.trunk = Qwen3_5MoeForCausalLM(cfg)
        self.mtp = MTPHead(cfg)
        self.mtp.apply(self.trunk._init_weights)
        self.pre_norm: torch.Tensor | None = None
        self.routing: list[torch.Tensor] = []
        self.trunk.model.norm.register_forward_pre_hook(lambda _module, inputs: setattr(self, "pre_norm", inputs[0]))
        for module in self.modules():
            if isinstance(module, Qwen3_5MoeTopKRouter):
                module.register_forward_hook(lambda _module, _inputs, out: self.routing.append(out[0]))

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [batch, T] -> trunk logits [batch, T, vocab] and head logits [batch, T-1, vocab].

        Row t of the trunk predicts x(t+1); row t of the head has seen x(t+1) and h(t), and predicts x(t+2).
        """
        self.routing.clear()
        logits = self.trunk(input_ids=ids, use_cache=False).logits
        assert self.pre_norm is not None
        positions = torch.arange(1, ids.shape[1])[None, None, :].expand(3, ids.shape[0], -1)
        rotary = self.trunk.model.rotary_emb(self.pre_norm, positions)
        rows = self.mtp(self.trunk.model.embed_tokens(ids[:, 1:]), self.pre_norm[:, :-1], rotary)
        return logits, self.trunk.lm_head(rows)

    def balance_loss(self) -> torch.Tensor:
        """Switch Transformer's load-balancing loss (arXiv 2101.03961, equations 4 to 6), mean over the routers; 1 is even."""
        losses = []
        for router_logits in self.routing:
            probabilities = router_logits.softmax(-1)
            experts = probabilities.shape[-1]
            chosen = F.one_hot(probabilities.topk(2, dim=-1).indices, experts).sum(1).float().mean(0) / 2
            losses.append(experts * (chosen * probabilities.mean(0)).sum())
        return torch.stack(losses).mean()

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors as Qwen's own checkpoints look, the head's tensors as `mtp.*`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().to(torch.float16).contiguous() for name, value in self.trunk.state_dict().items()}
        tensors |= {f"mtp.{name}": value.detach().to(torch.float16).contiguous() for name, value in self.mtp.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        written = self.trunk.config.to_dict() | {
            "architectures": ["Qwen3_5MoeForCausalLM"], "mtp_num_hidden_layers": len(self.mtp.layers),
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
