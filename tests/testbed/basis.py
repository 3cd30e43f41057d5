"""Write a trained testbed in another basis, in which quantization costs what it costs a large model: `python
tests/testbed/basis.py TRAINED OUT`.

A model trained for an hour loses far too little at low bits: its weights contain little information, and it lacks the
activation outliers of large models. The changes here are exact: the model computes the same (main() checks it), but its
weights are harder to round. Per part (trunk, head):

spare    The hidden state is widened from 192 to 256 channels: in every group of 4, the 3 trained channels and an empty
         one are mixed by a rotation. Each matrix that reads the hidden state then has a quarter of its input directions
         unused by any text, with weights `spare` times as large as those in use. Most weights of a large model are like
         that: they serve other input, and set the scales of the blocks that they share with weights in use. This raises
         the loss of all types by about the same factor.
spread   Norm weights are multiplied by s, and the columns of the matrices that read them divided by s; s is log-normal
         with this sigma. Likewise the rows of up and v, and the columns of down and o. These are the activation
         outliers of large models. This raises the loss of k-quants most, and makes an imatrix more valuable.

The final norm's weights are equal within a group of 3 (model.py), so that it commutes with the rotation. They are not
divided out: the head reads the rows after this norm.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from model import CHANNELS, HIDDEN
from safetensors.torch import load_file, save_file

WIDE = HIDDEN // CHANNELS * (CHANNELS + 1)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Dial:
    """How hard a part of the model is to round."""

    spare: float
    spread: float


# As calibrated against public figures of real models: docs/results/draft-head.md and wind-tunnel.md have the tables.
DIALS = {
    "moe": {"trunk": Dial(1.0, 0.3), "head": Dial(1.45, 0.4)},
    "dense": {"trunk": Dial(1.0, 0.3), "head": Dial(1.6, 0.4)},
}
# matrices that read a norm's output, by the norm before them (within a block)
READERS = {
    "input_layernorm": (
        "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
        "linear_attn.in_proj_qkv.weight",
        "linear_attn.in_proj_z.weight", "linear_attn.in_proj_a.weight", "linear_attn.in_proj_b.weight",
    ),
    "post_attention_layernorm": (
        "mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.shared_expert.gate_proj.weight",
        "mlp.shared_expert.up_proj.weight",
        "mlp.shared_expert_gate.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
    ),
}  # fmt: skip
WRITERS = (
    "self_attn.o_proj.weight", "linear_attn.out_proj.weight", "mlp.experts.down_proj",
    "mlp.shared_expert.down_proj.weight",
    "mlp.down_proj.weight",
)  # fmt: skip
SMALL = (
    "mlp.gate.weight",
    "mlp.shared_expert_gate.weight",
    "in_proj_a.weight",
    "in_proj_b.weight",
)  # no spare weights: few rows


class Basis:
    """The rotation and the random numbers, from one generator, so that a seed gives one model."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        used, empty = [], []
        for _ in range(HIDDEN // CHANNELS):
            q, _ = torch.linalg.qr(torch.randn(CHANNELS + 1, CHANNELS + 1, generator=self.random))
            used.append(q[:, :CHANNELS])
            empty.append(q[:, CHANNELS:])
        self.used = torch.block_diag(*used)  # [WIDE, HIDDEN], orthonormal columns
        self.empty = torch.block_diag(*empty)  # [WIDE, WIDE - HIDDEN], what no x' has anything of

    def scales(self, n: int, dial: Dial) -> torch.Tensor:
        return torch.exp(dial.spread * torch.randn(n, generator=self.random))

    def reader(self, weight: torch.Tensor, norm: torch.Tensor, scale: torch.Tensor, spare: float) -> torch.Tensor:
        """[..., HIDDEN] that reads a normed row -> [..., WIDE] that reads the wide one, whose norm has the weights
        `scale`.
        """
        narrow = weight * norm * math.sqrt(HIDDEN / WIDE)
        # a direction of the empty ones gets `spare` times the weight of a direction in use
        size = spare * narrow.square().mean().sqrt()
        drawn = torch.randn(*weight.shape[:-1], self.empty.shape[1], generator=self.random)
        return (narrow @ self.used.T + size * drawn @ self.empty.T) / scale

    def writer(self, weight: torch.Tensor) -> torch.Tensor:
        """[..., HIDDEN, inner] that adds to the hidden state -> [..., WIDE, inner]. The mean square of a row stays, for
        the norms' epsilon.
        """
        return self.used @ weight * math.sqrt(WIDE / HIDDEN)


def widened(tensors: Tensors, dials: dict[str, Dial], seed: int = 24025) -> Tensors:
    """All tensors of a checkpoint in the new basis. Norm weights are stored like Qwen3.5's: w stands for 1 + w."""
    basis, out = Basis(seed), dict(tensors)
    out["model.embed_tokens.weight"] = basis.writer(tensors["model.embed_tokens.weight"].T).T
    groups = (1 + tensors["model.norm.weight"])[::CHANNELS]
    wide_norm = groups.repeat_interleave(CHANNELS + 1)
    out["model.norm.weight"] = out["mtp.norm.weight"] = wide_norm - 1
    out["lm_head.weight"] = basis.reader(
        tensors["lm_head.weight"] * (1 + tensors["model.norm.weight"]),
        torch.ones(HIDDEN),
        wide_norm,
        dials["trunk"].spare,
    )
    blocks = sorted({name[: name.index(".", name.index("layers.") + 7)] for name in tensors if "layers." in name})
    for block in blocks:
        _block(basis, tensors, out, block, dials["head" if block.startswith("mtp.") else "trunk"])
    _joining(basis, tensors, out, dials["head"])
    return out


def _block(basis: Basis, tensors: Tensors, out: Tensors, block: str, dial: Dial) -> None:
    for norm, readers in READERS.items():
        scale = basis.scales(WIDE, dial)
        weights = 1 + tensors[f"{block}.{norm}.weight"]
        out[f"{block}.{norm}.weight"] = scale - 1
        for reader in readers:
            if (name := f"{block}.{reader}") in tensors:
                out[name] = basis.reader(tensors[name], weights, scale, 0.0 if reader.endswith(SMALL) else dial.spare)
    for writer in WRITERS:
        if (name := f"{block}.{writer}") in tensors:
            out[name] = basis.writer(tensors[name])
    _inner(basis, out, block, dial)


def _inner(basis: Basis, out: Tensors, block: str, dial: Dial) -> None:
    """Scale rows of up and columns of down, rows of v and columns of o: nothing between them mixes channels."""
    for up, down in (("mlp.up_proj", "mlp.down_proj"), ("mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")):
        if (name := f"{block}.{up}.weight") in out:
            scale = basis.scales(out[name].shape[0], dial)
            out[name] = out[name] * scale[:, None]
            out[f"{block}.{down}.weight"] = out[f"{block}.{down}.weight"] / scale
    if (name := f"{block}.mlp.experts.gate_up_proj") in out:
        experts, twice, _ = out[name].shape
        scale = basis.scales(experts * twice // 2, dial).reshape(experts, twice // 2)
        gate, up = out[name].chunk(2, dim=1)
        out[name] = torch.cat([gate, up * scale[:, :, None]], dim=1)
        out[f"{block}.mlp.experts.down_proj"] = out[f"{block}.mlp.experts.down_proj"] / scale[:, None, :]
    if (name := f"{block}.self_attn.v_proj.weight") in out:
        head = out[f"{block}.self_attn.q_norm.weight"].shape[0]
        scale = basis.scales(out[name].shape[0], dial)
        out[name] = out[name] * scale[:, None]
        o = out[f"{block}.self_attn.o_proj.weight"]
        repeats = o.shape[1] // scale.shape[0]  # query heads for each key-value head, next to one another
        columns = scale.reshape(-1, 1, head).expand(-1, repeats, -1).reshape(-1)
        out[f"{block}.self_attn.o_proj.weight"] = o / columns


def _joining(basis: Basis, tensors: Tensors, out: Tensors, dial: Dial) -> None:
    """mtp.fc, which reads two normed rows side by side and writes the head's hidden state."""
    halves = []
    for part, narrow in zip(("embedding", "hidden"), tensors["mtp.fc.weight"].chunk(2, dim=1), strict=True):
        scale = basis.scales(WIDE, dial)
        weights = 1 + tensors[f"mtp.pre_fc_norm_{part}.weight"]
        out[f"mtp.pre_fc_norm_{part}.weight"] = scale - 1
        halves.append(basis.reader(basis.writer(narrow), weights, scale, dial.spare))
    out["mtp.fc.weight"] = torch.cat(halves, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path)
    parser.add_argument("out", type=Path)
    for part in ("trunk", "head"):
        parser.add_argument(f"--{part}-spare", type=float)
        parser.add_argument(f"--{part}-spread", type=float)
    options = parser.parse_args()
    settings = json.loads((options.trained / "config.json").read_text())
    kind = "moe" if "Moe" in settings["architectures"][0] else "dense"
    dials = {}
    for part, dial in DIALS[kind].items():
        spare, spread = getattr(options, f"{part}_spare"), getattr(options, f"{part}_spread")
        dials[part] = Dial(dial.spare if spare is None else spare, dial.spread if spread is None else spread)
    tensors = {name: tensor.float() for name, tensor in load_file(options.trained / "model.safetensors").items()}
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "train.log"):
        shutil.copyfile(options.trained / name, options.out / name)
    wide = widened(tensors, dials)
    save_file(
        {name: tensor.half().contiguous() for name, tensor in wide.items()},
        options.out / "model.safetensors",
        metadata={"format": "pt"},
    )
    narrow, settings = settings, settings | {"hidden_size": WIDE}
    (options.out / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    off = (logits(kind, narrow, tensors) - logits(kind, settings, wide)).abs()
    print(kind, dials, f"difference of a logit in float32: largest {off.max():.1e}, mean {off.mean():.1e}")


def logits(kind: str, settings: dict[str, Any], tensors: Tensors) -> torch.Tensor:
    """The logits of trunk and head on random tokens."""
    from model import Testbed, config

    cfg = config({"<|im_end|>": settings["eos_token_id"], "<|endoftext|>": settings["pad_token_id"]}, kind)
    cfg.hidden_size = settings["hidden_size"]
    model = Testbed(cfg, kind)
    model.trunk.load_state_dict({n: t for n, t in tensors.items() if not n.startswith("mtp.")})
    model.mtp.load_state_dict({n.removeprefix("mtp."): t for n, t in tensors.items() if n.startswith("mtp.")})
    ids = torch.randint(0, 2048, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        trunk, drafted = model(ids)
    return torch.cat([trunk.flatten(), *(rows.flatten() for rows in drafted)])


if __name__ == "__main__":
    main()
