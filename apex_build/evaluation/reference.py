"""The reference's log-probabilities at every scored position of a text: made once, and kept in the cache. Part of the
plugin API.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from apex_build.errors import ToolFailed
from apex_build.evaluation.chunked import planned, run, scored_positions, text_arguments
from apex_build.evaluation.task import Task
from apex_build.gguf_model.catalogue import Model

HEAD = struct.Struct(
    "<8s3i"
)  # b"_logits_", tokens in a chunk, tokens in the vocabulary, chunks (tools/perplexity/perplexity.cpp)
NAME = "reference.logits"


def reference_logits(task: Task, domain: str) -> Path:
    """Raises DiskTooSmall before anything is written; CalibrationSetInvalid, ToolFailed."""
    return task.kept(
        NAME, about_reference(task, domain), lambda part: make_reference(task, domain, part), of=task.reference
    )


def about_reference(task: Task, domain: str) -> dict[str, Any]:
    return {
        "text": task.identity_of_text(domain),
        "context": task.number("context"),
        "chunks": task.number("chunks"),
        "parse_special": bool(task.settings["parse_special"]),
    }


def make_reference(task: Task, domain: str, part: Path) -> None:
    """Raises DiskTooSmall before anything is written; CalibrationSetInvalid, ToolFailed."""
    reference, text = task.reference, task.texts[domain]
    assert reference is not None
    arguments = [*text_arguments(task, text), "--kl-divergence-base", part]
    what = f"reference {reference.path.name} on {domain or text.name}"
    run(_with_room(task, reference, part.parent), reference.path, text, arguments, what, planned)
    _check_whole(part, reference.path)


def logits_bytes(chunks: int, context: int, vocabulary: int) -> int:
    """Size of the tool's file: for each scored position 16 bits a token of the vocabulary (made even), and 8 bytes."""
    row = 2 * (2 * ((vocabulary + 1) // 2) + 4)
    return HEAD.size + chunks * (4 * context + scored_positions(context) * row)


def chunks_in(logits: Path) -> int:
    """Chunks in a complete file."""
    with logits.open("rb") as file:
        return int(HEAD.unpack(file.read(HEAD.size))[3])


def _with_room(task: Task, reference: Model, folder: Path) -> Task:
    """Stop before anything is written if the disk is too small."""
    context = task.number("context")
    vocabulary = len(reference.metadata.get("tokenizer.ggml.tokens", ()))
    each = scored_positions(context)

    def what(chunks: int) -> str:
        where = f"at {chunks * each} positions, each for {vocabulary} tokens,"
        return f"the file with the log-probabilities of {reference.path.name} {where}"

    return task.needing_room(folder, lambda chunks: logits_bytes(chunks, context, vocabulary), what)


def _check_whole(path: Path, model: Path) -> None:
    """The tool does not check whether its file could be written."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD.size)
    if len(head) == HEAD.size:
        magic, context, vocabulary, chunks = HEAD.unpack(head)
        expected = logits_bytes(chunks, context, vocabulary)
        if magic == b"_logits_" and size == expected:
            return
        found = f"expected {expected} bytes, found {size}"
    else:
        found = f"{size} bytes"
    raise ToolFailed(
        f"{model}: llama-perplexity did not write all of its log-probabilities: {found}",
        hint="check free disk space (df -h), then run the command again",
    )
