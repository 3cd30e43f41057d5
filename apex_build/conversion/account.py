"""Account for every tensor of a checkpoint: it is in the model, or there is a reason why not, or the conversion is
refused.

What is in the model is known from the converter itself, not from names: driver.py follows each value to the tensor that
is written.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from apex_build.conversion.checkpoint import Checkpoint
from apex_build.conversion.heads import head_tensors, unknown_head
from apex_build.conversion.safetensors import tensor_bytes
from apex_build.errors import CheckpointInvalid, ConversionFailed, ParameterUnknown

# Tables that readers compute from the config.
_DERIVED = re.compile(
    r"(^|\.)(inv_freq|rotary_emb\.(cos|sin)_cached|position_ids|attention\.masked_bias|attn\.masked_bias)$"
)
_MASK = re.compile(r"(^|\.)(attention|attn)\.bias$")  # GPT-2's and GPT-NeoX's causal mask: 4 dimensions, not a bias
# The embedding and what may share its values: the output matrix, and a draft head's own copies of both.
_TIED = re.compile(r"(^|\.)(lm_head|embed_tokens|embed_out|output|head|wte|word_embeddings|emb)\.weight$")
_SEES = re.compile(
    r"(^|\.)(visual|vision\w*|audio\w*|image_\w+|mm_\w+|multi_modal_projector|patch_\w+|speech\w*|sound\w*|mlp1|vit\w*)(\.|$)"
)
_ACTIVATIONS = re.compile(r"\.(k_scale|v_scale|q_scale|input_scale|activation_scale|\w+_activation_scale|qscale_act)$")
_SHOWN = 6


@dataclass(frozen=True)
class Account:
    """`written`: each tensor of the model, with the checkpoint tensors that it is made of. `used`: all of those."""

    written: Mapping[str, tuple[str, ...]]
    used: frozenset[str]


def read_account(path: Path) -> Account:
    """What driver.py recorded."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        written = {str(name): tuple(sources) for name, sources in found["written"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionFailed(f"the converter's account of the tensors cannot be read: {error}") from None
    return Account(written, frozenset(found["read"]).union(*written.values()))


def dropped(checkpoint: Checkpoint, patterns: Iterable[str]) -> frozenset[str]:
    """Names that the patterns match (* and ? as in file names). Raises ParameterUnknown for one that matches none."""
    found: set[str] = set()
    for pattern in patterns:
        names = {name for name in checkpoint.tensors if fnmatchcase(name, pattern)}
        if not names:
            raise ParameterUnknown(
                f"--drop {pattern}: no tensor of {checkpoint.path} has such a name",
                hint="quote the pattern, and write it like a file pattern: 'mtp.*'",
            )
        found |= names
    return frozenset(found)


def left_out(
    checkpoint: Checkpoint, account: Account, drop: Collection[str], *, head: bool, other_file: bool, source: str
) -> dict[str, list[str]]:
    """Why tensors are not in the model: reason -> names.

    `head`: a draft head is wanted; `other_file`: the converter makes an mmproj file from such a checkpoint. Raises
    CheckpointInvalid naming the tensors without a reason.
    """
    reasons: dict[str, list[str]] = {}
    lost: list[str] = []
    of_head = head_tensors(checkpoint)
    for name in checkpoint.tensors:
        if name in account.used and name not in drop:
            continue
        if reason := (
            "left out by --drop"
            if name in drop
            else "of the draft head, left out by --no-head"
            if not head and name in of_head
            else _reason(checkpoint, name, account, other_file)
        ):
            reasons.setdefault(reason, []).append(name)
        else:
            lost.append(name)
    if lost:
        raise _refusal(checkpoint, lost, of_head, source)
    return reasons


def _reason(checkpoint: Checkpoint, name: str, account: Account, other_file: bool) -> str | None:
    info = checkpoint.tensors[name]
    if _DERIVED.search(name) or (_MASK.search(name) and len(info.shape) == 4):
        return "computed from the config"
    if checkpoint.quantization and _ACTIVATIONS.search(name):
        return "scales of activations, which llama.cpp does not use"
    if other_file and _SEES.search(name):
        return "for an mmproj file (vision, audio)"
    if _TIED.search(name) and (twin := _twin(checkpoint, name, account)):
        return f"the same values as {twin}"
    return None


def _twin(checkpoint: Checkpoint, name: str, account: Account) -> str | None:
    """A tensor in the model that has the same bytes."""
    info = checkpoint.tensors[name]
    for other in sorted(account.used):
        theirs = checkpoint.tensors.get(other)
        if theirs and _TIED.search(other) and (theirs.dtype, theirs.shape) == (info.dtype, info.shape):
            blocks = zip(tensor_bytes(checkpoint.path, info), tensor_bytes(checkpoint.path, theirs), strict=True)
            if all(one == two for one, two in blocks):
                return other
    return None


def _refusal(checkpoint: Checkpoint, lost: list[str], of_head: frozenset[str], source: str) -> CheckpointInvalid:
    if set(lost) <= of_head:
        return unknown_head(checkpoint, source, lost)
    more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
    patterns = " ".join(f"--drop {shlex.quote(pattern)}" for pattern in patterns_of(lost, checkpoint.tensors))
    return CheckpointInvalid(
        f"the converter of {source} would leave out {len(lost)} of the {len(checkpoint.tensors)} tensors of "
        f"{checkpoint.path} "
        f"silently: {', '.join(lost[:_SHOWN])}{more}",
        hint=f"if the model is right without them: apex convert {patterns}",
    )


def patterns_of(lost: Collection[str], names: Collection[str]) -> list[str]:
    """Patterns for --drop that match all lost names and no others: whole branches of the tree of names where
    possible.
    """
    kept = set(names) - set(lost)
    patterns: dict[str, None] = {}
    for name in lost:
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        parts = name.split(".")
        branches = (".".join([*parts[:length], "*"]) for length in range(1, len(parts)))
        alike = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        patterns[next((p for p in (*branches, alike) if not any(fnmatchcase(other, p) for other in kept)), name)] = None
    return list(patterns)
