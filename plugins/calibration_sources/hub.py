"""Hugging Face datasets: of a local folder, of the Hub at a pinned revision, or as the library's cache has them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apex_build.plugin_api import CalibrationSetInvalid, Document

from .shapes import document, without_nones

OPTIONS = ("dataset", "name", "split", "revision", "column", "columns", "streaming")
_SECONDS = 10.0  # to wait for the Hub before using the cache
_TRIES = 1  # at a stream that broke off: each is retried five times below, which takes half a minute
_COMMIT = re.compile(r"[0-9a-f]{40}")
_EXTRA = "pip install 'apex-build[hub]'"


def read_datasets(
    name: str, options: Mapping[str, Any], columns: Mapping[str, str], folder: Path
) -> Iterator[Document]:
    """`dataset`: a name of the Hub, with the `revision` that it is pinned to, or a folder beside the set. `name`: the
    configuration. `split`: train. `streaming`: true; false keeps all of it in the library's cache. `column` names the
    one of texts or messages, `columns` several.
    """
    try:
        import datasets
    except ImportError:
        raise CalibrationSetInvalid("the source 'datasets' needs the Python package datasets", hint=_EXTRA) from None
    local = folder / name
    if isinstance(options.get("column"), str):
        columns = {"text" if _is_text(options["column"]) else "messages": options["column"]}
    streaming = options.get("streaming", True)
    if not isinstance(streaming, bool):
        raise CalibrationSetInvalid(f"'streaming' is {streaming!r}, expected true or false")
    number = 0
    with _quiet(datasets), _named(name, datasets):
        rows = _local(local, options, streaming) if local.is_dir() else _of_hub(name, options, streaming)
        for number, row in enumerate(rows, 1):
            yield document(without_nones(dict(row)), f"{name}:{number}", _of_row(columns, row))
    if not number:
        raise CalibrationSetInvalid(f"dataset {name}: the split '{options.get('split', 'train')}' has no rows")


def _is_text(column: str) -> bool:
    return column in ("text", "content", "code")


def _of_row(columns: Mapping[str, str], row: Mapping[str, Any]) -> Mapping[str, str]:
    """`column`, as it was before `columns`: what it holds says whether it is a text."""
    if set(columns) == {"messages"} and isinstance(row.get(columns["messages"]), str):
        value = row[columns["messages"]].lstrip()
        return columns if value.startswith("[") else {"text": columns["messages"]}
    return columns


def _local(folder: Path, options: Mapping[str, Any], streaming: bool) -> Any:
    import datasets

    split = str(options.get("split", "train"))
    if any((folder / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):  # save_to_disk: arrow
        found = datasets.load_from_disk(str(folder))
        if not isinstance(found, datasets.DatasetDict):
            return found
        if split not in found:
            raise CalibrationSetInvalid(f"dataset {folder}: there is no split '{split}'; there are: {', '.join(found)}")
        return found[split]
    return datasets.load_dataset(str(folder), _config(options), split=split, streaming=streaming)


def _of_hub(name: str, options: Mapping[str, Any], streaming: bool) -> Any:
    """Of the Hub where it answers, else of the cache; and not without a revision that cannot move."""
    import datasets

    revision = options.get("revision")
    if not isinstance(revision, str) or not _COMMIT.fullmatch(revision):
        found = f"'revision' is {revision!r}" if revision is not None else "it has no 'revision'"
        raise CalibrationSetInvalid(
            f"dataset {name}: not pinned: {found}, expected the 40 digits of a commit; a branch or tag may be moved",
            hint="apex calibration-sets pin SET -o FILE.toml, which asks the Hub for it",
        )
    split, config = str(options.get("split", "train")), _config(options)
    if commit_of(name, revision):
        return datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
    wanted = f"revision {revision}, split {split}" + (f", configuration {config}" if config else "")
    hint = "again where the network is, with streaming = false in the [[part]]: that keeps it in the cache"
    with _offline():
        try:
            found = datasets.load_dataset(name, config, split=split, revision=revision)
        except (
            OSError,
            ValueError,
        ) as error:  # ConnectionError is one; of a configuration that is not cached: ValueError
            raise CalibrationSetInvalid(
                f"dataset {name}: the Hub cannot be reached, and the cache lacks it ({wanted}): {_first(error)}",
                hint=hint,
            ) from None
    kept = [Path(file["filename"]).parts for file in found.cache_files]
    if not any(revision in parts for parts in kept):  # offline the library takes whichever it has
        raise CalibrationSetInvalid(
            f"dataset {name}: the Hub cannot be reached, and the cache has another revision of it ({wanted})", hint=hint
        )
    return found


def pin_datasets(options: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The commit that the Hub has now, or that a branch or tag means now; a local folder moves with nothing."""
    name, revision = str(options.get("dataset")), options.get("revision")
    if (folder / name).is_dir():
        return {}
    commit = commit_of(name, str(revision) if revision is not None else None)
    if commit is None:
        raise CalibrationSetInvalid(f"dataset {name}: the Hub cannot be reached", hint="again where the network is")
    return {"revision": commit}


def commit_of(name: str, revision: str | None = None) -> str | None:
    """The commit that a revision (the newest) of a dataset is, asked of the Hub once; None if it cannot be reached.

    Raises CalibrationSetInvalid for a dataset or revision that the Hub does not have.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants, errors
    except ImportError:
        raise CalibrationSetInvalid("asking the Hub needs the Python package huggingface_hub", hint=_EXTRA) from None
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        found = hub.HfApi().dataset_info(name, revision=revision, timeout=_SECONDS)
        return str(found.sha)
    except errors.RevisionNotFoundError:
        raise CalibrationSetInvalid(
            f"dataset {name}: the Hub has no revision {revision}", hint="apex calibration-sets pin SET -o FILE.toml"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CalibrationSetInvalid(
            f"dataset {name}: not found on the Hub, or you have no access to it",
            hint="HF_TOKEN=... for one that asks for it; a folder is given relative to the set's file",
        ) from None
    except errors.HFValidationError as error:
        raise CalibrationSetInvalid(
            f"dataset {name}: neither a folder nor a name of the Hub: {_first(error)}"
        ) from None
    except Exception as error:  # of whatever HTTP library it uses: no network, no answer in time, or an error of theirs
        if not _of_the_network(error):
            raise
        return None


def _of_the_network(error: Exception) -> bool:
    known = ("aiohttp", "httpx", "httpcore", "requests", "urllib3", "huggingface_hub")
    return isinstance(error, OSError) or type(error).__module__.startswith(known)


def _config(options: Mapping[str, Any]) -> str | None:
    return str(options["name"]) if "name" in options else None


@contextlib.contextmanager
def _named(name: str, datasets: Any) -> Iterator[None]:
    """What the libraries raise for data that is not as it should be, with the dataset's name."""
    import pyarrow

    known = (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError, ValueError, RuntimeError)
    try:
        yield
    except CalibrationSetInvalid:
        raise
    except Exception as error:
        if not isinstance(error, known) and not _of_the_network(error):
            raise
        cause = error.__cause__ if error.__cause__ is not None else error
        raise CalibrationSetInvalid(f"dataset {name}: cannot be read: {_first(cause)}") from None


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars and no retries in the log: we report errors once."""
    import logging

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.CRITICAL)
    bars, tries = datasets.are_progress_bars_disabled(), datasets.config.STREAMING_READ_MAX_RETRIES
    datasets.disable_progress_bars()
    datasets.config.STREAMING_READ_MAX_RETRIES = _TRIES
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
        datasets.config.STREAMING_READ_MAX_RETRIES = tries
        if not bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """The libraries read these on every call; without them they would retry for half a minute."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
