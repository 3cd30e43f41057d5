"""Fitted files beside others at equal bytes, for docs/results/fit.md:

    python docs/results/fit_pairs.py MODEL FOLDER --imatrix F --measurement F [--text F] OTHER...

Each OTHER is a policy with its parameters (i-mini, uniform:type=Q3_K), a file that is there (Q2_K.gguf), or a number
of bytes, for a fitted file by itself. Of each, the file is written, a fitted one of its bytes beside it, and both are
scored on the same chunks of the half of the text that no probe saw. Prints Markdown: the divergence of both, and their
ratio, paired, with its 95 % interval.
Scores are kept in FOLDER/scores.json; the files that were written are deleted as soon as they are scored.
"""

from __future__ import annotations

import argparse
import importlib
import json
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
    divergence_rows,
    progress,
    reference_logits,
    run_over_chunks,
    scored_positions,
    workplace,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "plugins"))
measure: Any = importlib.import_module("fit.measure")
CONTEXT: int = measure.CONTEXT


@dataclass(frozen=True)
class Score:
    """`sums`: for each text, the divergence of each chunk, summed over its positions."""

    name: str
    n_bytes: int
    sums: tuple[tuple[float, ...], ...]
    predicted: float | None = None

    @property
    def values(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        text = np.repeat(np.arange(len(self.sums)), [len(one) for one in self.sums])
        return np.concatenate([np.array(one) for one in self.sums]), text

    @property
    def mean(self) -> Estimate:
        sums, text = self.values
        return clustered_ratio(sums, np.full(len(sums), scored_positions(CONTEXT)), text)

    def ratio(self, other: Score) -> Estimate:
        (own, text), (others, _) = self.values, other.values
        return clustered_ratio(own, others, text)


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
        task = _task(asked, place)
        lines = [_compared(other, asked, task) for other in asked.others]
    print("| bits | file | bytes | KLD | fitted, bytes | predicted | KLD | ratio |\n|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))


def _compared(other: str, asked: argparse.Namespace, task: Task) -> str:
    """A line of the table."""
    beside = None if other.isdigit() else _other(other, asked, task)
    target = beside.n_bytes if beside else int(other)
    settings = [f"measurement={asked.measurement}", f"target_size={target}"]
    own = _scored(f"fit:{target}", ["fit", *settings], asked, task)
    weights = sum(tensor.n_elements for tensor in task.reference.tensors) if task.reference else 0
    cells = [f"{8 * own.n_bytes / weights:.2f}"]
    cells += [beside.name, f"{beside.n_bytes:,}", _shown(beside.mean)] if beside else ["", "", ""]
    cells += [f"{own.n_bytes:,}", f"{own.predicted:.4g}" if own.predicted else "", _shown(own.mean)]
    cells += [_shown(own.ratio(beside), 2) if beside else ""]
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
        sums = [_sums(task, path, domain) for domain in task.texts]
        known[name] = {"n_bytes": path.stat().st_size, "sums": sums, "predicted": predicted}
        known[name]["seconds"] = [round(written - began), round(time.monotonic() - written)]
        kept.write_text(json.dumps(known, indent=1), "utf-8")
        if given is None:
            path.unlink()
    one = known[name]
    return Score(name, one["n_bytes"], tuple(tuple(sums) for sums in one["sums"]), one["predicted"])


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


def _shown(one: Estimate, digits: int | None = None) -> str:
    def number(value: float) -> str:
        return f"{value:.3g}" if digits is None else f"{value:.{digits}f}"

    if one.low is None or one.high is None:
        return number(one.value)
    return f"{number(one.value)} [{number(one.low)}, {number(one.high)}]"


if __name__ == "__main__":
    main()
