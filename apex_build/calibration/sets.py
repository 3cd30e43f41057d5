"""Calibration sets: a TOML file that names parts, each from a source, and the text they make together."""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apex_build.calibration.chat import ChatTemplate, Rendered, chat_template, try_render, without_system
from apex_build.errors import CalibrationSetInvalid, ChatTemplateFailed
from apex_build.gguf_model.catalogue import Model
from apex_build.hookspecs import Document, Source
from apex_build.near import nearby, no_such
from apex_build.places import data_root

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PART_KEYS = {"domain", "source", "bytes", "origin", "licence"}


@dataclass(frozen=True)
class Part:
    """One part of a set. `max_bytes`: of its rendered text, None for all there is. `options` go to the source as they
    are.
    """

    domain: str
    source: str
    max_bytes: int | None
    options: Mapping[str, Any]


@dataclass(frozen=True)
class CalibrationSet:
    name: str
    path: Path
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class PartText:
    """What a part gave: its documents, the bytes of text they make, and how many conversations the chat template
    refused.
    """

    domain: str
    source: str
    documents: int
    n_bytes: int
    refused: int


@dataclass(frozen=True)
class CalibrationText:
    """The text that llama-imatrix is run over, UTF-8, and what it is made of. `path`: the user's own file; `files`: all
    that it was made from; `warnings`: what is not in it, or not as its source has it, because the chat template does
    not take it.
    """

    name: str
    data: bytes
    parts: tuple[PartText, ...]
    path: Path | None = None
    files: tuple[Path, ...] = ()
    warnings: tuple[str, ...] = ()
    documents: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)  # (domain, text), in the text's order

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def known_sets(folder: str = "calibration_sets") -> list[str]:
    return sorted(path.stem for path in (data_root() / folder).glob("*.toml"))


def load_set(name: str, folder: str = "calibration_sets") -> CalibrationSet:
    """A built-in set by name, or the set of a TOML file. Raises CalibrationSetInvalid."""
    path = Path(name) if name.endswith(".toml") else data_root() / folder / f"{name}.toml"
    if not path.is_file():
        known = known_sets(folder)
        raise CalibrationSetInvalid(
            f"{path}: no such file" if name.endswith(".toml") else no_such("calibration set", name, known),
            hint="apex calibrate --calibration-set FILE.toml, or --text FILE",
        )
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CalibrationSetInvalid(f"{path}: not TOML: {error}") from None
    except OSError as error:
        raise CalibrationSetInvalid(f"{path}: cannot be read: {error.strerror}") from None
    parts = given.get("part")
    if not isinstance(parts, list) or not parts:
        raise CalibrationSetInvalid(f"{path}: expected at least one [[part]]")
    return CalibrationSet(path.stem, path, tuple(_part(path, number, part) for number, part in enumerate(parts, 1)))


def _part(path: Path, number: int, given: Any) -> Part:
    if not isinstance(given, dict):
        raise CalibrationSetInvalid(f"{path}: part {number} is {given!r}, expected a table: [[part]]")
    for key in ("domain", "source"):
        if not isinstance(given.get(key), str):
            raise CalibrationSetInvalid(f"{path}: part {number}: '{key}' is {given.get(key)!r}, expected a text")
    limit = given.get("bytes")
    if limit is not None and (type(limit) is not int or limit <= 0):
        raise CalibrationSetInvalid(f"{path}: part {number}: 'bytes' is {limit!r}, expected a whole number above 0")
    options = {key: value for key, value in given.items() if key not in _PART_KEYS}
    return Part(given["domain"], given["source"], limit, options)


def text_of_file(path: Path) -> CalibrationText:
    """A text of the user's own, as it is."""
    try:
        data = path.read_bytes()
        data.decode("utf-8")
    except OSError as error:
        raise CalibrationSetInvalid(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CalibrationSetInvalid(f"{path}: not UTF-8: byte {error.start} is {data[error.start]:#04x}") from None
    if not data.strip():
        raise CalibrationSetInvalid(f"{path}: the text is empty")
    return CalibrationText(
        path.name,
        data,
        (PartText("text", path.name, 1, len(data), 0),),
        path,
        (path,),
        documents=(("text", data),),
    )


def compose(
    chosen: CalibrationSet,
    sources: Mapping[str, Source],
    model: Model,
    *,
    domains: Collection[str] = (),
    template_file: Path | None = None,
) -> CalibrationText:
    """The text of a set for a model: documents of all parts, interleaved, so that every section contains every domain.

    Conversations are rendered with the model's chat template (or `template_file`). Raises CalibrationSetInvalid,
    ChatTemplateFailed, and PluginFailed for a source that raises.
    """
    known = sorted({part.domain for part in chosen.parts})
    for domain in sorted(domains):
        if domain not in known:
            raise CalibrationSetInvalid(
                f"{chosen.path}: {no_such('domain', domain, known)}",
                hint=f"apex calibrate --domain {known[0]}",
            )
    parts = [part for part in chosen.parts if not domains or part.domain in domains]
    texts: list[list[bytes]] = []
    summaries: list[PartText] = []
    warnings: list[str] = []
    left_out: list[tuple[str, str, bool]] = []  # domain, why, and whether the template failed
    template: ChatTemplate | None = None
    for part in parts:
        if part.source not in sources:
            raise CalibrationSetInvalid(
                f"{chosen.path}, domain {part.domain}: {no_such('source', part.source, sources)}"
            )
        _check_options(chosen, part, sources[part.source])
        where = f"{chosen.path}: the part {part.domain} ({part.source})"
        try:
            documents = list(_limited(sources[part.source].read(part.options, chosen.path.parent), part.max_bytes))
        except CalibrationSetInvalid as error:
            raise CalibrationSetInvalid(f"{where}: {error.message}", hint=error.hint) from None
        if template is None and any(document.messages for document in documents):
            template = chat_template(model, template_file)
        rendered, folded = _rendered(documents, template)
        lost = [one for one in rendered if one.text is None]
        kept = [
            _encoded(one.text, document, where) for one, document in zip(rendered, documents, strict=True) if one.text
        ]
        if folded:
            warnings.append(
                f"{folded.text} conversations of the part {part.domain} have their system message put before the "
                "user's first: the "
                f"chat template takes none ({folded.words!r})"
            )
        if not kept:
            if not lost:
                raise CalibrationSetInvalid(f"{where} gave no text")
            said = f"the chat template refused all of its {len(lost)} conversations: {lost[0].words!r}"
            left_out.append((part.domain, f"{where} gave no text: {said}", lost[0].failed))
            continue
        if lost:
            warnings.append(
                f"{len(lost)} of the {len(documents)} conversations of the part {part.domain} are left out: the chat "
                "template "
                f"refused them: {lost[0].words!r}"
            )
        if part.max_bytes is not None:
            kept = _cut(kept, part.max_bytes)
        texts.append(kept)
        summaries.append(PartText(part.domain, part.source, len(kept), sum(map(len, kept)), len(lost)))
    if not texts:
        _, message, failed = left_out[0]
        hint = "apex calibrate MODEL --chat-template FILE, with a template that works"
        raise (ChatTemplateFailed if failed else CalibrationSetInvalid)(message, hint=hint)
    for domain, message, _ in left_out:
        others = " ".join(f"--domain {one.domain}" for one in summaries)
        warnings.append(f"{message}. The part {domain} is left out; {others} does that without this warning")
    name = re.sub(r"[^\w.-]", "_", "-".join((chosen.name, *sorted(domains))))[:50]
    domains_of = [one.domain for one in summaries]
    ordered = tuple((domains_of[part], text) for part, text in _in_turn(texts))
    files = (chosen.path, *([template_file] if template_file else []), *_data_files(parts, chosen.path.parent))
    return CalibrationText(
        f"{name}.txt",
        b"".join(text for _, text in ordered),
        tuple(summaries),
        files=files,
        warnings=tuple(warnings),
        documents=ordered,
    )


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


def _check_options(chosen: CalibrationSet, part: Part, source: Source) -> None:
    """Raises CalibrationSetInvalid for a key that neither a part nor its source has: a misspelt limit would be none."""
    for name in part.options if source.options is not None else ():
        if name not in (known := source.options or ()):
            number = next(number for number, one in enumerate(chosen.parts, 1) if one is part)
            raise CalibrationSetInvalid(
                f"{chosen.path}: part {number} has no key '{name}'{nearby(name, (*_PART_KEYS, *known))}. "
                f"The source '{source.name}' takes: {', '.join(known)}; any part: {', '.join(sorted(_PART_KEYS))}"
            )


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
