"""`apex convert`: a Hugging Face folder to a GGUF model, its draft head included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from apex_build.cli import show
from apex_build.cli.options import json_option
from apex_build.conversion.convert import OUTTYPES, Job, account_for, run
from apex_build.gguf_model.metadata import parse_meta
from apex_build.places import PIN_VARIABLE
from apex_build.source.pins import DEFAULT_PIN, load_pin
from apex_build.stages.convert import ConvertOptions, plan


@click.command()
@click.argument("hf_dir", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path), required=True, metavar="OUT.gguf", help="File to write."
)
@click.option(
    "--outtype",
    type=click.Choice(OUTTYPES),
    default="auto",
    show_default=True,
    help="auto: 16 bits, F16 or BF16 like the checkpoint.",
)
@click.option(
    "--pre-tokenizer",
    metavar="NAME",
    help="Pre-tokenizer of a tokenizer that the converter does not know, such as qwen35.",
)
@click.option("--no-head", is_flag=True, help="Convert without a draft head.")
@click.option("--drop", metavar="PATTERN", multiple=True, help="Leave out tensors with these names, such as 'mtp.*'.")
@click.option(
    "--meta",
    metavar="KEY=VALUE",
    multiple=True,
    help="Metadata: name, license, base_model=ORG/NAME, ... (several times).",
)
@click.option(
    "--pin",
    "pin_name",
    metavar="NAME",
    envvar=PIN_VARIABLE,
    default=DEFAULT_PIN,
    show_default=True,
    help="Pin whose converter to use.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads of the converter.  [default: as torch and NumPy choose]"
)
@click.option(
    "--python", type=click.Path(path_type=Path), help="Python with torch and transformers. [env: APEX_CONVERT_PYTHON]"
)
@click.option("--force", is_flag=True, help="Replace OUT.gguf, once the new one is complete.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be done.")
@json_option
def command(
    hf_dir: Path,
    out: Path,
    outtype: str,
    pre_tokenizer: str | None,
    no_head: bool,
    drop: tuple[str, ...],
    meta: tuple[str, ...],
    pin_name: str,
    threads: int | None,
    python: Path | None,
    force: bool,
    dry_run: bool,
    json_: bool,
) -> None:
    """Convert a Hugging Face checkpoint (config.json, tokenizer, safetensors) with the pinned llama.cpp's converter.

    A checkpoint whose config declares a draft head without tensors is refused: fine-tuned models often lose
    it. So is one with tensors that would be missing from the model, unless they are computed anyway or named by
    --drop. Name,
    license and base model are taken from the checkpoint (README.md, config.json), unless --meta says otherwise. No code
    of the checkpoint is run. The converter needs torch and transformers: from --python, from the Python that runs
    apex (pip install 'apex-build[convert]'), or else they are installed once into an environment in the cache,
    CPU-only if pip finds that.

    \b
    Examples:
      apex convert Qwen3.6-35B-A3B -o qwen3.6-35b-a3b-bf16.gguf --outtype bf16
      apex convert my-finetune -o out.gguf --dry-run
      apex convert my-finetune -o out.gguf --meta license=apache-2.0 --meta base_model=Qwen/Qwen3.6-35B-A3B
      apex convert my-model -o out.gguf --drop 'value_head.*'
      apex convert tests/hf -o small.gguf --pre-tokenizer qwen35 --python ~/torch/bin/python
    """
    with show.progress() as report:
        options = ConvertOptions(
            outtype, pre_tokenizer, not no_head, drop, tuple(parse_meta(meta)), python, threads=threads, force=force
        )
        job = plan(hf_dir, out, options, pin=load_pin(pin_name), report=report)
        done = None if dry_run else run(job, report)
        left_out = account_for(job, report) if done is None else done.left_out
    for warning in job.warnings:
        click.echo(f"warning: {warning}", err=True)
    for reason, names in (left_out or {}).items():
        show.note(f"note: {len(names)} tensors are not in the model, {reason}: {_shown(names)}")
    if left_out is None:
        show.note("note: the tensors that would be left out are known once the converter's environment is made")
    if json_:
        said = (
            {**done.manifest.json(), "size": done.manifest.n_bytes, "reused": done.reused}
            if done
            else {"left_out": left_out}
        )
        show.as_json({"path": str(out), **said, "checkpoint": _facts(job)})
    elif done is None:
        rows = [(name.replace("_", " "), value) for name, value in _facts(job).items()]
        show.table(
            f"{hf_dir} can be converted",
            ("what", "value"),
            [*rows, ("would write", f"{out}, about {show.size(job.n_bytes)}")],
        )
    else:
        n_head = done.head_layers
        head = f"draft head of {n_head} block{'s' * (n_head > 1)}" if n_head else "no draft head"
        how = "; reused: already made from the same inputs" if done.reused else ""
        click.echo(f"{out}: {show.size(done.manifest.n_bytes or 0)}, {done.tensors} tensors, {head}{how}")


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _facts(job: Job) -> dict[str, object]:
    return {
        "architecture": job.checkpoint.architecture,
        "trunk_layers": job.checkpoint.trunk_layers,
        "head_layers": job.checkpoint.head_layers,
        "tensors": len(job.checkpoint.tensors),
        "quantization": job.checkpoint.quantization or "none",
        "parameters": job.checkpoint.n_elements,
        "outtype": job.outtype,
        "pre_tokenizer": job.pre_tokenizer or "as the converter finds",
        "python": f"{job.python.executable} ({job.python.origin})",
    }
