"""Tokens until every routed expert has seen enough of the text: drawn by `--until-experts`, and drawn blindly.

    python docs/results/until_experts.py MODEL TOKENS [TOKENS...] [--orders 2]

In the default set's own order (its domains in turn), and in `--orders` random orders of its documents. Blindly: the
first chunk after which the least seen expert has TOKENS. Needs the tools; threads 1.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from apex_build import api
from apex_build.calibration.run import Settings
from apex_build.calibration.sets import CalibrationText
from apex_build.calibration.shards import Shard, Task, counts_file, make_shard
from apex_build.calibration.until import Goal
from apex_build.stages.calibrate import CalibrateOptions, text_of
from apex_build.storage.finding import locate

SETTINGS = Settings(threads=1)


def blindly(
    place: api.Workplace, model: api.Model, text: bytes, folder: Path
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The tokens of the least seen expert after each chunk."""
    (folder / "text").mkdir(parents=True)
    (folder / "text" / "text.txt").write_bytes(text)
    sha256 = hashlib.sha256(text).hexdigest()
    task = Task(folder / "text" / "text.txt", sha256, Shard(0, 1 << 20), folder / "all.gguf", every=1)
    make_shard(model, task, place.tools, SETTINGS)
    least: np.ndarray[tuple[int], np.dtype[np.float64]] = np.load(counts_file(task.out))["counts"].min(axis=1)
    return least


def drawn(place: api.Workplace, model: api.Model, text: CalibrationText, tokens: int, folder: Path) -> dict[str, Any]:
    out = folder / f"until-{tokens}.gguf"
    options = CalibrateOptions(settings=SETTINGS, rows_check=False, until=Goal(tokens))
    api.calibrate(model, out, options, place=place, text=text)
    goal: dict[str, Any] = locate(out).manifest.details["goal"]
    return goal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=int, nargs="+")
    parser.add_argument("--orders", type=int, default=2)
    given = parser.parse_args()
    place = api.workplace()
    model = place.model(given.model)
    text = text_of(model, CalibrateOptions(), place.plugins)
    for order in range(given.orders + 1):
        documents = list(text.documents)
        if order:
            random.Random(order).shuffle(documents)  # noqa: S311
        shuffled = replace(text, data=b"".join(one for _, one in documents), documents=tuple(documents))
        with tempfile.TemporaryDirectory() as scratch:
            least = blindly(place, model, shuffled.data, Path(scratch))
            print(f"order {order or 'of the set'}: {len(least) * 512} tokens in all, least seen {least[-1]:.0f}")
            for tokens in given.tokens:
                goal = drawn(place, model, shuffled, tokens, Path(scratch))
                reached = np.flatnonzero(least >= tokens)
                spent = (int(reached[0]) + 1) * 512 if len(reached) else None
                ratio = f"{goal['tokens'] / spent:.2f} of blindly {spent}" if spent else "blindly not reached"
                print(f"    until {tokens}: {goal['tokens']} tokens in {goal['rounds']} rounds, {ratio}", flush=True)


if __name__ == "__main__":
    main()
