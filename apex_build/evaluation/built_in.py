"""The built-in evaluation set: default texts and prompts of four domains, distinct from the calibration set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from apex_build.calibration.chat import chat_template, render
from apex_build.calibration.sets import CalibrationSet, compose, load_set
from apex_build.evaluation.task import Prompt
from apex_build.gguf_model.catalogue import Model
from apex_build.hookspecs import Document, Source
from apex_build.places import cache_root
from apex_build.storage.outputs import whole_file

NAME = "default"
FOLDER = "evaluation_sets"
_LINES = 40  # of a source file in a prompt, at most


def evaluation_set(name: str = NAME) -> CalibrationSet:
    """Raises CalibrationSetInvalid."""
    return load_set(name, folder=FOLDER)


def built_in_texts(model: Model, sources: Mapping[str, Source], template_file: Path | None = None) -> dict[str, Path]:
    """A UTF-8 text for each domain, as the model's chat template writes it, in the cache.

    Raises CalibrationSetInvalid, ChatTemplateFailed (where the model has no chat template).
    """
    chosen = evaluation_set()
    texts: dict[str, Path] = {}
    for domain in dict.fromkeys(part.domain for part in chosen.parts):
        text = compose(chosen, sources, model, domains=(domain,), template_file=template_file)
        folder = cache_root() / "evaluation" / "texts" / text.sha256[:32]
        path = folder / f"{domain}.txt"
        if not path.is_file() or path.stat().st_size != len(text.data):
            folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as part:
                part.write_bytes(text.data)
        texts[domain] = path
    return texts


def built_in_prompts(
    model: Model, sources: Mapping[str, Source], count: int, template_file: Path | None = None
) -> tuple[Prompt, ...]:
    """`count` prompts of each domain: a conversation up to its first answer, or the first lines of a source file.

    Raises CalibrationSetInvalid, ChatTemplateFailed.
    """
    chosen = evaluation_set()
    prompts: list[Prompt] = []
    template = None
    for part in chosen.parts:
        documents = [_beginning(one) for one in sources[part.source].read(part.options, chosen.path.parent)]
        spread = documents[:: max(1, len(documents) // count)][:count]  # from all of the set, not only its start
        conversations = [one for one in spread if one.messages]
        if conversations and template is None:
            template = chat_template(model, template_file)
        texts = iter(render(template, conversations, answer_begins=True) if template and conversations else ())
        for one in spread:
            if text := next(texts) if one.messages else one.text:
                prompts.append(Prompt(part.domain, text, one.origin))
    return tuple(prompts)


def _beginning(document: Document) -> Document:
    if document.text is not None:
        lines = document.text.splitlines(keepends=True)
        return Document(document.domain, "".join(lines[: min(_LINES, len(lines) // 2)]), origin=document.origin)
    before = next(
        (n for n, message in enumerate(document.messages) if message.get("role") == "assistant"), len(document.messages)
    )
    return Document(document.domain, None, document.messages[:before], document.tools, document.origin)
