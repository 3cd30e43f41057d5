"""Train a testbed from its seed: `python tests/testbed/train.py OUT_DIR [--kind dense] [--device cuda]`.

Needs torch, transformers, tokenizers and safetensors (the extra `testbed`). Writes a Hugging Face folder in float32
and a training log; basis.py and then `apex convert` make the shipped GGUF from it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from pathlib import Path

import torch
from corpus import END_OF_TEXT, HERE, training_text
from model import VOCAB_SIZE, Testbed, config
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional as F

SEED = 22673
# Qwen's ChatML tokens are control tokens; the think and tool tokens are ordinary text to a reader, as in Qwen's own
# tokenizer.
CONTROL = [END_OF_TEXT, "<|im_start|>", "<|im_end|>"]
MARKUP = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
QWEN35_SPLIT = (  # src/llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_QWEN35, 'original regex from tokenizer.json'
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| "
    r"?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SHARE = {"code": 0.36, "topics": 0.06, "chat": 0.24, "reasoning": 0.18, "tool-calling": 0.16}
STEPS = {"moe": 2200, "dense": 1100}
WARMUP, PEAK, FLOOR = 60, 2.5e-3, 1.0e-4
LONG_FROM = 0.75  # the last quarter of the steps sees longer rows, so that a context of 512 is familiar


def train_tokenizer(documents: dict[str, list[str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN35_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    markup = len(CONTROL) + len(MARKUP)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - markup, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    sample = [text for domain, texts in documents.items() for text in texts[: 1500 if domain != "code" else 150]]
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKUP])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (HERE / "chat_template.jinja").read_text()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": END_OF_TEXT,
        "add_bos_token": False, "add_prefix_space": False, "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": template,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(template)


def streams(tokenizer: Tokenizer, documents: dict[str, list[str]]) -> dict[str, torch.Tensor]:
    """One long row of token ids per domain, with documents joined by the end-of-text token, and dialogues without."""
    out = {}
    for domain, texts in documents.items():
        end = [tokenizer.token_to_id(END_OF_TEXT)] if domain in ("code", "topics") else []
        out[domain] = torch.tensor([i for e in tokenizer.encode_batch(texts) for i in [*e.ids, *end]])
    return out


def batch(text: dict[str, torch.Tensor], rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """[rows, length + 1] token ids; each row is from a domain drawn by SHARE, at a random position."""
    weights = torch.tensor([SHARE[domain] for domain in text])
    domains = list(text)
    picked = torch.multinomial(weights, rows, replacement=True, generator=generator)
    out = []
    for index in picked.tolist():
        stream = text[domains[index]]
        start = int(torch.randint(len(stream) - length - 1, (1,), generator=generator))
        out.append(stream[start : start + length + 1])
    return torch.stack(out)


def learning_rate(step: int, steps: int) -> float:
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    return FLOOR + (PEAK - FLOOR) * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="Hugging Face folder to write")
    parser.add_argument("--kind", choices=("moe", "dense"), default="moe")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=200)
    options = parser.parse_args()
    steps = options.steps or STEPS[options.kind]
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    options.out.mkdir(parents=True, exist_ok=True)

    documents = training_text(SEED)
    tokenizer = train_tokenizer(documents)
    save_tokenizer(tokenizer, options.out)
    text = streams(tokenizer, documents)
    digest = hashlib.sha256("\0".join(t for d in sorted(documents) for t in documents[d]).encode()).hexdigest()

    model = Testbed(config({t: tokenizer.token_to_id(t) for t in CONTROL}, options.kind), options.kind).to(
        options.device
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.05},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=PEAK, betas=(0.9, 0.95),
    )  # fmt: skip
    log = (options.out / "train.log").open("w", buffering=1)

    def say(line: str) -> None:
        print(line, flush=True)
        print(line, file=log)

    say(
        f"seed {SEED}, kind {options.kind}, python {platform.python_version()}, torch {torch.__version__}, device "
        f"{options.device}"
    )
    say(f"training text sha256 {digest}")
    say("tokens by domain: " + ", ".join(f"{d} {len(s)}" for d, s in text.items()))
    sizes = (sum(p.numel() for p in part.parameters()) for part in (model.trunk, model.mtp))
    say("parameters: trunk {}, head {}".format(*sizes))
    began = time.monotonic()
    for step in range(steps):
        rows, length = (2, 640) if step >= LONG_FROM * steps else (5, 256)
        ids = batch(text, rows, length, generator).to(options.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        logits, drafted = model(ids[:, :-1])
        trunk_loss = cross_entropy(logits, ids[:, 1:])
        head_losses = [cross_entropy(rows, ids[:, 1 + depth :]) for depth, rows in enumerate(drafted, 1)]
        balance = model.balance_loss()
        # The small balance term keeps every expert in use, as Qwen's own training does (router_aux_loss_coef).
        (trunk_loss + 0.5 * head_losses[0] + 0.25 * head_losses[1] + 0.01 * balance).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == steps - 1:
            spent = time.monotonic() - began
            left = spent / (step + 1) * (steps - step - 1)
            losses = "  ".join(f"depth {d} {loss.item():.4f}" for d, loss in enumerate(head_losses, 1))
            say(f"step {step:5d}/{steps}  trunk {trunk_loss.item():.4f}  {losses}  balance {balance.item():.3f}  "
                f"lr {learning_rate(step, steps):.2e}  {spent:.0f} s, {left:.0f} s left")  # fmt: skip
        if (step + 1) % options.save_every == 0 or step == steps - 1:
            model.save(options.out)


if __name__ == "__main__":
    main()
