"""What collecting costs: decoding alone, llama-imatrix without patch 0009 and with it, and with the draft head.

    python docs/results/collector.py FOLDER --before TOOLS --after TOOLS            # on the CPU
    python docs/results/collector.py FOLDER --before TOOLS --after TOOLS -ngl 99    # on a GPU

TOOLS are folders of built tools; the one of `--before` needs only llama-imatrix. The model is a random one with layers
as those of the 35B-A3B (tests/patches/random_moe.py, which needs gguf), or `--model`. Each command runs with a few
chunks and with more, in turn; the difference of the two is what a token takes, without the time to start. Decoding
alone is llama-perplexity, which computes the logits of half of the tokens; for the logits of all, as llama-imatrix has
them, give with `--alone` the folder of an llama-imatrix that was built with `params.cb_eval = nullptr`. Ratios are of
CPU time on one thread, else of time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

ROOT = Path(__file__).parents[2]
CONTEXT = 512


@dataclass(frozen=True)
class Run:
    seconds: float
    cpu: float
    peak: int  # MiB of the process
    gpu: tuple[float, ...]  # utilization in percent
    memory: int  # MiB of the GPU


def run(command: list[str], gpu: bool, log: Path) -> Run:
    watch = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-lms", "50"]
    watcher = subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) if gpu else None
    with log.open("w") as file:
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
    samples = []
    if watcher:
        watcher.terminate()
        said, _ = watcher.communicate()
        samples = [
            tuple(map(float, line.split(",")))
            for line in said.splitlines()
            if line.count(",") == 1 and line[-1].isdigit()
        ]
    if status:
        sys.exit(f"{' '.join(command)}\nfailed, see {log}")
    utilization = tuple(sample[0] for sample in samples)
    memory = int(max((sample[1] for sample in samples), default=0))
    return Run(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss // 1024, utilization, memory)


def entries(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data, np.float64) for tensor in gguf.GGUFReader(path).tensors}


def compared(one: Path, other: Path) -> str:
    a, b = entries(one), entries(other)
    names = sorted(a.keys() & b.keys())
    moved = max(np.abs(a[n] - b[n]).sum() / a[n].sum() for n in names if n.endswith(".counts"))
    far = {n: np.abs(a[n] - b[n]).sum() / a[n].sum() for n in names if n.endswith(".in_sum2")}
    name = max(far, key=lambda n: far[n])
    return f"{len(far)} tensors; counts differ by {moved:.2%} at most, sums by {far[name]:.1e} (L1, {name})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--after", type=Path, required=True)
    parser.add_argument("--alone", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--type", default="q8_0")
    parser.add_argument("-ngl", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--chunks", type=int, nargs=2, default=(4, 20))
    parser.add_argument("--ubatch", type=int, default=CONTEXT)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--compare-cpu", action="store_true", help="and the same sums computed on the CPU")
    given = parser.parse_args()
    folder, gpu = given.folder, given.ngl > 0
    folder.mkdir(parents=True, exist_ok=True)

    model = given.model or folder / f"random-{given.layers}-{given.type}.gguf"
    if not model.exists():
        script = ROOT / "tests" / "patches" / "random_moe.py"
        subprocess.run([sys.executable, script, model, "--layers", str(given.layers), "--type", given.type], check=True)
    text = folder / "text.txt"
    text.write_text(
        "\n".join(path.read_text() for path in sorted((ROOT / "tests" / "testbed" / "heldout").glob("*.txt")))
    )

    common = ["-m", str(model), "-f", str(text), "-c", str(CONTEXT), "-ngl", str(given.ngl), "-t", str(given.threads)]
    common += ["-b", str(max(CONTEXT, given.ubatch)), "-ub", str(given.ubatch)]
    imatrix = {tools: [str(tools / "llama-imatrix"), *common] for tools in (given.before, given.after)}
    commands = {
        "decoding alone": [str(given.after / "llama-perplexity"), *common]
        if given.alone is None
        else [str(given.alone / "llama-imatrix"), *common, "-o", str(folder / "alone.gguf")],
        "before": [*imatrix[given.before], "-o", str(folder / "before.gguf")],
        "after": [*imatrix[given.after], "-o", str(folder / "after.gguf")],
        "after, with the head": [*imatrix[given.after], "-o", str(folder / "head.gguf"), "--mtp"],
        "before, --no-ppl": [*imatrix[given.before], "-o", str(folder / "before-no.gguf"), "--no-ppl"],
        "after, --no-ppl": [*imatrix[given.after], "-o", str(folder / "after-no.gguf"), "--no-ppl"],
        "after, --no-ppl, with the head": [*imatrix[given.after], "-o", str(folder / "no.gguf"), "--no-ppl", "--mtp"],
    }
    few, many = given.chunks
    runs: dict[tuple[str, int], list[Run]] = {(name, chunks): [] for name in commands for chunks in (few, many)}
    for _ in range(given.runs):
        for (name, chunks), done in runs.items():
            log = folder / f"{name.replace(' ', '-')}-{chunks}.log"
            done.append(run([*commands[name], "--chunks", str(chunks)], gpu, log))

    def each(name: str, field: str) -> float:
        """Milliseconds a token; of each number of chunks the fastest run."""
        least = {chunks: min(getattr(run, field) for run in runs[name, chunks]) for chunks in given.chunks}
        return 1e3 * (least[many] - least[few]) / ((many - few) * CONTEXT)

    basis = "seconds" if gpu or given.threads > 1 else "cpu"
    decoding, stock = each("decoding alone", basis), each("before", basis)
    print(
        "| | tokens/s | ms per token | CPU ms per token | overhead, relative to before | time, relative to before "
        "| memory, MiB |",
        end="",
    )
    print(" GPU busy, % | GPU memory, MiB |" if gpu else "")
    print("|---|---|---|---|---|---|---|" + ("---|---|" if gpu else ""))
    for name in commands:
        took, longest = each(name, basis), max(runs[name, many], key=lambda r: r.seconds)
        overhead = "" if name == "decoding alone" else f"{(took - decoding) / (stock - decoding):.2f}"
        row = [name, f"{1e3 / took:.0f}", f"{each(name, 'seconds'):.3f}", f"{each(name, 'cpu'):.3f}", overhead]
        row += [f"{took / stock:.2f}", str(longest.peak)]
        if gpu:
            busy = [u for u in longest.gpu if u > 0]
            row += [f"{statistics.mean(busy):.0f}" if busy else "", str(longest.memory)]
        print("| " + " | ".join(row) + " |")
    print("\nafter against before:", compared(folder / "before.gguf", folder / "after.gguf"))
    if given.compare_cpu:
        command = [
            *imatrix[given.after],
            "-ngl",
            "0",
            *(["-dev", "none"] if gpu else []),
            "-o",
            str(folder / "cpu.gguf"),
        ]
        run([*command, "--mtp", "--chunks", str(many)], False, folder / "cpu.log")
        print("against the CPU:", compared(folder / "cpu.gguf", folder / "head.gguf"))


if __name__ == "__main__":
    main()
