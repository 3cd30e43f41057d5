"""Stage convert: a Hugging Face checkpoint to a GGUF model, its draft head included."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from apex_build.conversion.convert import Converted, Job, prepare, run
from apex_build.gguf_model.metadata import Setting
from apex_build.progress import Report, silent
from apex_build.source.fetch import ensure_source
from apex_build.source.pins import Pin, load_pin


@dataclass(frozen=True)
class ConvertOptions:
    """`head` False leaves out the draft head; `drop`: patterns of tensors that may be left out; `metadata`: keys to
    set.

    `python`: one with torch and transformers; by default conversion.environment.choose finds or makes one.
    """

    outtype: str = "auto"
    pre_tokenizer: str | None = None
    head: bool = True
    drop: tuple[str, ...] = ()
    metadata: tuple[Setting, ...] = ()
    python: Path | None = None
    threads: int | None = None
    force: bool = False


def plan(
    checkpoint: Path,
    out: Path,
    options: ConvertOptions = ConvertOptions(),
    *,
    pin: Pin | None = None,
    report: Report = silent,
) -> Job:
    """Run all checks; nothing is written. Raises as conversion.convert.prepare."""
    return prepare(
        checkpoint,
        ensure_source(pin or load_pin(), report),
        out,
        outtype=options.outtype,
        pre_tokenizer=options.pre_tokenizer,
        head=options.head,
        python=options.python,
        drop=options.drop,
        metadata=options.metadata,
        threads=options.threads,
        force=options.force,
    )


def convert(
    checkpoint: Path,
    out: Path,
    options: ConvertOptions = ConvertOptions(),
    *,
    pin: Pin | None = None,
    report: Report = silent,
) -> Converted:
    """Convert the checkpoint's folder to `out`, with the converter of a pin (the default one).

    Raises CheckpointInvalid, ParameterUnknown, ConversionFailed, ToolKilled, EnvironmentUnusable, OutputUnwritable,
    DiskTooSmall.
    """
    return run(plan(checkpoint, out, options, pin=pin, report=report), report)
