"""`apex inspect`: the contents of a model or an imatrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from apex_build.cli import heat, show
from apex_build.cli.options import json_option
from apex_build.errors import BuildMissing, ImatrixInvalid
from apex_build.gguf_model.catalogue import Model
from apex_build.gguf_model.coverage import FEW, Coverage, coverage, disagreements
from apex_build.gguf_model.examine import Examined, examine
from apex_build.gguf_model.expert_grid import ExpertGrid, expert_grid
from apex_build.gguf_model.fused import crossed
from apex_build.gguf_model.header import Header, read_header
from apex_build.gguf_model.imatrix import Imatrix, looks_legacy, read_imatrix
from apex_build.gguf_model.model import kind_of, model_of, read_model
from apex_build.gguf_model.summary import (
    ModelSummary,
    by_role,
    imatrix_json,
    model_json,
    summarize,
    tensors_json,
    tokens,
)
from apex_build.native.toolset import Toolset, find_toolset
from apex_build.plugins import load_plugins
from apex_build.quantization.load_check import doubts
from apex_build.report.heat import draw_heat
from apex_build.report.plot import MISSING, available
from apex_build.storage.outputs import check_apart, check_place, refuse

_OTHER_PLOT = "give another name with --plot"
_LISTED = 12  # names shown before "and N more"


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--model", "model_path", type=click.Path(path_type=Path), help="The model of an imatrix: shows what has data."
)
@click.option(
    "--tensors", is_flag=True, help="List every tensor (of an imatrix, with --model: all tensors without data)."
)
@click.option(
    "--few",
    type=click.FloatRange(0, 1),
    default=FEW,
    show_default=True,
    help="An expert with less than this part of an even share of tokens counts as undertrained.",
)
@click.option(
    "--plugin",
    "folders",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Load a plugin from this folder (for roles).",
)
@click.option(
    "--plot",
    "plots",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw an imatrix's tokens by layer and expert (.png or .svg; may be given several times).",
)
@click.option("--force", is_flag=True, help="Replace the files of --plot.")
@json_option
def command(
    file: Path,
    model_path: Path | None,
    tensors: bool,
    few: float,
    folders: tuple[Path, ...],
    plots: tuple[Path, ...],
    force: bool,
    json_: bool,
) -> None:
    """Show what is in FILE: a GGUF model (any shard of a split one), or an imatrix (GGUF or the older .dat).

    For a model: layers, experts, draft head, bytes by role and type. For an imatrix: what it was made from, whether
    the draft head was calibrated, and with --model which tensors have no data and which experts saw few tokens or
    none.

    \b
    Examples:
      apex inspect model-F16.gguf
      apex inspect model-Q4_K_M-00001-of-00003.gguf --tensors
      apex inspect imatrix.gguf --model model-F16.gguf
      apex inspect imatrix.gguf --model model-F16.gguf --plot experts.png
      apex inspect imatrix.gguf --model model-F16.gguf --json | jq .coverage.missing
    """
    plugins = load_plugins(folders)
    found = _imatrix_or_header(file)
    _check_plots(plots, found, force=force)
    if isinstance(found, Header):
        if model_path is not None:
            raise click.UsageError(f"--model is for an imatrix; {file} is not one")
        _show_model(model_of(found, plugins.role_of), tensors=tensors, json_=json_)
        return
    against = None
    if model_path is not None:
        model = read_model(model_path, plugins.role_of)
        against = coverage(crossed(found, model)[0], model, few)
    examined = against.examined if against else examine(found)
    grid = expert_grid(found, {tensor.layer for tensor in against.head} if against else ())
    if plots:
        _plot(grid, found, plots)
    if json_:
        show.as_json(imatrix_json(found, against, examined))
        return
    _print_imatrix(found, against)
    if against is not None:
        print_coverage(against, everything=tensors)
    else:
        _print_examined(examined)
    if grid is not None:
        for line in heat.lines(grid):
            click.echo(line)


def _check_plots(plots: Sequence[Path], found: Imatrix | Header, *, force: bool) -> None:
    if plots and isinstance(found, Header):
        raise click.UsageError(f"--plot goes with an imatrix; {found.path} is a model")
    for path in plots:
        if path.suffix not in (".png", ".svg"):
            raise click.UsageError(f"--plot {path}: expected a name that ends in .png or .svg")
        check_place(path, _OTHER_PLOT)
        check_apart([path], [found.path], _OTHER_PLOT)
        if path.exists() and not force:
            refuse(path, "exists")


def _plot(grid: ExpertGrid | None, found: Imatrix, plots: Sequence[Path]) -> None:
    if grid is None:
        raise ImatrixInvalid(f"{found.path}: no counts of experts to draw: a dense model's, or of the older format")
    if not available():
        click.echo(f"warning: {MISSING}", err=True)
        return
    draw_heat(grid, f"Calibration tokens of each expert: {found.path.name}", *plots)
    for path in plots:
        show.note(f"{path}: written")


def _imatrix_or_header(file: Path) -> Imatrix | Header:
    if looks_legacy(file):
        return read_imatrix(file)
    header = read_header(file)
    return read_imatrix(file) if kind_of(header) == "imatrix" else header


def _show_model(model: Model, *, tensors: bool, json_: bool) -> None:
    summary = summarize(model)
    reasons = doubts(model, _tools())
    if json_:
        show.as_json(
            {**model_json(summary), "unsound": reasons, **({"tensor_list": tensors_json(model)} if tensors else {})}
        )
        return
    _print_model(summary)
    for reason in reasons:
        click.echo(f"warning: llama.cpp cannot load it: {reason}")
    if tensors:
        rows = [
            (
                _plain(t.name),
                t.role,
                "head" if t.draft_head else "",
                t.type,
                " x ".join(map(str, t.shape)),
                show.size(t.n_bytes),
            )
            for t in model.tensors
        ]
        show.table("Tensors", ("name", "role", "part", "type", "shape", "bytes"), rows, right=("shape", "bytes"))


def _tools() -> Toolset | None:
    """The built tools, if there are any: most of inspect works without."""
    try:
        return find_toolset()
    except BuildMissing:
        return None


def _print_model(summary: ModelSummary) -> None:
    _line("model", f"{summary.name} ({summary.architecture})" + (f", {summary.file_type}" if summary.file_type else ""))
    _line(
        "file",
        f"{summary.path}, {show.size(summary.file_bytes)}"
        + (f" in {len(summary.files)} shards" * (len(summary.files) > 1)),
    )
    _line(
        "layers",
        f"{summary.trunk_layers} in the trunk"
        + _elsewhere(summary)
        + (f", {summary.head_layers} in the draft head" * bool(summary.head_layers)),
    )
    if summary.experts:
        _line("experts", f"{summary.experts}, {summary.experts_used} active")
    _line("draft head", _head(summary))
    _line(
        "size",
        f"{summary.parameters / 1e9:.3f} billion parameters in {summary.tensors} tensors, "
        f"{show.size(summary.tensor_bytes)}, {summary.bits_per_weight:.2f} bits per weight",
    )
    rows = [
        (
            "draft head" if s.draft_head else "trunk",
            s.role,
            s.type,
            s.tensors,
            s.parameters,
            show.size(s.bytes),
            f"{s.bits_per_weight:.2f}",
        )
        for s in summary.shares
    ]
    columns = ("part", "role", "type", "tensors", "parameters", "bytes", "bits per weight")
    show.table("Bytes by role and type", columns, rows, right=columns[3:])


def _elsewhere(summary: ModelSummary) -> str:
    if summary.trunk_layers_here == summary.trunk_layers:
        return ""
    return f" ({summary.trunk_layers_here or 'none'} of them in this file)"


def _head(summary: ModelSummary) -> str:
    if not summary.head_layers:
        return "none"
    if not summary.head_tensors:
        return "promised by the metadata, but none of its tensors is in the file"
    n_bytes = sum(share.bytes for share in summary.shares if share.draft_head)
    return f"{summary.head_tensors} tensors, {show.size(n_bytes)}"


def _print_imatrix(imatrix: Imatrix, against: Coverage | None) -> None:
    _line("imatrix", f"{imatrix.path} ({'GGUF' if imatrix.format == 'gguf' else 'legacy .dat'})")
    _line("datasets", ", ".join(imatrix.datasets) or "not named")
    chunks = "" if imatrix.chunk_count is None else f"{imatrix.chunk_count} chunks"
    if imatrix.format == "gguf":
        _line("calibrated", f"{tokens(imatrix)} tokens ({chunks} of {imatrix.chunk_size})")
    else:
        _line("calibrated", f"{chunks or 'an unknown number of chunks'}; the format does not record their size")
    _line("entries", str(len(imatrix.entries)))
    if against is not None:
        _line("draft head", _head_state(against))
    elif imatrix.head_tokens is not None:
        rows = f" with {imatrix.head_rows} rows" if imatrix.head_rows else ""
        told = f"run over {imatrix.head_tokens} tokens{rows}, as the file says"
        _line("draft head", f"{told}; --model MODEL checks its tensors")
    else:
        _line("draft head", "not recorded as run; --model MODEL checks its tensors")


def _head_state(against: Coverage) -> str:
    if against.head_calibrated is None:
        return "the model has none"
    n_tokens = f" over {against.head_tokens} tokens" if against.head_tokens is not None else ""
    rows = f" with {against.imatrix.head_rows} rows" if against.imatrix.head_rows else ""
    with_data = sum(tensor.has_data for tensor in against.head)
    if against.head_calibrated:
        return f"calibrated{n_tokens}{rows}: all of its {len(against.head)} weights have data"
    hint = f"; apex calibrate {against.model.path} makes an imatrix with it"
    return f"NOT calibrated: {len(against.head) - with_data} of its {len(against.head)} weights have no data{hint}"


def print_coverage(against: Coverage, *, everything: bool = False) -> None:
    """Print the coverage table, and remarks on tensors."""
    rows = [
        (
            "draft head" if r.draft_head else "trunk",
            r.role,
            f"{r.with_data} of {r.weights}",
            "-" if r.least is None else f"{r.least:.0f}",
            "-" if r.most is None else f"{r.most:.0f}",
            f"{r.without_tokens} of {r.experts}" if r.experts > r.with_data else "-",
            str(r.few_tokens) if r.experts > r.with_data else "-",
        )
        for r in by_role(against)
    ]
    unit = "calls" if against.imatrix.format == "legacy" else "tokens"
    columns = ("part", "role", "with data", f"least {unit}", f"most {unit}", "experts without tokens", "with few")
    show.table(f"Calibration data for {_plain(against.model.name)}", columns, rows, right=columns[2:])
    limit = None if everything else _LISTED
    _names("without data", against.missing, limit)
    for tensor in against.partial[:limit]:
        few = f"under {against.threshold:.2%} of an even share (at least {tensor.fewest:.0f} tokens)"
        parts = [
            ("no tokens", tensor.without_tokens),
            (few, tensor.few_tokens),
            ("tokens, but all sums zero", tensor.empty),
        ]
        _line(
            tensor.name, "; ".join(f"{what}: experts {_numbers(experts, limit)}" for what, experts in parts if experts)
        )
    _more(len(against.partial), limit, "tensors with experts that saw few or no tokens")
    _names("entries that no weight of the model uses", against.unused, limit)
    _print_examined(against.examined)
    for line in disagreements(against):
        click.echo(f"warning: {line}")


def _print_examined(examined: Examined) -> None:
    for line in examined.lines():
        click.echo(f"warning: {line}")


def _names(title: str, names: Sequence[str], limit: int | None) -> None:
    for name in names[:limit]:
        _line(title, name)
    _more(len(names), limit, title)


def _more(count: int, limit: int | None, what: str) -> None:
    if limit is not None and count > limit:
        click.echo(f"... and {count - limit} more {what}; --tensors lists all")


def _numbers(numbers: Sequence[int], limit: int | None) -> str:
    shown = ", ".join(map(str, numbers[:limit]))
    return shown if limit is None or len(numbers) <= limit else f"{shown} and {len(numbers) - limit} more"


def _line(title: str, text: str) -> None:
    click.echo(f"{title + ': ':<12}{_plain(text)}")


def _plain(text: str) -> str:
    """Text from a file, made safe for a terminal: control characters are shown, not sent."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
