"""The reference's log-probabilities at every scored position of a text: made once, and kept in the cache."""

from __future__ import annotations

import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

from apex_build.plugin_api import DiskTooSmall, Task, ToolFailed

from .chunked import planned, run, scored_positions, text_arguments

_ROOM = 256 << 20  # bytes that stay free
_HEAD = struct.Struct("<8s3i")  # b"_logits_", tokens in a chunk, tokens in the vocabulary, chunks (tools/perplexity/perplexity.cpp)


def reference_logits(task: Task, domain: str) -> Path:
    """Raises DiskTooSmall before anything is written; CalibrationSetInvalid, ToolFailed."""
    reference, text, context = task.reference, task.texts[domain], task.number("context")
    assert reference is not None

    def make(part: Path) -> None:
        def guard(step: Any) -> None:  # the tool has read the text by now, and knows its chunks
            if step.unit == "chunks" and step.total and step.done == 0:
                _check_disk(task, part.parent, int(step.total))
            task.report(step)

        arguments = [*text_arguments(task, text), "--kl-divergence-base", part]
        what = f"reference {reference.path.name} on {domain or text.name}"
        run(replace(task, report=guard), reference.path, text, arguments, what, planned)
        _check_whole(part, reference.path)

    about = {
        "text": task.identity_of_text(domain),
        "context": context,
        "chunks": task.number("chunks"),
        "parse_special": bool(task.settings["parse_special"]),
    }
    return task.kept("reference.logits", about, make, of=reference)


def logits_bytes(chunks: int, context: int, vocabulary: int) -> int:
    """Of the tool's file: for each scored position 16 bits a token of the vocabulary, made even in number, and 8 bytes."""
    row = 2 * (2 * ((vocabulary + 1) // 2) + 4)
    return _HEAD.size + chunks * (4 * context + scored_positions(context) * row)


def _check_disk(task: Task, folder: Path, chunks: int) -> None:
    assert task.reference is not None
    context = task.number("context")
    vocabulary = len(task.reference.metadata.get("tokenizer.ggml.tokens", ()))
    needed, free = logits_bytes(chunks, context, vocabulary), shutil.disk_usage(folder).free
    if free < needed + _ROOM:
        raise DiskTooSmall(
            f"{folder}: {free / 1e9:.2f} GB free, expected {(needed + _ROOM) / 1e9:.2f} GB: the log-probabilities of "
            f"{task.reference.path.name} at {chunks * scored_positions(context)} positions, each for {vocabulary} tokens, take "
            f"{needed / 1e9:.2f} GB, and {_ROOM / 1e9:.2f} GB are to stay free",
            hint=f"fewer positions (--set {task.evaluator}.chunks={max(1, chunks // 4)}), or APEX_CACHE_DIR on a larger disk",
        )


def _check_whole(path: Path, model: Path) -> None:
    """The tool does not look whether its file could be written."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
    if len(head) == _HEAD.size:
        magic, context, vocabulary, chunks = _HEAD.unpack(head)
        expected = logits_bytes(chunks, context, vocabulary)
        if magic == b"_logits_" and size == expected:
            return
        found = f"expected {expected} bytes, found {size}"
    else:
        found = f"{size} bytes"
    raise ToolFailed(f"{model}: llama-perplexity did not write all of its log-probabilities: {found}", hint="df -h, and run again")
