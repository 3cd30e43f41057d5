"""The references of several texts as one file, so that a run of llama-perplexity can score all of them.

The tool takes the tokens that it scores from the file with the reference's log-probabilities. Nothing but the order of
the chunks says which text a chunk is of: each is evaluated from an empty cache, with the model's BOS in the place of
its first token where the model has one. So the chunks of several files can be put into one: first chunk 0 of every
text, then chunk 1 of every text that has one, and so on. The first chunks of each text, however many, are then the
first ones of the file, and what was scored on fewer or with a smaller reference keeps its place.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from apex_build.evaluation.reference import (
    HEAD,
    NAME,
    about_reference,
    chunks_in,
    logits_bytes,
    make_reference,
    reference_logits,
)
from apex_build.evaluation.task import Task
from apex_build.progress import Step
from apex_build.storage.disk import check_room

_JOINED = "joined.logits"
_BUFFER = 4 << 20


@dataclass(frozen=True)
class JoinedRecord:
    """What the manifest of a joined file says beyond its head: also the chunks of each text."""

    name: str
    chunks: tuple[int, ...]


@dataclass(frozen=True)
class Reference:
    """One file for all texts. `chunks`: how many each of them has, in the order of `distinct_texts`."""

    logits: Path
    chunks: tuple[int, ...]


def distinct_texts(task: Task) -> dict[str, str]:
    """Identity of each text -> one domain that has it, in an order that depends on the texts alone."""
    found = {task.identity_of_text(domain): domain for domain in task.texts}
    return dict(sorted(found.items()))


def places(chunks: Sequence[int]) -> list[tuple[int, int]]:
    """(number of the text, number of the chunk in it) of each chunk of the file."""
    rounds = range(max(chunks, default=0))
    return [(text, number) for number in rounds for text, many in enumerate(chunks) if number < many]


def first_chunks(chunks: Sequence[int], few: int) -> int:
    """How many chunks of the file the first `few` chunks of each text are: those at its start."""
    return sum(min(many, few) for many in chunks)


def joined_reference(task: Task) -> Reference:
    """The reference's log-probabilities on all texts. A single text has its own file alone, the same as for other
    evaluations.

    The files of several texts are removed once they are joined, except those of other evaluations. Raises
    DiskTooSmall, CalibrationSetInvalid, ToolFailed.
    """
    texts = distinct_texts(task)
    if len(texts) == 1:
        logits = reference_logits(task, *texts.values())
        return Reference(logits, (chunks_in(logits),))
    with task.keeping(_JOINED, _about(task, texts), of=task.reference) as draft:
        if not draft.found:
            parts = [_part(task, domain, texts) for domain in texts.values()]
            draft.done(JoinedRecord(_JOINED, join(parts, draft.part, task)))
        for domain in texts.values():  # in the block: no other run is making them again
            shutil.rmtree(_own(task, domain, texts).parent, ignore_errors=True)
    made = draft.made or draft.found
    assert made is not None
    return Reference(draft.artifact.out, tuple(made.details["chunks"]))


def known_chunks(task: Task) -> tuple[int, ...] | None:
    """The chunks of each text, if the reference is there already."""
    texts = distinct_texts(task)
    if len(texts) == 1:
        about = about_reference(task, *texts.values())
        found = task.kept_before(NAME, about, of=task.reference)
        return (chunks_in(task.kept_as(NAME, about, of=task.reference).out),) if found else None
    found = task.kept_before(_JOINED, _about(task, texts), of=task.reference)
    return tuple(found.details["chunks"]) if found else None


def join(parts: Sequence[Path], out: Path, task: Task) -> tuple[int, ...]:
    """Write the joined file of complete ones; the chunks of each. Raises DiskTooSmall before anything is written."""
    with ExitStack() as stack:
        files = [stack.enter_context(part.open("rb")) for part in parts]
        heads = [HEAD.unpack(file.read(HEAD.size)) for file in files]
        magic, context, vocabulary, _ = heads[0]
        chunks = tuple(int(head[3]) for head in heads)
        n_bytes = logits_bytes(sum(chunks), context, vocabulary)
        what = f"the file with the log-probabilities of {len(parts)} texts, made of one of each that is there already,"
        check_room(out.parent, n_bytes, what, hint=task.hint_of_room(max(chunks)))
        tokens = [file.read(4 * context * many) for file, many in zip(files, chunks, strict=True)]
        order = places(chunks)
        target = stack.enter_context(out.open("wb"))
        target.write(HEAD.pack(magic, context, vocabulary, len(order)))
        for text, number in order:
            target.write(tokens[text][4 * context * number : 4 * context * (number + 1)])
        scores = logits_bytes(1, context, vocabulary) - HEAD.size - 4 * context
        for done, (text, _) in enumerate(order):  # each file is read from its start to its end
            task.report(Step(f"{task.evaluator}: joining the references of {len(parts)} texts", done, len(order)))
            _copy(files[text], target, scores)
    return chunks


def _copy(source: IO[bytes], target: IO[bytes], n_bytes: int) -> None:
    while n_bytes:
        data = source.read(min(n_bytes, _BUFFER))
        assert data, f"{source.name} has become shorter"
        target.write(data)
        n_bytes -= len(data)


def _part(task: Task, domain: str, texts: Mapping[str, str]) -> Path:
    """A text's own file: another evaluation's if there is one, else one that only the joined file is made of."""
    about = about_reference(task, domain)
    if task.kept_before(NAME, about, of=task.reference):
        return task.kept_as(NAME, about, of=task.reference).out
    about |= _joined_with(texts)
    return task.kept(NAME, about, lambda part: make_reference(task, domain, part), of=task.reference)


def _own(task: Task, domain: str, texts: Mapping[str, str]) -> Path:
    return task.kept_as(NAME, about_reference(task, domain) | _joined_with(texts), of=task.reference).out


def _joined_with(texts: Mapping[str, str]) -> dict[str, Any]:
    return {"joined_with": list(texts)}


def _about(task: Task, texts: Mapping[str, str]) -> dict[str, Any]:
    shared = about_reference(task, next(iter(texts.values())))
    return {**shared, "text": list(texts)}
