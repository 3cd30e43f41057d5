"""Compose the text of a calibration set for a model."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from apex_build.calibration.chat import (
    ChatTemplate,
    Rendered,
    chat_template,
    special_token,
    template_of_file,
    try_render,
    without_system,
)
from apex_build.calibration.draw import BYTES_A_TOKEN, Count, Drawn, budgets, draw
from apex_build.calibration.set_file import CalibrationSet as CalibrationSet
from apex_build.calibration.set_file import Part as Part
from apex_build.calibration.set_file import check_part
from apex_build.calibration.set_file import known_sets as known_sets
from apex_build.calibration.set_file import load_set as load_set
from apex_build.errors import CalibrationSetInvalid, ChatTemplateFailed
from apex_build.gguf_model.catalogue import Model
from apex_build.hookspecs import Document, Source
from apex_build.near import no_such


@dataclass(frozen=True)
class PartText:
    """What a part gave: its documents, the bytes of text they make, and how many conversations the chat template
    refused. `tokens`: where they were counted; `duplicates` and `near_duplicates`: documents left out since the set
    has them already; `heldout`: documents kept apart. `begins`: the first one's text.
    """

    domain: str
    source: str
    documents: int
    n_bytes: int
    refused: int
    tokens: int | None = None
    duplicates: int = 0
    near_duplicates: int = 0
    heldout: int = 0
    origin: str = ""
    licence: str = ""
    begins: str = ""


@dataclass(frozen=True)
class HeldOut:
    """Held-out text of one domain."""

    domain: str
    data: bytes
    documents: int
    tokens: int | None


@dataclass(frozen=True)
class CalibrationText:
    """The text that llama-imatrix is run over, UTF-8, and what it is made of. `path`: the user's own file; `files`: all
    that it was made from; `warnings`: what is not in it, or not as its source has it, because the chat template does
    not take it, or because a source has less than its weight asks for.
    """

    name: str
    data: bytes
    parts: tuple[PartText, ...]
    path: Path | None = None
    files: tuple[Path, ...] = ()
    warnings: tuple[str, ...] = ()
    documents: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)  # (domain, text), in the text's order
    heldout: tuple[HeldOut, ...] = field(default=(), repr=False)
    heldout_folder: Path | None = None  # where that was written

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def tokens(self) -> int | None:
        """Tokens of all parts; None if they were not counted."""
        counts = [part.tokens for part in self.parts]
        return sum(count or 0 for count in counts) if counts and None not in counts else None


def text_of_file(path: Path) -> CalibrationText:
    """The user's text, unchanged."""
    try:
        data = path.read_bytes()
        data.decode("utf-8")
    except OSError as error:
        raise CalibrationSetInvalid(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CalibrationSetInvalid(f"{path}: not UTF-8: byte {error.start} is {data[error.start]:#04x}") from None
    if not data.strip():
        raise CalibrationSetInvalid(f"{path}: the text is empty")
    part = PartText("text", path.name, 1, len(data), 0)
    return CalibrationText(path.name, data, (part,), path, (path,), documents=(("text", data),))


def compose(
    chosen: CalibrationSet,
    sources: Mapping[str, Source],
    model: Model,
    *,
    domains: Collection[str] = (),
    template_file: Path | None = None,
    fallback: Path | None = None,
    count: Count | None = None,
    heldout: float | None = None,
) -> CalibrationText:
    """The text of a set for a model: documents of all parts, interleaved, so that every section contains every domain.

    Conversations are rendered with the model's chat template (or `template_file`), and those that it does not take with
    `fallback`, if that is given. `count`: the model's tokenizer, which a set with weights needs. `heldout`: the share
    to keep apart, instead of the set's own.

    Raises CalibrationSetInvalid, ChatTemplateFailed, PluginFailed for a source that raises, and what `count` raises.
    """
    known = sorted({part.domain for part in chosen.parts})
    for domain in sorted(domains):
        if domain not in known:
            raise CalibrationSetInvalid(
                f"{chosen.path}: {no_such('domain', domain, known)}",
                hint=f"apex calibrate --domain {known[0]}",
            )
    if chosen.weighted and count is None:
        raise CalibrationSetInvalid(f"{chosen.path}: its weights are in tokens, which nothing counts here")
    parts = [part for part in chosen.parts if not domains or part.domain in domains]
    wanted = [n for part, n in zip(chosen.parts, budgets(chosen), strict=True) if not domains or part.domain in domains]
    read = _read(chosen, parts, sources, _Templates(model, template_file, fallback), wanted)
    kept = [one for one in read if one.texts]
    if not kept:
        hint = "apex calibrate MODEL --chat-template FILE, with a template that works"
        raise (ChatTemplateFailed if read[0].failed else CalibrationSetInvalid)(read[0].lost, hint=hint)
    share = chosen.heldout if heldout is None else heldout
    drawn = draw(chosen, [one.texts for one in kept], [one.part.weight for one in kept], count, share)
    warnings = [warning for one in read for warning in one.warnings]
    for one in read:
        if one.lost:
            others = " ".join(f"--domain {other.part.domain}" for other in kept)
            domain = one.part.domain
            warnings.append(f"{one.lost}. The part {domain} is left out; {others} does that without this warning")
    texts: list[list[bytes]] = []
    for one, of in zip(kept, drawn, strict=True):
        limit, tokens = one.part.max_bytes, one.wanted
        texts.append(list(of.texts) if limit is None else _cut(of.texts, limit))
        if tokens and of.available < 0.95 * tokens:
            warnings.append(f"the part {one.part.domain} has {of.available} tokens, and its weight asks for {tokens}")
        if not texts[-1]:
            raise CalibrationSetInvalid(f"{one.where} gave no text: all of its documents are in other parts already")
    name = re.sub(r"[^\w.-]", "_", "-".join((chosen.name, *sorted(domains))))[:50]
    given = (file for file in (template_file, fallback) if file)
    ordered = [(kept[part].part.domain, text) for part, text in _in_turn(texts)]
    ordered[0] = (ordered[0][0], _without_second_bos(ordered[0][1], model))
    return CalibrationText(
        f"{name}.txt",
        b"".join(text for _, text in ordered),
        tuple(_summary(one, of, taken) for one, of, taken in zip(kept, drawn, texts, strict=True)),
        files=(chosen.path, *given, *_data_files(parts, chosen.path.parent)),
        warnings=tuple(warnings),
        documents=tuple(ordered),
        heldout=_held_out([one.part.domain for one in kept], drawn, model),
    )


@dataclass(frozen=True)
class _Templates:
    model: Model
    file: Path | None
    fallback: Path | None

    def first(self) -> ChatTemplate:
        return chat_template(self.model, self.file)

    def second(self) -> ChatTemplate | None:
        return template_of_file(self.model, self.fallback) if self.fallback else None


@dataclass(frozen=True)
class _PartRead:
    """A part's texts, of which so many tokens are `wanted`; `lost`: why it has none, where the chat template took none
    of its conversations.
    """

    part: Part
    where: str
    wanted: int | None
    texts: tuple[bytes, ...]
    refused: int
    warnings: tuple[str, ...]
    lost: str = ""
    failed: bool = False


def _read(
    chosen: CalibrationSet,
    parts: Sequence[Part],
    sources: Mapping[str, Source],
    templates: _Templates,
    wanted: Sequence[int | None],
) -> list[_PartRead]:
    first: ChatTemplate | None = None
    found = []
    of = [check_part(chosen, part, sources) for part in parts]  # before any is read, which may take long
    for part, source, tokens in zip(parts, of, wanted, strict=True):
        where = f"{chosen.path}: the part {part.domain} ({part.source})"
        limit = tokens * BYTES_A_TOKEN if tokens else part.max_bytes
        try:
            documents = list(_limited(source.read(part.options, chosen.path.parent), limit))
        except CalibrationSetInvalid as error:
            raise CalibrationSetInvalid(f"{where}: {error.message}", hint=error.hint) from None
        if first is None and any(document.messages for document in documents):
            first = templates.first()
        found.append(_part_read(part, where, tokens, documents, first, templates.second()))
    return found


def _part_read(
    part: Part,
    where: str,
    wanted: int | None,
    documents: Sequence[Document],
    first: ChatTemplate | None,
    second: ChatTemplate | None,
) -> _PartRead:
    warnings: list[str] = []
    rendered, folded = _rendered(documents, first)
    if second and (taken := _fall_back(rendered, documents, second)):
        warnings.append(
            f"{taken} conversations of the part {part.domain} are written with {second.origin}: the chat template does "
            "not take them"
        )
    lost = [(one, document) for one, document in zip(rendered, documents, strict=True) if one.text is None]
    texts = [_encoded(one.text, document, where) for one, document in zip(rendered, documents, strict=True) if one.text]
    if folded:
        warnings.append(
            f"{folded.text} conversations of the part {part.domain} have their system message put before the user's "
            f"first: the chat template takes none ({folded.words!r})"
        )
    if not texts and not lost:
        raise CalibrationSetInvalid(f"{where} gave no text")
    words = f"{lost[0][0].words!r}, at {lost[0][0].where(lost[0][1])}" if lost else ""
    if not texts:
        said = f"{where} gave no text: the chat template refused all of its {len(lost)} conversations: {words}"
        return _PartRead(part, where, wanted, (), len(lost), tuple(warnings), said, lost[0][0].failed)
    if lost:
        warnings.append(
            f"{len(lost)} of the {len(documents)} conversations of the part {part.domain} are left out: the chat "
            f"template refused them: {words}"
        )
    return _PartRead(part, where, wanted, tuple(texts), len(lost), tuple(warnings))


def _fall_back(rendered: list[Rendered], documents: Sequence[Document], template: ChatTemplate) -> int:
    """Render rejected documents with another template, in place; returns how many it accepted."""
    again = [at for at, one in enumerate(rendered) if one.text is None]
    taken = 0
    for at, one in zip(again, try_render(template, [documents[at] for at in again]), strict=True):
        if one.text is not None:
            rendered[at], taken = one, taken + 1
    return taken


def _summary(one: _PartRead, of: Drawn, taken: Sequence[bytes]) -> PartText:
    part, counts = one.part, dict(zip(of.texts, of.tokens, strict=False))  # none where they were not counted
    return PartText(
        part.domain,
        part.source,
        len(taken),
        sum(map(len, taken)),
        one.refused,
        sum(counts[text] for text in taken) if counts else None,
        of.duplicates,
        of.near_duplicates,
        len(of.heldout),
        part.origin,
        part.licence,
        taken[0].decode(),
    )


def _held_out(domains: Sequence[str], drawn: Sequence[Drawn], model: Model) -> tuple[HeldOut, ...]:
    """By domain: parts of the same one are put together."""
    found = []
    for domain in dict.fromkeys(domains):
        of = [one for name, one in zip(domains, drawn, strict=True) if name == domain]
        texts = [text for one in of for text in one.heldout]
        counted = all(len(one.heldout_tokens) == len(one.heldout) for one in of)
        tokens = sum(sum(one.heldout_tokens) for one in of) if counted else None
        if texts:
            found.append(HeldOut(domain, _without_second_bos(b"".join(texts), model), len(texts), tokens))
    return tuple(found)


def _without_second_bos(data: bytes, model: Model) -> bytes:
    """The tools put the beginning-of-text token before a text (where the model's file does not say otherwise): one that
    the chat template wrote there would be the second.
    """
    if model.metadata.get("tokenizer.ggml.add_bos_token") is False:
        return data
    return data.removeprefix(special_token(model, "bos").encode())


def _data_files(parts: Sequence[Part], folder: Path) -> Iterator[Path]:
    """Files that the parts' options name, whatever the source: by name, or a folder with a pattern."""
    for part in parts:
        pattern = str(part.options.get("pattern", "**/*"))
        for path in [folder / value for value in part.options.values() if isinstance(value, str) and "\0" not in value]:
            if path.is_file():
                yield path
            elif path.is_dir():
                with contextlib.suppress(ValueError, NotImplementedError):  # no such pattern
                    yield from path.glob(pattern)


def _limited(documents: Iterator[Document], max_bytes: int | None) -> Iterator[Document]:
    """No more documents than can be needed: a template never writes less than the content of the messages."""
    total = 0
    for document in documents:
        yield document
        total += len(document.text or "") + sum(len(str(message.get("content") or "")) for message in document.messages)
        if max_bytes is not None and total >= max_bytes:
            return


def _rendered(documents: Sequence[Document], template: ChatTemplate | None) -> tuple[list[Rendered], Rendered | None]:
    """What each document gives; and where system messages had to be moved, of how many, with the words of the first
    refusal.
    """
    conversations = [document for document in documents if document.messages]
    found = try_render(template, conversations) if template else []
    moved = 0
    words = ""
    if template and any(
        one.text is None for one in found
    ):  # some templates take no system message: its text need not be lost
        again = [
            (at, other)
            for at, one in enumerate(found)
            if one.text is None and (other := without_system(conversations[at]))
        ]
        for (at, _), one in zip(again, try_render(template, [other for _, other in again]), strict=True):
            if one.text is not None:
                moved, words = moved + 1, words or found[at].words
                found[at] = one
    texts = iter(found)
    plain = (f"{text}\n\n" if (text := (document.text or "").strip()) else "" for document in documents)
    rendered = [
        next(texts) if document.messages else Rendered(text) for document, text in zip(documents, plain, strict=True)
    ]
    return rendered, Rendered(str(moved), words) if moved else None


def _encoded(text: str, document: Document, where: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationSetInvalid(
            f"{where}: {document.origin}: {text[error.start]!r} is not a character: half of a pair"
        ) from None


def _cut(texts: Sequence[bytes], max_bytes: int) -> list[bytes]:
    """Whole documents while they fit; the first one is always kept."""
    kept: list[bytes] = []
    total = 0
    for text in texts:
        if kept and total + len(text) > max_bytes:
            continue
        kept.append(text)
        total += len(text)
    return kept


def _in_turn(texts: Sequence[Sequence[bytes]]) -> Iterator[tuple[int, bytes]]:
    """Documents of all parts with their parts' numbers, always from the part of which the smallest share was taken: all
    run out together.
    """
    totals = [sum(map(len, part)) for part in texts]
    out, given = [0] * len(texts), [0] * len(texts)
    for _ in range(sum(map(len, texts))):
        part = min((p for p in range(len(texts)) if given[p] < len(texts[p])), key=lambda p: out[p] / totals[p])
        text = texts[part][given[part]]
        yield part, text
        out[part] += len(text)
        given[part] += 1
