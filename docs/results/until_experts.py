"""Tokens until every routed expert has seen enough of the text: drawn by `--until-experts`, and drawn blindly.

    python docs/results/until_experts.py MODEL TOKENS [TOKENS...] [--orders 2]

Blindly: the default set in its own order (its domains in turn), and in `--orders` random orders of its documents; the
first chunk after which the least seen expert has TOKENS. Needs the tools; threads 1.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import tempfile
from pathlib import Path

import numpy as np

from apex_build import api
from apex_build.calibration.run import Settings
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=int, nargs="+")
    parser.add_argument("--orders", type=int, default=2)
    given = parser.parse_args()
    place = api.workplace()
    model = place.model(given.model)
    text = text_of(model, CalibrateOptions(), place.plugins)
    documents = [document for _, document in text.documents]
    with tempfile.TemporaryDirectory() as scratch:
        blind = {"in turn": blindly(place, model, text.data, Path(scratch) / "turn")}
        for seed in range(1, given.orders + 1):
            random.Random(seed).shuffle(documents)  # noqa: S311
            blind[f"order {seed}"] = blindly(place, model, b"".join(documents), Path(scratch) / f"order-{seed}")
        print(f"the whole set: {len(blind['in turn']) * 512} tokens, least seen {blind['in turn'][-1]:.0f}")
        for tokens in given.tokens:
            out = Path(scratch) / f"{tokens}.gguf"
            options = CalibrateOptions(settings=SETTINGS, rows_check=False, until=Goal(tokens))
            api.calibrate(model, out, options, place=place)
            goal = locate(out).manifest.details["goal"]
            print(f"until {tokens}: {goal['tokens']} tokens in {goal['rounds']} rounds, least seen {goal['fewest']}")
            for name, least in blind.items():
                reached = np.flatnonzero(least >= tokens)
                spent = (int(reached[0]) + 1) * 512 if len(reached) else None
                ratio = f"{goal['tokens'] / spent:.2f} of it" if spent else "not reached with all of the set"
                print(f"    blindly, {name}: {spent or '-'} tokens; {ratio}")


if __name__ == "__main__":
    main()
