"""Fitted files beside others at equal bytes, for docs/results/fit.md:

    python docs/results/fit_pairs.py MODEL FOLDER --imatrix F --measurement F [--text F] OTHER...

Each OTHER is a policy with its parameters (i-mini, uniform:type=Q3_K), a file that is there (Q2_K.gguf), or a number
of bytes, for a fitted file by itself. Of each, the file is written, a fitted one of its bytes beside it, and both are
scored on the same chunks of the half of the text that no probe saw: as they are, and with their weights restored to
F16, which leaves out what the kernels lose by rounding activations to 8 bits. Prints Markdown: the divergence of both,
and their ratio, paired, with its 95 % interval. Scores are kept in FOLDER/scores.json; what is written is deleted as
soon as it is scored.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from apex_build.plugin_api import (
    Estimate,
    Task,
    Workplace,
    clustered_ratio,
    codec,
    divergence_rows,
    mapped_rows,
    progress,
    reference_logits,
    run_over_chunks,
    scored_positions,
    workplace,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "plugins"))
measure: Any = importlib.import_module("fit.measure")
CONTEXT: int = measure.CONTEXT
Sums = list[list[float]]


@dataclass(frozen=True)
class Score:
    """For each text, the divergence of each chunk, summed over its positions: of the file, and of its weights alone."""

    name: str
    n_bytes: int
    file: Sums
    weights: Sums
    predicted: float | None = None


def mean_of(each: Sums) -> Estimate:
    sums, text = _flat(each)
    return clustered_ratio(sums, np.full(len(sums), scored_positions(CONTEXT)), text)


def ratio(own: Sums, others: Sums) -> Estimate:
    sums, text = _flat(own)
    return clustered_ratio(sums, _flat(others)[0], text)


def _flat(each: Sums) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The chunks of all texts, and the text that each is of."""
    return np.concatenate([np.array(one) for one in each]), np.repeat(np.arange(len(each)), [len(one) for one in each])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("others", nargs="+", metavar="OTHER")
    parser.add_argument("--imatrix", type=Path, required=True)
    parser.add_argument("--measurement", type=Path, required=True)
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    asked.folder.mkdir(exist_ok=True)
    with progress() as report:
        place = workplace(report=report)
        asked.place = place
        task = _task(asked, place)
        lines = [_compared(other, asked, task) for other in asked.others]
    columns = "bits | other | bytes | file | weights | fitted | predicted | weights | file | ratio, weights | file"
    print(f"| {columns} |\n|{'---|' * len(columns.split(' | '))}")
    print("\n".join(lines))


def _compared(other: str, asked: argparse.Namespace, task: Task) -> str:
    """A line of the table."""
    beside = None if other.isdigit() else _other(other, asked, task)
    target = beside.n_bytes if beside else int(other)
    settings = [f"measurement={asked.measurement}", f"target_size={target}"]
    own = _scored(f"fit:{target}", ["fit", *settings], asked, task)
    weights = sum(tensor.n_elements for tensor in task.reference.tensors) if task.reference else 0
    cells = [f"{8 * own.n_bytes / weights:.2f}"]
    cells += [beside.name, f"{beside.n_bytes:,}", *_both(beside)] if beside else [""] * 4
    cells += [f"{own.n_bytes:,}", f"{own.predicted:.4g}" if own.predicted else "", *reversed(_both(own))]
    if beside:
        cells += [_shown(ratio(own.weights, beside.weights), 2), _shown(ratio(own.file, beside.file), 2)]
    return f"| {' | '.join(cells)} |"


def _other(other: str, asked: argparse.Namespace, task: Task) -> Score:
    if Path(other).is_file():
        return _scored(Path(other).name, [], asked, task, Path(other))
    policy, _, settings = other.partition(":")
    return _scored(other, [policy, *filter(None, settings.split(","))], asked, task)


def _scored(name: str, policy: list[str], asked: argparse.Namespace, task: Task, given: Path | None = None) -> Score:
    kept = asked.folder / "scores.json"
    known = json.loads(kept.read_text("utf-8")) if kept.is_file() else {}
    if name not in known:
        began = time.monotonic()
        path = given or asked.folder / f"{name.replace(':', '-').replace(',', '-')}.gguf"
        predicted = None if given else _write(path, policy, asked)
        written = time.monotonic()
        known[name] = {"n_bytes": path.stat().st_size, "predicted": predicted}
        known[name]["file"] = [_sums(task, path, domain) for domain in task.texts]
        restored = _restored(path, asked, task)
        known[name]["weights"] = [_sums(task, restored, domain) for domain in task.texts]
        restored.unlink()
        known[name]["seconds"] = [round(written - began), round(time.monotonic() - written)]
        kept.write_text(json.dumps(known, indent=1), "utf-8")
        if given is None:
            path.unlink()
    one = known[name]
    return Score(name, one["n_bytes"], one["file"], one["weights"], one["predicted"])


def _restored(path: Path, asked: argparse.Namespace, task: Task) -> Path:
    """A copy of the model with the values that the file's weights have."""
    copy: Path = asked.folder / "restored.gguf"
    shutil.copyfile(asked.model, copy)
    (header,) = task.model.headers
    places = {tensor.name: tensor for tensor in header.tensors}
    coder = codec(task.tools)
    with mapped_rows(asked.place.model(path).headers) as rows, copy.open("r+b") as file:
        for name, data in rows.items():
            if data.type == places[name].type:
                continue
            values = coder.decode(data.type, data.rows, places[name].shape[0])
            assert values is not None and places[name].type == "F16"
            file.seek(header.data_offset + places[name].offset)
            file.write(values.astype("<f2").tobytes())
    return copy


def _write(path: Path, policy: list[str], asked: argparse.Namespace) -> float | None:
    """Returns what is predicted of it, if anything is."""
    settings = [part for value in policy[1:] for part in ("--set", value)]
    about = [str(asked.model), "--policy", policy[0], *settings, "--imatrix", str(asked.imatrix)]
    _apex("quantize", *about, "-o", str(path), "--force", "--threads", str(asked.threads))
    if policy[0] != "fit":
        return None
    plan = json.loads(_apex("plan", *about, "--json"))
    found = plan["predicted"]["kld.mean"]
    return float(found)


def _apex(*arguments: str) -> str:
    run = subprocess.run([sys.executable, "-m", "apex_build", *arguments], stdout=subprocess.PIPE, text=True)
    if run.returncode:
        sys.exit(run.returncode)
    return run.stdout


def _task(asked: argparse.Namespace, place: Workplace) -> Task:
    """Of which only the reference and the texts are used: the files come one after the other."""
    model = place.model(asked.model)
    unseen = measure.split(place.texts(tuple(asked.text), model)).unseen
    task: Task = measure.task_for(model, place, unseen, asked.chunks, asked.threads, "kld")
    return replace(task, reference=model)


def _sums(task: Task, path: Path, domain: str) -> list[float]:
    logits = reference_logits(task, domain)
    arguments: list[str | Path] = ["-c", str(CONTEXT), "--kl-divergence", "--kl-divergence-base", logits]

    def read(lines: Iterable[str]) -> list[float] | None:
        rows = np.array(divergence_rows(tuple(lines)))
        if not len(rows):
            return None
        found: list[float] = (np.diff(rows[:, 0] * rows[:, 5], prepend=0.0) * scored_positions(CONTEXT)).tolist()
        return found

    return run_over_chunks(task, path, task.texts[domain], arguments, f"{path.name} on {domain}", read)


def _both(one: Score) -> list[str]:
    return [_shown(mean_of(one.file)), _shown(mean_of(one.weights))]


def _shown(one: Estimate, digits: int | None = None) -> str:
    def number(value: float) -> str:
        return f"{value:.3g}" if digits is None else f"{value:.{digits}f}"

    if one.low is None or one.high is None:
        return number(one.value)
    return f"{number(one.value)} [{number(one.low)}, {number(one.high)}]"


if __name__ == "__main__":
    main()
