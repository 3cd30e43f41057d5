"""Tables and plots of draft-head.md, from the folder that measure.sh filled: python docs/results/draft_head.py FOLDER

Prints the tables as Markdown, and writes the plots beside this file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from apex_build.report.plot import Chart, Mark, Series, draw

HERE = Path(__file__).parent
AGREEMENT = "depth1.agreement"
Row = dict[str, Any]
KINDS = {"f16": "MoE test head", "dense-f16": "dense test head"}
# Loss of agreement in points against BF16, whole dense head of Qwen3.6-27B (425 million weights), with an imatrix: the
# table of upstream's open pull request #28351. Q4_K without one loses 0.36.
REAL = {"Q6_K": 0.06, "Q5_K": 0.11, "Q4_K": 0.23, "IQ3_S": 2.2, "IQ2_XS": 9.1}
REAL_BITS = {"Q6_K": 6.59, "Q5_K": 5.46, "Q4_K": 4.52, "IQ3_S": 3.48, "IQ2_XS": 2.35}


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def over_all(figures: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {figure["name"]: figure for figure in figures if not figure["domain"]}


def swept(folder: Path, name: str) -> list[Row]:
    """Points of a sweep: label, head data, bytes, figures by name (None: refused)."""
    rows = []
    for row in read(folder / name / "sweep.jsonl"):
        figures = over_all(row["figures"]["draft-head"]) if "draft-head" in row["figures"] else None
        values = {key.removeprefix("draft_head").lstrip("."): value for key, value in row["values"].items()}
        rows.append({"values": values, "head_data": row["head_data"], "bytes": row["head_bytes"], "figures": figures})
    return rows


def evaluated(path: Path, evaluator: str) -> dict[str, dict[str, Mapping[str, Any]]]:
    return {
        row["file"].removesuffix(".gguf"): over_all(row["figures"])
        for row in read(path)
        if row["evaluator"] == evaluator
    }


def cell(figure: Mapping[str, Any] | None, digits: int = 2) -> str:
    if figure is None:
        return ""
    if figure["low"] is None:
        return f"{figure['value']:.{digits}f}"
    sign = "+" if figure["name"].endswith("difference") else ""
    return f"{figure['value']:{sign}.{digits}f} [{figure['low']:{sign}.{digits}f}, {figure['high']:{sign}.{digits}f}]"


def table(head: str, rows: Iterable[Iterable[str]]) -> None:
    columns = head.split(" | ")
    print(f"| {head} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


def interval(figure: Mapping[str, Any]) -> tuple[float, float] | None:
    return None if figure["low"] is None else (figure["low"], figure["high"])


def lost(row: Row, name: str = AGREEMENT) -> tuple[float, float, float]:
    """A loss with its interval: 0 for the reference itself."""
    figure = row["figures"].get(f"{name}.difference")
    if figure is None:
        return 0.0, 0.0, 0.0
    return -figure["value"], -(figure["high"] or figure["value"]), -(figure["low"] or figure["value"])


def shown(loss: tuple[float, float, float], digits: int = 2) -> str:
    value, low, high = (0.0 + round(number, digits) for number in loss)
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def types(folder: Path, kind: str) -> list[Row]:
    rows = swept(folder, f"types-{kind}")
    without = {row["values"][""]: row for row in rows if not row["head_data"]}
    lines = []
    for row in rows:
        if row["head_data"]:
            name, figures = row["values"][""], row["figures"]
            blind = without[name]
            real = f"{REAL[name]:.2f}" if name in REAL else ""
            times = f"{lost(row)[0] / REAL[name]:.1f}" if name in REAL else ""
            lines.append([
                name, f"{row['bytes']:,}", cell(figures[AGREEMENT]), shown(lost(row)), real, times,
                shown(lost(blind)) if blind["figures"] else "refused",
                shown(lost(row, "depth1.p")), f"{figures['depth1.kld']['value']:.4f}", shown(lost(row, "tokens.3"), 4),
            ])  # fmt: skip
    print(f"{KINDS[kind]}\n")
    table(
        "head | bytes | agreement, % | loss, points | real 27B | times | loss without head data | loss of mean p, "
        "points | KLD | "
        "loss of tokens a step, drafts of 3",
        lines,
    )
    return rows


def mixtures(folder: Path) -> None:
    head = (
        "head | bytes | of Q8_0, % | loss, points | depth 2 | depth 3 | loss of mean p, points | loss of tokens a "
        "step, drafts of 3"
    )

    def line(name: str, row: Row, whole: int) -> list[str]:
        depths = [shown(lost(row, f"depth{depth}.agreement")) for depth in (1, 2, 3)]
        share = f"{100 * row['bytes'] / whole:.1f}"
        return [
            name,
            f"{row['bytes']:,}",
            share,
            *depths,
            shown(lost(row, "depth1.p")),
            shown(lost(row, "tokens.3"), 4),
        ]

    for kind, name in KINDS.items():
        rows = swept(folder, f"mixtures-{kind}")
        print(f"{name}\n")
        table(head, [line(row["values"][""], row, rows[0]["bytes"]) for row in rows])
    whole = swept(folder, "types-f16")[0]["bytes"]
    parts = {part: swept(folder, f"part-{part}")[-1] for part in ("eh_proj", "attention", "routed", "shared")}
    table(head, [line(f"{part} IQ2_XS, rest Q8_0", row, whole) for part, row in parts.items()])
    table(head, [line(f"i-nano trunk, head {row['values']['']}", row, whole) for row in swept(folder, "nano")])


def plot_types(by_kind: Mapping[str, list[Row]]) -> None:
    series = [
        Series("Qwen3.6-27B's head (public)", tuple(Mark(REAL_BITS[name], loss, name) for name, loss in REAL.items()))
    ]
    for kind, rows in by_kind.items():
        own = [row for row in rows if row["head_data"] and row["figures"]]
        weights = own[0]["bytes"] / 8.5  # Q8_0 takes 8.5 bits for a weight; the F32 rest of the head is little
        marks = []
        for row in own:
            loss, low, high = lost(row)
            label = row["values"][""] if row["values"][""] in REAL else ""
            marks.append(Mark(row["bytes"] / weights, loss, label, y_interval=(low, high)))
        series.append(Series(KINDS[kind], tuple(marks)))
    draw(
        Chart(
            "One type for the whole head, calibrated",
            "bits per weight of the head",
            "loss of agreement (points)",
            tuple(series),
            lines=((0.5, "0.5 points"),),
        ),
        HERE / "draft-head-types.svg",
    )


def chunks(folder: Path) -> None:
    lines = []
    for file, figures in evaluated(folder / "chunks.jsonl", "draft-head").items():
        count = file.removeprefix("IQ2_XS-")
        if count.isdigit() or count == "f16":
            row = {"figures": figures}
            number = int(count) if count.isdigit() else 10**6
            lines.append((number, [count if count.isdigit() else "all", cell(figures[AGREEMENT]), shown(lost(row))]))
    table("chunks of 512 | agreement, % | loss, points", [line for _, line in sorted(lines)])


def domains(folder: Path) -> None:
    names = ("chat", "code", "reasoning", "tool-calling")
    rows = []
    for row in read(folder / "chunks.jsonl"):
        trained = row["file"].removesuffix(".gguf").removeprefix("IQ2_XS-")
        if trained not in (*names, "25", "f16"):
            continue
        of = {figure["domain"]: figure for figure in row["figures"] if figure["name"] == f"{AGREEMENT}.difference"}
        label = {"25": "all four, 25 chunks", "f16": "all four, all chunks"}.get(trained, trained)
        rows.append([label, *(cell(of[name]) for name in ("", *names))])
    table(f"calibrated on | all | {' | '.join(names)}", rows)


def acceptance(folder: Path, rows: list[Row]) -> None:
    found = evaluated(folder / "acceptance.jsonl", "draft-acceptance")
    prefix = "testbed-draft_head-"
    scores = {
        f"{row['values']['']}-{'with' if row['head_data'] else 'without'}-head-data": row["figures"] for row in rows
    }
    marks, lines = [], []
    for file, figures in found.items():
        stem = file.removeprefix(prefix).rpartition("-")[0]
        accepted, score, same = figures["greedy.n1.acceptance"], scores[stem][AGREEMENT], figures["greedy.n1.same_text"]
        name = stem.replace("-with-head-data", "").replace("-without-head-data", " (no data)")
        marks.append(
            Mark(score["value"], accepted["value"], name, x_interval=interval(score), y_interval=interval(accepted))
        )
        drafted = f"{figures['greedy.n1.drafted']['value']:.0f}"
        lines.append(
            [
                name,
                cell(score),
                cell(accepted, 1),
                drafted,
                cell(figures["greedy.n1.tokens_per_step"], 3),
                cell(same, 1),
            ]
        )
    table("head | agreement, % | acceptance, % | drafted | tokens a step | same text, %", lines)
    draw(
        Chart(
            "Score and acceptance",
            "agreement with the trunk (%)",
            "greedy acceptance in llama-server, drafts of 1 (%)",
            (Series("", tuple(marks), joined=False),),
        ),
        HERE / "draft-head-acceptance.svg",
    )


def main() -> None:
    folder = Path(sys.argv[1])
    by_kind = {kind: types(folder, kind) for kind in KINDS}
    plot_types(by_kind)
    mixtures(folder)
    chunks(folder)
    domains(folder)
    acceptance(folder, by_kind["f16"])


if __name__ == "__main__":
    main()
